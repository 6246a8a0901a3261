"""Logging to stderr, as text or as one JSON object a line, by a thread of its own: a log that cannot be written blocks and ends
nothing.

As JSON, what is no log record becomes one: warnings, uncaught exceptions, and with `configure_logs(..., is_whole=True)` each
line that this process or its children write to descriptor 2 by other ways, such as gRPC's own log.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import logging.handlers
import os
import queue
import re
import sys
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Literal, TextIO

LogFormat = Literal["text", "json"]
TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
MAX_WAITING_LINES = 10_000
"""A few megabytes, and some seconds of a busy server's log."""
MAX_LINE_BYTES = 64 * 1024
"""Of a line on descriptor 2; a longer one becomes several."""
FLUSH_AT_EXIT_S = 2.0
_LAST_LINE = b"\0the last line\0"
"""By which the reader of descriptor 2 knows that it is done."""
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


def json_line(text: str, level: str, name: str) -> str:
    """A line that is no record, in the form of those that are."""
    return JsonFormatter().format(_record(text, level, name))


class DroppingQueueHandler(logging.handlers.QueueHandler):
    """Formats records and queues them for a thread that writes them to stderr: no caller waits for a slow reader of the log.

    While `MAX_WAITING_LINES` wait, new records are dropped; a warning with their number takes their place.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        """`stream` takes the place of `sys.stderr`."""
        self._waiting: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
        super().__init__(self._waiting)
        self._writer, self._num_dropped = _StreamWriter(stream), 0
        self._captured: _CapturedStderr | None = None
        self._listener: logging.handlers.QueueListener | None = logging.handlers.QueueListener(self._waiting, self._writer)
        self._listener.start()
        atexit.register(self.finish)

    def capture_stderr(self, original: TextIO) -> None:
        """From now on, what is written to descriptor 2 is queued as well. `original` is where it went."""
        self._captured = _CapturedStderr(original, self._take_line)

    def _take_line(self, text: str) -> None:
        """Queue a line: as it is, if it is one of a child's log, else as a record."""
        if _is_json_line(text):
            with self.lock or contextlib.nullcontext():
                self.enqueue(logging.makeLogRecord({"msg": text}))
        elif (found := _ABSL_LINE.fullmatch(text)) is not None:
            self.handle(_record(found[3], _ABSL_LEVELS[found[1]], "grpc", at=found[2]))
        elif text.strip():
            self.handle(_record(text, "WARNING", "stderr"))

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
        self.enqueue(self.prepare(_record(f"a record cannot be formatted: {where}", "WARNING", __name__)))

    def finish(self, timeout_s: float = FLUSH_AT_EXIT_S) -> None:
        """Write the records that wait, for at most `timeout_s` seconds, and stop the thread. Later records are not written."""
        listener, self._listener = self._listener, None
        if listener is None:
            return
        if self._captured is not None:
            self._captured.end(timeout_s)
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
            self._waiting.put(self.prepare(_record(text, "WARNING", __name__)))


class _CapturedStderr:
    """Reads each line that is written to descriptor 2, in a thread of its own: no writer waits for a reader of the log."""

    def __init__(self, original: TextIO, take: Callable[[str], None]) -> None:
        self._original, self._take = original, take
        reading, self._writing = os.pipe()
        os.dup2(self._writing, 2)
        self._thread = threading.Thread(target=self._read, args=(reading,), name="captured-stderr", daemon=True)
        self._thread.start()

    def end(self, timeout_s: float) -> None:
        """Let descriptor 2 be what it was. Lines that are written by then are taken, for at most `timeout_s` seconds."""
        with contextlib.suppress(OSError):
            os.dup2(self._original.fileno(), 2)
            os.write(self._writing, b"\n" + _LAST_LINE + b"\n")  # children may still hold the pipe, so that it has no end
        self._thread.join(timeout_s)

    def _read(self, reading: int) -> None:
        rest = b""
        while chunk := os.read(reading, MAX_LINE_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > MAX_LINE_BYTES:
                lines, rest = [*lines, rest], b""
            for line in lines:
                if line == _LAST_LINE:
                    return
                self._take(line.decode("utf-8", "replace"))


class _StreamWriter(logging.Handler):
    """Writes formatted records to stderr; only the listener's thread uses it."""

    is_broken = False
    """The last write failed: stderr is closed, or its disk is full."""

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__()
        self._stream = stream

    def createLock(self) -> None:  # noqa: N802 - the name is logging's
        # Without a lock: `logging.shutdown` takes the lock of every handler, and would wait for a write that is stuck.
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            stream = self._stream or sys.stderr
            stream.write(record.getMessage() + "\n")
            stream.flush()
            self.is_broken = False
        except (OSError, ValueError):
            self.is_broken = True


_ABSL_LINE = re.compile(r"([IWEF])\d{4} \d\d:\d\d:[\d.]+ +\d+ (\S+:\d+)\] (.*)", re.DOTALL)
"""A line of the library that gRPC's core logs with: severity, time, thread, place, text."""
_ABSL_LEVELS = {"I": "INFO", "W": "WARNING", "E": "ERROR", "F": "CRITICAL"}


def _record(text: str, level: str, name: str, **more: str) -> logging.LogRecord:
    number = logging.getLevelNamesMapping()[level]
    return logging.makeLogRecord({"name": name, "levelno": number, "levelname": level, "msg": text, **more})


def _is_json_line(text: str) -> bool:
    if not text.startswith("{"):
        return False
    try:
        return "message" in json.loads(text)
    except ValueError:
        return False


def configure_logs(level: str, log_format: LogFormat, *, is_whole: bool = False) -> None:
    """Log records of this level and above to stderr. With `is_whole`, see above; it is for the process that has children."""
    if log_format == "text":
        handler = DroppingQueueHandler()
        handler.setFormatter(logging.Formatter(TEXT))
        logging.basicConfig(level=level.upper(), handlers=[handler])
        return
    original = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace") if is_whole else None
    handler = DroppingQueueHandler(original)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda found: _log_uncaught(found.exc_type, found.exc_value, found.exc_traceback)
    if original is not None:
        handler.capture_stderr(original)


def _log_uncaught(kind: type[BaseException], error: BaseException | None, traceback: TracebackType | None) -> None:
    if error is not None and not issubclass(kind, SystemExit):
        logging.getLogger(__name__).critical("an uncaught exception", exc_info=(kind, error, traceback))


def finish_logs(timeout_s: float) -> None:
    """Write the records that wait, for at most `timeout_s` seconds; for a process that ends without running exit handlers."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, DroppingQueueHandler):
            handler.finish(timeout_s)


def current_format() -> LogFormat:
    """The format that `configure_logs` set, to pass on to a child process."""
    return "json" if any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers) else "text"
