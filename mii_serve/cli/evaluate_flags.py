"""The flags that `mii_serve evaluate` alone has. This module imports nothing that would slow `--help` down."""

from __future__ import annotations

import argparse
from pathlib import Path

LINE = "make the images of prompts at several guidance scales and measure them; goes on where it stopped"
MORE = """

PROMPTS is an input as for batch. Each prompt is made at each scale with the same seed, as one batch job in FOLDER/job; the same
command continues it. Then the images are measured scale by scale, with 95 % intervals: report.json and report.md, and
pareto.svg where the extra bench is installed.

Without more options the share of flagged images is measured. --reference adds a Fréchet distance in the space of the model's
own safety checker, which is not FID; FID itself needs --inception, and a CLIP score --clip. --grader calls a function
f(line, image) for each image, which returns numbers by name; line is that of the index, with the members of the prompt's row.

Exit codes as for batch."""
NAMES = (
    "given",
    "output",
    "guidance",
    "seed",
    "reference",
    "checker",
    "inception",
    "clip",
    "grader",
    "device",
    "max_in_flight",
    "max_stall",
    "retry_failed",
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("given", type=Path, metavar="PROMPTS", help="file or folder with a row for each prompt")
    add("-o", "--output", type=Path, required=True, metavar="FOLDER", help="new, or that of an evaluation to continue")
    add("--guidance", required=True, metavar="X,X,...", help="the guidance scales, such as 1.5,2,3,4,5,6,7,8")
    add("--target", metavar="HOST:PORT", help="use this server; without it, start one and stop it at the end")
    add("--seed", type=int, default=0, metavar="N", help="prompts without a seed get one from it; default 0")
    add("--max-in-flight", type=int, metavar="N", help="requests at once, default twice the server's slots")
    add("--max-stall", type=float, default=600.0, metavar="SECONDS", help="stop if nothing was made for so long, default 600")
    add("--retry-failed", action="store_true", help="try the rows that failed again")
    add = parser.add_argument_group("what to measure").add_argument
    add("--reference", type=Path, metavar="FOLDER", help="true pictures to measure the distance from")
    add("--checker", metavar="MODEL", help="the model whose safety checker compares with --reference; default the server's")
    add("--inception", type=Path, metavar="FILE", help="FID's network, inception-2015-12-05.pt (TorchScript); measures FID")
    add("--clip", type=Path, metavar="DIR", help="local folder of a CLIPModel; measures the CLIP score")
    add("--grader", metavar="MODULE:FUNCTION", help="a function of yours that judges each image; also FILE.py:FUNCTION")
    add("--device", default="auto", metavar="{auto,cpu,cuda}", help="where to measure, default a GPU if there is one")
