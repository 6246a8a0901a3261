"""The scoring script of an Azure ML batch deployment: `init()` once per worker process, `run()` for each mini-batch of files.

It runs in the Python of Azure's driver and needs pandas there, nothing else. The work is done by `batch_worker.py`, a process
of the Python that has mii_serve: `MII_SERVE_PYTHON`, where it is not this one, because what Azure's driver pins and what
mii_serve needs do not go into one environment. The worker ends when this process does, even by SIGKILL.

`parallel_run_step.settings.json` beside this file makes the driver write predictions.csv as the samples of Azure's catalog do:
row number within the file, prompt, name of the picture, `nsfw_content_detected`, name of the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

START_TIMEOUT_S = float(os.environ.get("MII_SERVE_STARTUP_TIMEOUT_S", "900"))
STOP_TIMEOUT_S, EXIT_TIMEOUT_S = 60.0, 5.0
WORKER = Path(__file__).with_name("batch_worker.py")
OF_THIS_PYTHON = ("PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH")
"""Where this Python finds its modules and libraries is of no use to another one."""
COLUMNS = ("prompt", "generated_image", "nsfw_content_detected", "_azureml_filename")

_worker: subprocess.Popen[str] | None = None


def init() -> None:
    """Start the worker, and come back when its deployment has made its warm-up image.

    Raises:
        RuntimeError: it did not within `START_TIMEOUT_S`, or it ended.
    """
    global _worker
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}  # what lies beside the worker is not to be imported by accident
    if (python := os.environ.get("MII_SERVE_PYTHON")) is not None:
        for name in OF_THIS_PYTHON:
            environment.pop(name, None)
    worker = subprocess.Popen(
        [python or sys.executable, str(WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
        encoding="utf-8",
    )
    assert worker.stdout is not None
    deadline = time.monotonic() + START_TIMEOUT_S
    ready, _, _ = select.select([worker.stdout], [], [], max(0.0, deadline - time.monotonic()))
    line = worker.stdout.readline() if ready else ""
    answer = json.loads(line) if line else {"error": "it ended" if ready else f"it was not ready within {START_TIMEOUT_S:g} s"}
    if "error" in answer:
        _end(worker)
        raise RuntimeError(f"the deployment did not start: {answer['error']}")
    _worker = worker


def run(mini_batch: list[str]) -> pd.DataFrame:
    """The rows of all files for predictions.csv; their pictures lie in `AZUREML_BI_OUTPUT_PATH`.

    Rows that cannot be made are left out, and named on standard error and in the output folder.

    Raises:
        RuntimeError: no row of any file can be made, or the deployment gives no answers. Nothing of the mini-batch was written,
            and it can be run again.
    """
    import pandas as pd

    if not isinstance(mini_batch, list):
        raise RuntimeError(f"mini_batch: must be a list of paths, got {type(mini_batch).__name__}")
    answer = _ask({"files": [str(path) for path in mini_batch], "output": os.environ["AZUREML_BI_OUTPUT_PATH"]})
    if "error" in answer:
        raise RuntimeError(answer["error"])
    rows = answer["rows"]
    index = [row.pop("row") for row in rows]
    return pd.DataFrame(rows, columns=list(COLUMNS), index=index, dtype=object)


def shutdown() -> None:
    """End the worker, where the driver says that there is no more to do; without this it ends with the driver."""
    global _worker
    if _worker is not None:
        _end(_worker, STOP_TIMEOUT_S)
        _worker = None


def _end(worker: subprocess.Popen[str], patience_s: float = 0.0) -> int:
    """The exit code of a worker that is let end for so long, and then killed."""
    assert worker.stdin is not None and worker.stdout is not None
    with contextlib.suppress(OSError):  # what was written last did not arrive
        worker.stdin.close()
    try:
        worker.wait(patience_s)
    except subprocess.TimeoutExpired:
        worker.kill()
    worker.stdout.close()
    return worker.wait()


def _ask(question: dict[str, object]) -> dict:  # type: ignore[type-arg]
    """The worker's answer; a worker that has ended is started again first."""
    global _worker
    if _worker is not None and _worker.poll() is not None:
        _end(_worker)
        _worker = None
    if _worker is None:
        init()
    assert _worker is not None and _worker.stdin is not None and _worker.stdout is not None
    try:
        _worker.stdin.write(json.dumps(question) + "\n")
        _worker.stdin.flush()
        line = _worker.stdout.readline()
    except OSError:
        line = ""
    if not line:
        code, _worker = _end(_worker, EXIT_TIMEOUT_S), None
        raise RuntimeError(f"the deployment has ended, exit code {code}; the next mini-batch starts another")
    answer: dict[str, object] = json.loads(line)
    return answer
