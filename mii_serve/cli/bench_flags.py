"""The flags of `mii_serve bench`, and what they have to agree on. Nothing is imported that `--help` would have to wait for."""

from __future__ import annotations

import argparse
from pathlib import Path

MORE = """

It asks a running server for pictures, in a closed loop (--concurrency) or an open one (--rate, --trace), and counts every
time from the moment a request was meant to start. A sample of the pictures is made again here by the reference engine; when
one of them is another picture the run is rejected, with exit code 5. A mix is kinds by weight, inline or a YAML file:

  --mix "3: num_inference_steps=10; 1: num_inference_steps=50, guidance_scale=1"

mii_serve bench compare A.json B.json says what of the difference between two runs is more than chance."""

USAGE = "mii_serve bench --target HOST:PORT [options]\n       mii_serve bench compare A.json B.json [--json]"


def add_flags(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="compare")
    compare = actions.add_parser(
        "compare", usage="mii_serve bench compare A.json B.json [--json]", help="say what differs between two results"
    )
    compare.add_argument("files", nargs=2, type=Path, metavar="FILE", help="what a run has written with --output")
    compare.add_argument("--json", action="store_true", dest="is_json", help="print one JSON object instead of a table")

    add = parser.add_argument_group("who is asked").add_argument
    add("--target", metavar="ADDRESS", help="HOST:PORT, default 127.0.0.1:50050; for http also a URL")
    add("--protocol", choices=("grpc", "http", "mii"), default="grpc", help="our gRPC, OpenAI's HTTP, or MII's wire")
    add("--metrics", metavar="ADDRESS", help="the server's HTTP port, to read batch sizes and step times from /metrics")
    add = parser.add_argument_group("how requests come; without any of these, --concurrency 8").add_argument
    add("--concurrency", type=int, metavar="N", help="closed loop: so many callers, each asks again when it has its answer")
    add("--rate", type=float, metavar="R", help="open loop: requests a second")
    add("--arrivals", choices=("poisson", "constant"), help="of --rate; poisson when left out")
    add("--trace", type=Path, metavar="FILE", help='open loop at these times: lines of {"at_s": 0.5, ...parameters}')
    add("--trace-speed", type=float, metavar="X", help="play the trace X times as fast")
    add = parser.add_argument_group("what is asked").add_argument
    add("--mix", metavar="MIX", help="kinds of requests by weight, inline or a .yaml file; the model's defaults when left out")
    add("--seed", default="0", metavar="TEXT", help="of the mix, the arrivals and the pictures, default 0")
    add("--preview-every", type=int, metavar="N", help="ask for a preview after every N UNet calls")
    add = parser.add_argument_group("where it ends").add_argument
    add(
        "--duration", type=float, metavar="SECONDS", help="start nothing after this long, default 30 unless --requests is given"
    )
    add("--requests", type=int, metavar="N", help="start no more than this")
    add("--max-in-flight", type=int, default=256, metavar="N", help="open loop: under way at once, default 256")
    add("--timeout", type=float, default=120.0, metavar="SECONDS", help="a request's deadline, default 120")
    add("--warmup", type=int, default=4, metavar="N", help="requests before it counts, default 4")
    add = parser.add_argument_group("how it is judged").add_argument
    add("--goodput", type=float, metavar="SECONDS", help="count those answered within this")
    add("--check", type=int, default=4, metavar="N", help="pictures to hold against the reference, default 4; 0 for none")
    add("--check-model", metavar="MODEL", help="the model for that; needed where the server's name for it says not enough")
    add("--check-psnr", type=float, metavar="DB", help="accept pictures this near; by default exact in fp32, 30 dB in half")
    add = parser.add_argument_group("what is written").add_argument
    add("-o", "--output", type=Path, metavar="FILE", help="the result with every request as JSON")
    add("--html", type=Path, metavar="FILE", help="a page with tables and plots, everything in one file")
    add("--json", action="store_true", help="print the JSON instead of tables")
