"""The flags of LoRAs. This module imports nothing that would slow `--help` down."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from mii_serve.errors import InvalidRequestError
from mii_serve.types import parsed_loras


class _UseLora(argparse.Action):
    """Adds a name and its scale to the flag's dict."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        given = dict(getattr(namespace, self.dest) or {})
        try:
            given |= parsed_loras(str(values))
        except InvalidRequestError as error:
            raise argparse.ArgumentError(self, str(error)) from None
        setattr(namespace, self.dest, given)


def add_use_lora(add: Callable[..., Any]) -> None:
    """Let requests name LoRAs."""
    add(
        "--use-lora",
        dest="loras",
        action=_UseLora,
        metavar="NAME[:SCALE]",
        help="one of the server's LoRAs, and how much of it, default 1; repeat it for more",
    )


def add_lora(add: Callable[..., Any]) -> None:
    """Let a server, or a command that loads a model itself, have LoRAs."""
    add(
        "--lora",
        action="append",
        default=argparse.SUPPRESS,
        metavar="NAME=PATH",
        help="a LoRA that requests can name, a .safetensors file or a folder; repeat it for more",
    )
