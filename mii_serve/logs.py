"""Logging to stderr, as text or as one JSON object a line, by a thread of its own: a log that cannot be written blocks and ends
nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import logging.handlers
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
"""A few megabytes, and some seconds of a busy server's log."""
FLUSH_AT_EXIT_S = 2.0
_OF_EVERY_RECORD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class JsonFormatter(logging.Formatter):
    """Time in RFC 3339 and UTC, level, logger, message, the record's extra fields, and the exception."""

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


class DroppingQueueHandler(logging.handlers.QueueHandler):
    """Formats records and queues them for a thread that writes them to stderr: no caller waits for a slow reader of the log.

    While `MAX_WAITING_LINES` wait, new records are dropped; a warning with their number takes their place.
    """

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        super().__init__(self._waiting)
        self._writer, self._num_dropped = _StderrWriter(), 0
        self._listener: logging.handlers.QueueListener | None = logging.handlers.QueueListener(self._waiting, self._writer)
        self._listener.start()
        atexit.register(self.finish)

    def enqueue(self, record: logging.LogRecord) -> None:
        # `Handler.handle` holds this handler's lock, so that no other thread adds a record between the check and the put.
        if self._waiting.qsize() >= MAX_WAITING_LINES:
            self._num_dropped += 1
            return
        self._report_dropped()
        self._waiting.put(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
        """Log where a record comes from that cannot be formatted; the base class writes to stderr, in the caller's thread."""
        where = f"{record.name}, {record.filename}:{record.lineno}" if hasattr(record, "filename") else record.name
        self.enqueue(self.prepare(_warning(f"a record cannot be formatted: {where}")))

    def finish(self, timeout_s: float = FLUSH_AT_EXIT_S) -> None:
        """Write the records that wait, for at most `timeout_s` seconds, and stop the thread. Later records are not written."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        self._report_dropped()
        # In a thread, because `QueueListener.stop` waits without a bound.
        stopping = threading.Thread(target=listener.stop, name="stop-logs", daemon=True)
        stopping.start()
        stopping.join(timeout_s)
        if self._writer.is_broken:  # else Python's own flush at exit fails on what is left, and with it the exit code
            with Path(os.devnull).open("w") as nowhere, contextlib.suppress(OSError, ValueError):
                os.dup2(nowhere.fileno(), sys.stderr.fileno())

    def _report_dropped(self) -> None:
        if self._num_dropped:
            num_dropped, self._num_dropped = self._num_dropped, 0
            text = f"{num_dropped} lines were dropped: the reader of the log is too slow"
            self._waiting.put(self.prepare(_warning(text)))


class _StderrWriter(logging.Handler):
    """Writes formatted records to stderr; only the listener's thread uses it."""

    is_broken = False
    """The last write failed: stderr is closed, or its disk is full."""

    def createLock(self) -> None:  # noqa: N802 - the name is logging's
        # Without a lock: `logging.shutdown` takes the lock of every handler, and would wait for a write that is stuck.
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(record.getMessage() + "\n")
            sys.stderr.flush()
            self.is_broken = False
        except (OSError, ValueError):
            self.is_broken = True


def _warning(text: str) -> logging.LogRecord:
    return logging.makeLogRecord({"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING", "msg": text})


def configure_logs(level: str, log_format: LogFormat) -> None:
    """Log records of this level and above to stderr."""
    handler = DroppingQueueHandler()
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def finish_logs(timeout_s: float) -> None:
    """Write the records that wait, for at most `timeout_s` seconds; for a process that ends without running exit handlers."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, DroppingQueueHandler):
            handler.finish(timeout_s)


def current_format() -> LogFormat:
    """The format that `configure_logs` set, to pass on to a child process."""
    return "json" if any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers) else "text"
