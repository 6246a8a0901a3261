#!/usr/bin/env python3
"""What a batch job withstands and what it takes, with a server that answers at once.

    python benchmarks/batch_job.py                  three minutes

- `kills`: a job of 3,000 rows is killed with SIGKILL at 40 random moments and started again each time. Counted are rows in the
  index, files, and pictures that are not what the index says.
- `million`: a job of 1,000,000 rows with ids, until it has its first 500 pictures; it is killed and started again. Measured are
  the seconds to the first picture and the most memory that the process held.

The server is the scripted one of the test suite, in this process; it makes no images.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests" / "support"))

from batch_jobs import command, jsonl, lines_of, pictures  # noqa: E402
from scripted_server import RunningServer, running  # noqa: E402

from mii_serve.bench import environment  # noqa: E402
from mii_serve.types import Event, GenerationRequest  # noqa: E402

RESULTS = Path(__file__).parent / "results"
MIB = 1024 * 1024
FIRST_PICTURES = 500


class Counted:
    """The server's script, and how many answers it has begun."""

    def __init__(self) -> None:
        self.count = 0
        self.has_begun = threading.Event()

    def __call__(self, request: GenerationRequest) -> Iterator[Event]:
        self.count += 1
        self.has_begun.set()
        yield from pictures(request)


def kills(folder: Path, server: RunningServer, num_rows: int, num_kills: int) -> dict[str, Any]:
    script = server.servicer.script = Counted()
    given, out = jsonl(folder / "kills.jsonl", num_rows), folder / "kills"
    moments, killed = random.Random(0), 0
    while True:
        job = subprocess.Popen(command(given, "-o", out, "--target", server.target, "--json"), stdout=subprocess.DEVNULL)
        if killed == num_kills or not _lives_until(job, script, moments, num_rows // num_kills):
            job.wait()
            break
        job.kill()
        job.wait()
        killed += 1
    index = lines_of(out / "index.jsonl")
    wrong = sum(hashlib.sha256((out / line["file"]).read_bytes()).hexdigest() != line["sha256"] for line in index)
    on_disk = [path for path in (out / "pictures").rglob("*") if path.is_file()]
    return {
        "rows": num_rows,
        "kills": killed,
        "rows_in_index": len({line["row"] for line in index}),
        "lines_in_index": len(index),
        "files": len(on_disk),
        "wrong_pictures": wrong,
        "made_again_per_kill": round((script.count - num_rows) / max(1, killed), 1),
        "in_flight": 2 * 8,
    }


def _lives_until(job: subprocess.Popen[bytes], script: Counted, moments: random.Random, per_life: int) -> bool:
    """Wait for the moment to kill: within its start, one time of five, else some answers on. False where it has ended."""
    if moments.random() < 0.2:
        time.sleep(moments.uniform(0.0, 1.0))
        return job.poll() is None
    aim = script.count + moments.randint(1, round(1.6 * per_life))
    while script.count < aim and job.poll() is None:
        time.sleep(0.002)
    time.sleep(moments.uniform(0.0, 0.03))
    return job.poll() is None


def million(folder: Path, server: RunningServer, num_rows: int) -> dict[str, Any]:
    given, out = folder / "million.jsonl", folder / "million"
    with given.open("w") as file:
        for n in range(num_rows):
            file.write(json.dumps({"id": f"row-{n}", "prompt": f"a red circle on a blue background, number {n}"}) + "\n")
    first = _start(server, given, out)
    again = _start(server, given, out)
    journal = sum(path.stat().st_size for path in out.glob("journal.db*"))
    sizes = {"input_mib": round(given.stat().st_size / MIB), "journal_mib": round(journal / MIB)}
    return {"rows": num_rows, **sizes, "first": first, "again": again}


def _start(server: RunningServer, given: Path, out: Path) -> dict[str, float]:
    """Run until there are some pictures, then kill."""
    script = server.servicer.script = Counted()
    started, peak = time.monotonic(), 0
    with subprocess.Popen(command(given, "-o", out, "--target", server.target, "--json")) as job:
        process, to_first_s, cpu_s = psutil.Process(job.pid), 0.0, 0.0
        while script.count < FIRST_PICTURES and job.poll() is None:
            with contextlib.suppress(psutil.Error):
                peak = max(peak, process.memory_info().rss)
            if script.count and not to_first_s:
                to_first_s = time.monotonic() - started
                with contextlib.suppress(psutil.Error):
                    cpu_s = sum(process.cpu_times()[:2])
            time.sleep(0.02)
        job.kill()
    return {
        "seconds_to_first_picture": round(to_first_s, 1),
        "cpu_seconds_to_first_picture": round(cpu_s, 1),
        "peak_mib": round(peak / MIB, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000, help="rows of the job that is killed")
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--million", type=int, default=1_000_000, help="rows of the large job")
    parser.add_argument("--out", type=Path, default=RESULTS / "batch-job.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mii_serve-batch-") as folder, running() as server:
        rows = {
            "kills": kills(Path(folder), server, arguments.rows, arguments.kills),
            "million": million(Path(folder), server, arguments.million),
        }
    print(json.dumps(rows, indent=1))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**environment.circumstances(), **rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
