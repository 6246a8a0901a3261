"""Log lines as JSON, and a log nobody reads."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import textwrap

from patience import PATIENCE_S

from mii_serve.logs import MAX_WAITING_LINES, JsonFormatter


def line(record: logging.LogRecord) -> dict:
    text = JsonFormatter().format(record)
    assert "\n" not in text
    return json.loads(text)


def test_a_line_is_one_object_with_the_fields_it_was_given():
    record = logging.makeLogRecord(
        {"name": "a", "levelname": "INFO", "msg": "%d café\n", "args": (2,), "request": {"code": "OK"}}
    )
    told = line(record)
    assert (told["logger"], told["level"], told["message"], told["request"]) == ("a", "INFO", "2 café\n", {"code": "OK"})
    assert told["time"].endswith("+00:00")


def test_an_exception_and_what_json_does_not_know_are_text():
    try:
        raise ValueError("broken")
    except ValueError:
        told = line(logging.makeLogRecord({"msg": "x", "exc_info": sys.exc_info(), "odd": {1}}))
    assert "ValueError: broken" in told["exception"] and told["odd"] == "{1}"


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
