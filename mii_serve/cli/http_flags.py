"""The flags of `mii_serve deploy` for settings of the group `http`. This module imports nothing that slows `--help` down."""

from __future__ import annotations

import argparse
from typing import Any

GROUP = "http"


def add_flags(parser: argparse.ArgumentParser) -> None:
    # What is not on the command line must stay absent, so that the environment and the file can fill it in.
    parser.add_argument(
        "--cors-origin",
        dest=f"{GROUP}.cors_origins",
        action="append",
        default=argparse.SUPPRESS,
        metavar="ORIGIN",
        help="origin whose pages may use the server, such as https://app.example.com; repeat it for more, * is any",
    )
    parser.add_argument(
        "--enable-sdapi",
        dest=f"{GROUP}.enable_sdapi",
        action="store_true",
        default=argparse.SUPPRESS,
        help="serve AUTOMATIC1111's API at /sdapi/v1, for its clients",
    )


def grouped(values: dict[str, Any]) -> dict[str, Any]:
    """The values of flags, those of the group in a dict of their own."""
    inside = {name: value for name, value in values.items() if name.startswith(f"{GROUP}.")}
    outside = {name: value for name, value in values.items() if name not in inside}
    return {**outside, GROUP: {name.partition(".")[2]: value for name, value in inside.items()}} if inside else outside
