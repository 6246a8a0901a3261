"""The flags of `mii_serve bench`. This module imports nothing that would slow `--help` down."""

from __future__ import annotations

import argparse
from pathlib import Path

MORE = """

It sends requests to a running server, in a closed loop (--concurrency) or an open loop (--rate, --trace). Latency counts from
the time a request was meant to be sent. The reference engine on this machine makes a sample of the images again; if one
differs, the run is rejected with exit code 5. A mix is a weighted list of kinds of requests, inline or in a YAML file:

  --mix "3: num_inference_steps=10; 1: num_inference_steps=50, guidance_scale=1"

mii_serve bench compare A.json B.json shows which differences between two runs are significant."""

USAGE = "mii_serve bench --target HOST:PORT [options]\n       mii_serve bench compare A.json B.json [--json]"


def add_flags(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="compare")
    compare = actions.add_parser(
        "compare", usage="mii_serve bench compare A.json B.json [--json]", help="show what differs between two results"
    )
    compare.add_argument("files", nargs=2, type=Path, metavar="FILE", help="a file that a run wrote with --output")
    compare.add_argument("--json", action="store_true", dest="is_json", help="print one JSON object instead of a table")

    add = parser.add_argument_group("the server").add_argument
    add("--target", metavar="ADDRESS", help="HOST:PORT, default 127.0.0.1:50050; for http also a URL")
    add("--protocol", choices=("grpc", "http", "mii"), default="grpc", help="our gRPC, OpenAI's images API, or MII's gRPC")
    add("--metrics", metavar="ADDRESS", help="the server's HTTP port, to read batch sizes and step times from /metrics")
    add = parser.add_argument_group("arrivals; default: --concurrency 8").add_argument
    add(
        "--concurrency",
        type=int,
        metavar="N",
        help="closed loop: N callers, each sends its next request when it has its answer",
    )
    add("--rate", type=float, metavar="R", help="open loop: requests/s")
    add("--arrivals", choices=("poisson", "constant"), help="distribution of the arrivals of --rate, default poisson")
    add("--trace", type=Path, metavar="FILE", help='open loop at these times: lines of {"at_s": 0.5, ...parameters}')
    add("--trace-speed", type=float, metavar="X", help="replay the trace X times as fast")
    add = parser.add_argument_group("the requests").add_argument
    add(
        "--mix",
        metavar="MIX",
        help="weighted kinds of requests, inline or a .yaml file; default: requests with the model's defaults",
    )
    add("--seed", default="0", metavar="TEXT", help="seed of the mix, the arrivals and the images, default 0")
    add("--preview-every", type=int, metavar="N", help="ask for a preview after every N UNet calls")
    add = parser.add_argument_group("limits").add_argument
    add(
        "--duration",
        type=float,
        metavar="SECONDS",
        help="send requests for this long, default 30 unless --requests is given",
    )
    add("--requests", type=int, metavar="N", help="send at most N requests")
    add("--max-in-flight", type=int, default=256, metavar="N", help="open loop: most requests in flight, default 256")
    add("--timeout", type=float, default=120.0, metavar="SECONDS", help="a request's deadline, default 120")
    add("--warmup", type=int, default=4, metavar="N", help="requests before the measurement, not counted, default 4")
    add = parser.add_argument_group("the figures").add_argument
    add("--goodput", type=float, metavar="SECONDS", help="report goodput: the requests answered within this time")
    add("--check", type=int, default=4, metavar="N", help="images to compare with the reference's, default 4; 0 for none")
    add(
        "--check-model",
        metavar="MODEL",
        help="the model for --check, if the server's model name cannot be loaded on this machine",
    )
    add(
        "--check-psnr",
        type=float,
        metavar="DB",
        help="accept images with at least this PSNR; default: at most one level off in fp32, 30 dB in fp16 and bf16",
    )
    add = parser.add_argument_group("output").add_argument
    add("-o", "--output", type=Path, metavar="FILE", help="write the result, with every request, as JSON")
    add("--html", type=Path, metavar="FILE", help="write a page with tables and plots; needs matplotlib (the extra bench)")
    add("--json", action="store_true", help="print the JSON instead of tables")
