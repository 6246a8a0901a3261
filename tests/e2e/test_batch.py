"""`mii_serve batch` with a server of its own and the built-in model: killed once, its server ends with it, and it goes on."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import psutil
from batch_jobs import command, jsonl, lines_of, manifest_of
from deployments import WITHOUT_SPARE, until
from patience import PATIENCE_S

ENVIRONMENT = {**os.environ, **WITHOUT_SPARE}


def test_a_job_with_its_own_server_is_killed_and_goes_on(tmp_path: Path):
    given, out = jsonl(tmp_path / "in.jsonl", 4), tmp_path / "out"
    asked = command(given, "-o", out, "--model", "demo", "--num-inference-steps", 5, "--max-in-flight", 1)
    with subprocess.Popen(asked, env=ENVIRONMENT) as job:
        until(lambda: list((out / "pictures").rglob("*.png")), "the first picture")
        family = psutil.Process(job.pid).children(recursive=True)
        job.kill()
    assert family
    _, left = psutil.wait_procs(family, PATIENCE_S)
    assert not left, "the server ends with the command"
    again = subprocess.run([*asked, "--json"], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert again.returncode == 0, again.stderr
    index = lines_of(out / "index.jsonl")
    assert [line["row"] for line in index] == [0, 1, 2, 3]
    assert [line["num_inference_steps"] for line in index] == [5] * 4
    assert manifest_of(out)["model"] == index[0]["model"]
    assert len({line["sha256"] for line in index}) == 4
