"""A log nobody reads."""

from __future__ import annotations

import subprocess
import sys
import textwrap

from patience import PATIENCE_S

from mii_serve.logs import MAX_WAITING_LINES


def test_nobody_waits_for_a_reader_of_the_log_who_is_stuck():
    lines = f"""
        import logging
        from mii_serve.logs import configure_logs
        configure_logs("info", "text")
        for number in range({2 * MAX_WAITING_LINES}):
            logging.info("line %d of a hundred bytes {"." * 60}", number)
        print("served", flush=True)
        input()
        logging.info("the last")
    """
    command = [sys.executable, "-c", textwrap.dedent(lines)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline() == "served\n", "with stderr's pipe full and nobody reading it"
        _, stderr = process.communicate("\n", timeout=PATIENCE_S)
    told = stderr.splitlines()
    assert any("line 0 of" in line for line in told)
    assert any("lines were dropped: nobody read them in time" in line for line in told)
    assert process.returncode == 0
