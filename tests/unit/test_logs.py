"""Log lines as JSON."""

from __future__ import annotations

import json
import logging
import sys

from mii_serve.logs import JsonFormatter


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
