"""Logs that are read too slowly or not at all, and records that cannot be written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from typing import Any

from patience import PATIENCE_S

from mii_serve.logs import MAX_WAITING_LINES


def logging_process(text: str, how: str = '"info", "text"', **streams: Any) -> subprocess.Popen[str]:
    code = f"""
import logging, sys
from mii_serve.logs import MAX_WAITING_LINES, configure_logs
configure_logs({how})
{textwrap.dedent(text)}
"""
    return subprocess.Popen([sys.executable, "-c", code], text=True, **streams)


def test_a_stuck_reader_of_the_log_delays_no_caller():
    lines = """
        for number in range(2 * MAX_WAITING_LINES):
            logging.info("record %d of a hundred bytes " + "." * 60, number)
        print("served", flush=True)
        input()
        logging.info("the last")
    """
    pipe = subprocess.PIPE
    with logging_process(lines, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdout.readline() == "served\n", "with stderr's pipe full and no reader"
        _, stderr = process.communicate("\n", timeout=PATIENCE_S)
    told = stderr.splitlines()
    numbers = [int(found[1]) for line in told if (found := re.search(r"record (\d+) of", line))]
    assert numbers == list(range(len(numbers))), "in order, and those that are dropped are the last"
    assert MAX_WAITING_LINES <= len(numbers) < 2 * MAX_WAITING_LINES
    [dropped] = [int(found[1]) for line in told if (found := re.search(r"(\d+) lines were dropped", line))]
    assert len(numbers) + dropped + ("the last" in stderr) == 2 * MAX_WAITING_LINES + 1
    assert process.returncode == 0


def test_a_log_without_a_reader_ends_nothing():
    lines = """
        sys.stdin.readline()
        for number in range(100):
            logging.info("record %d", number)
        print("served", flush=True)
    """
    pipe = subprocess.PIPE
    with logging_process(lines, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        process.stderr.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.stdout.read() == "served\n"
        assert process.wait(PATIENCE_S) == 0


def test_a_record_that_cannot_be_formatted_is_named_and_ends_nothing():
    with logging_process('logging.info("%d", "x"); logging.info("the next")', stderr=subprocess.PIPE) as process:
        _, stderr = process.communicate(timeout=PATIENCE_S)
    assert "a record cannot be formatted: root, <string>:" in stderr
    assert "the next" in stderr
    assert process.returncode == 0


def test_what_waits_is_written_once_however_often_logs_are_finished():
    lines = """
        from mii_serve.logs import finish_logs
        logging.info("the last")
        finish_logs(60)
        finish_logs(60)
    """
    with logging_process(lines, stderr=subprocess.PIPE) as process:
        _, stderr = process.communicate(timeout=PATIENCE_S)
    assert stderr.count("the last") == 1
    assert process.returncode == 0


JSON = '"info", "json", is_whole=True'


def test_every_line_is_json_however_it_was_written():
    lines = """
        import os, subprocess, threading, warnings
        from mii_serve.cli.exits import say, say_as_json
        logging.info("a record")
        os.write(2, b"E0000 00:00:1700000000.5 123 server.cc:12] no port\\nnot a\\xff line of ours\\n\\n")
        warnings.warn("a warning")
        say_as_json()
        say("warning: said")
        # In this order: the log's thread could write between the text and its line end.
        child = "import sys; from mii_serve.logs import *; configure_logs('info', 'json'); "
        child += "print('a plain child', file=sys.stderr); logging.info('a child')"
        subprocess.run([sys.executable, "-c", child], check=True)
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
        sys.stderr.write("without an end")
        raise KeyError("the last")
    """
    with logging_process(lines, JSON, stderr=subprocess.PIPE) as process:
        _, stderr = process.communicate(timeout=PATIENCE_S)
    told = [json.loads(line) for line in stderr.splitlines()]
    found = {line["message"].partition("\n")[0]: (line["level"], line["logger"]) for line in told}
    assert found.pop("a record") == found.pop("a child") == ("INFO", "root")
    assert found.pop("no port") == ("ERROR", "grpc")
    assert found.pop("warning: said") == ("WARNING", "mii_serve.cli")
    for text in ("not a\ufffd line of ours", "a plain child", "without an end"):
        assert found.pop(text) == ("WARNING", "stderr")
    assert [name for _, name in found.values()].count("py.warnings") == 1
    errors = [line["exception"].splitlines()[-1] for line in told if line["level"] == "CRITICAL"]
    assert errors == ["ZeroDivisionError: division by zero", "KeyError: 'the last'"]
    assert process.returncode == 1


def test_no_writer_of_another_line_waits_for_the_reader_of_the_log():
    lines = """
        import os
        for number in range(4 * MAX_WAITING_LINES):
            os.write(2, b"%d: a line of a hundred bytes that no reader takes, and the next one comes all the same\\n" % number)
        print("served", flush=True)
        input()
    """
    pipe = subprocess.PIPE
    with logging_process(lines, JSON, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdout.readline() == "served\n"
        _, stderr = process.communicate("\n", timeout=PATIENCE_S)
    assert all(json.loads(line) for line in stderr.splitlines()) and "lines were dropped" in stderr
