"""How a process logs: as text for people, or one JSON object a line for collectors."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import queue
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

LogFormat = Literal["text", "json"]
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
MAX_WAITING_LINES = 10_000
FLUSH_AT_EXIT_S = 2.0
_OF_EVERY_RECORD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class JsonFormatter(logging.Formatter):
    """Time in RFC 3339 and UTC, level, logger, message, the fields a record was given beside them, and the exception."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update({name: value for name, value in vars(record).items() if name not in _OF_EVERY_RECORD})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class PatientHandler(logging.Handler):
    """Lines for stderr that wait in a queue for a thread of their own, so that nobody is ever served later because stderr's
    reader is slow or stuck. Lines beyond `MAX_WAITING_LINES` are dropped, and their number is told once there is room again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines: queue.Queue[str | None] = queue.Queue(MAX_WAITING_LINES)
        self._num_dropped = 0
        self._is_broken = False
        self._writer = threading.Thread(target=self._write, name="log-writer", daemon=True)
        self._writer.start()
        atexit.register(self.finish)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._num_dropped += 1
        except Exception:  # noqa: BLE001 - what `logging` asks of a handler: a line that cannot be formatted ends nothing
            self.handleError(record)

    def finish(self, timeout_s: float = FLUSH_AT_EXIT_S) -> None:
        """Write what waits, for at most so long."""
        try:
            self._lines.put(None, timeout=timeout_s)
        except queue.Full:
            return
        self._writer.join(timeout_s)
        if self._is_broken:  # else Python's own flush at exit fails on what is left, and with it the exit code
            with Path(os.devnull).open("w") as nowhere, contextlib.suppress(OSError, ValueError):
                os.dup2(nowhere.fileno(), sys.stderr.fileno())

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            if self._num_dropped:
                num_dropped, self._num_dropped = self._num_dropped, 0
                line = f"{self._told(num_dropped)}\n{line}"
            try:
                sys.stderr.write(line + "\n")
                sys.stderr.flush()
                self._is_broken = False
            except (OSError, ValueError):  # closed: nobody is there to be told
                self._is_broken = True

    def _told(self, num_dropped: int) -> str:
        message = f"{num_dropped} lines were dropped: nobody read them in time"
        return self.format(
            logging.makeLogRecord({"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING", "msg": message})
        )


def configure_logs(level: str, log_format: LogFormat) -> None:
    """Log this and higher levels on stderr, without ever waiting for whoever reads it."""
    handler = PatientHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def finish_logs(timeout_s: float) -> None:
    """Write what waits to be written, for at most so long, before an end that runs no exit handlers."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PatientHandler):
            handler.finish(timeout_s)


def current_format() -> LogFormat:
    """What `configure_logs` was told, for a child process to be told the same."""
    return "json" if any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers) else "text"
