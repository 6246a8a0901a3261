"""The flags that `mii_serve batch` alone has. This module imports nothing that would slow `--help` down."""

from __future__ import annotations

import argparse
from pathlib import Path

LINE = "make the images of a file of prompts; goes on where it stopped"
MORE = """

INPUT is a .jsonl, .csv or .parquet file, a folder of such files, or - for JSON lines on stdin. A row has the parameters of an
image by their names, of which only prompt is needed, and optionally an id; other members are copied to the index. Lines of
OpenAI's batch format are read, too. The whole input is checked before any image is made.

Rows that others' requests leave no time for wait: the server makes them when it is idle. The folder then holds pictures/,
index.jsonl, errors.jsonl and manifest.json. The same command continues a job that was stopped, killed or has failed.

Exit code 0: all images were made; 3: some rows failed; 4: stopped, and the same command continues; 130: Ctrl-C, the same."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("input", type=Path, metavar="INPUT", help="file, folder or - with a row for each prompt")
    add("-o", "--output", type=Path, metavar="FOLDER", help="folder of the job; new, or that of a job to continue")
    add("--target", metavar="HOST:PORT", help="use this server; without it, start one and stop it at the end")
    add("--format", choices=("png", "jpeg", "webp"), default="png", help="format of the images, default png")
    add(
        "--shards",
        choices=("folder", "webdataset"),
        default="folder",
        help="leave images in folders (default), or pack them in tar files for WebDataset in the end",
    )
    add("--seed", type=int, default=0, metavar="N", help="seed of the job: rows without a seed get one from it; default 0")
    add(
        "--max-errors",
        type=int,
        metavar="N",
        help="stop if more rows fail; without it, only the check stops at a wrong row",
    )
    add("--max-in-flight", type=int, metavar="N", help="requests at once, default twice the server's slots")
    add("--max-stall", type=float, default=600.0, metavar="SECONDS", help="stop if nothing was made for so long, default 600")
    add("--retry-failed", action="store_true", help="try the rows that failed again")
    add("--restart", action="store_true", help="delete the job of this folder with its images and start from the first row")
    add("--index", choices=("jsonl", "parquet"), default="jsonl", help="format of the index, default jsonl")
    add("--only-check", action="store_true", help="check the input and make nothing; exit code 2 if rows are wrong")
    add("--json", action="store_true", help="print one JSON object at the end, and no progress")
