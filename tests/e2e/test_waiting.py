"""How the tests themselves wait for a process: as long as it gets on, whatever the machine's speed."""

from __future__ import annotations

import subprocess
import sys

import deployments
import pytest
from deployments import finished, read_line

SILENT = "import time; time.sleep(3600)"
COMPUTES = "import time\nwhile time.process_time() < 3: pass\nprint('done', flush=True)"


@pytest.fixture
def started(monkeypatch, request):
    monkeypatch.setattr(deployments, "IDLE_S", 1.5)
    command = [sys.executable, "-c", request.param]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("wait", [read_line, finished])
@pytest.mark.parametrize("started", [SILENT], indirect=True, ids=["silent"])
def test_a_process_that_neither_computes_nor_speaks_is_given_up(started, wait):
    with pytest.raises(pytest.fail.Exception, match="CPU time used, none in the last"):
        wait(started)
    assert started.poll() is not None, "and ended"


@pytest.mark.parametrize("started", [COMPUTES], indirect=True, ids=["computes"])
def test_one_that_computes_is_waited_for(started):
    assert read_line(started) == "done\n"
