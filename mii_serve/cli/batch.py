"""`mii_serve batch`: makes the pictures of every row of an input, and can be stopped and taken up again at any moment."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sqlite3
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mii_serve.batch.generate import by_client
from mii_serve.batch.inputs import STDIN
from mii_serve.batch.job import Job, only_check, open_job
from mii_serve.batch.journal import Counts, Journal
from mii_serve.batch.output import JOURNAL, OutputFolder
from mii_serve.batch.report import IndexFormat
from mii_serve.batch.runner import End, Ending, JobRunner, Watch
from mii_serve.batch.settings import JobSettings
from mii_serve.cli.connection import Connection
from mii_serve.cli.exits import ExitCode, say
from mii_serve.cli.own_server import own_server
from mii_serve.errors import InvalidRequestError, UnavailableError
from mii_serve.extras import require
from mii_serve.types import Capabilities, GenerationDefaults, Limits, LoraInfo, ModelParts, ServerInfo

if TYPE_CHECKING:
    from mii_serve.batch.check import Findings

SOME_FAILED, STOPPED = 3, 4
"""Exit codes of this command alone."""
RATE_ROWS = 256
"""Rows that the rate is taken from."""
LINE_EVERY_S = 30.0
"""Between two lines of progress where stderr is no terminal."""
INFO_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFlags:
    """What the command line says of a job, beside the server and the settings."""

    given: Path
    output: Path | None
    max_in_flight: int | None
    max_errors: int | None
    max_stall_s: float
    retry_failed: bool
    only_check: bool
    is_json: bool
    restart: bool = False
    index: IndexFormat = "jsonl"


def run(flags: BatchFlags, settings: JobSettings, connection: Connection | None, own: Mapping[str, Any]) -> int:
    """Make the pictures and return the exit code. Without a connection, a server is started with the flags `own`.

    Raises:
        InvalidRequestError: the input, the output folder or an option cannot be used.
        ConfigError: the job cannot be taken up like this.
    """
    if flags.index == "parquet":
        require("parquet")
    if flags.only_check:
        check_own(connection, own)
        return _only_check(flags, settings, connection)
    if flags.output is None:
        raise InvalidRequestError("-o", "is needed: the folder for the pictures")
    with connected(connection, own) as target, findings_shown():
        return make_pictures(flags, flags.output, settings, target, server_info(target, flags.max_stall_s))


def make_pictures(flags: BatchFlags, folder: Path, settings: JobSettings, target: Connection, info: ServerInfo) -> int:
    """Begin or continue the job of a folder with a server, and return the exit code.

    Raises:
        InvalidRequestError, ConfigError: as `run`.
    """
    with open_job(
        flags.given,
        OutputFolder(folder, settings.format),
        settings,
        info,
        max_errors=flags.max_errors,
        retry_failed=flags.retry_failed,
        restart=flags.restart,
        on_progress=lambda count: say(f"checked {count} rows"),
    ) as job:
        return _work(flags, job, target, info)


@contextlib.contextmanager
def findings_shown() -> Iterator[None]:
    """Show what is wrong with an input, row by row, before the error that says that something is."""
    try:
        yield
    except InvalidRequestError as error:
        _show_findings(getattr(error, "findings", None))
        raise


def check_own(connection: Connection | None, own: Mapping[str, Any]) -> None:
    """Raises:
    InvalidRequestError: there are flags for a server of one's own, and another server is to be used.
    """
    if connection is not None and own:
        raise InvalidRequestError(f"--{next(iter(own))}", "cannot be combined with --target: the server has chosen it")


@contextlib.contextmanager
def connected(connection: Connection | None, own: Mapping[str, Any]) -> Iterator[Connection]:
    """The server that was named or, without one, a server that is started with the flags `own` and stopped in the end."""
    check_own(connection, own)
    if connection is not None:
        yield connection
        return
    arguments = [str(own.get("model", "demo"))]
    for name, value in own.items():
        if name not in ("model", "lora"):
            arguments += [f"--{name}", str(value)]
    for pair in own.get("lora", ()):
        arguments += ["--lora", pair]
    say(f"starting a server for {arguments[0]}")
    with own_server(arguments) as address:
        yield Connection(target=address)


def server_info(connection: Connection, patience_s: float) -> ServerInfo:
    """What the server says of itself, as soon as it does."""
    deadline = time.monotonic() + patience_s
    with connection.open() as client:
        while True:
            try:
                return client.server_info(timeout=INFO_TIMEOUT_S)
            except UnavailableError as error:
                if time.monotonic() > deadline:
                    raise
                say(f"waiting for the server: {error}")
                time.sleep(1.0)


def _work(flags: BatchFlags, job: Job, connection: Connection, info: ServerInfo) -> int:
    before = job.counts
    _show_findings(job.findings)
    if before.num_rows > before.num_open and before.num_open and not flags.is_json:
        say(f"going on: {before.num_rows - before.num_open} of {before.num_rows} rows have ended already")
    with _Progress(before, is_quiet=flags.is_json) as progress:
        runner = JobRunner(
            job.journal,
            job.output,
            job.inputs,
            job.settings,
            job.maker,
            max_in_flight=flags.max_in_flight or 2 * max(1, info.activity.max_slots),
            max_errors=flags.max_errors,
            max_stall_s=flags.max_stall_s,
            watch=Watch(on_row=progress.on_row, on_trouble=progress.on_trouble),
        )
        end = asyncio.run(_run(runner, connection)) if before.num_open else End(Ending.COMPLETE)
    try:
        job.finish(end, flags.index)
    except (OSError, sqlite3.Error):
        if end.ending is Ending.COMPLETE:
            raise
    return _report(flags, job, end, before)


async def _run(runner: JobRunner, connection: Connection) -> End:
    loop = asyncio.get_running_loop()
    is_terminated = asyncio.Event()

    def terminate() -> None:
        is_terminated.set()
        runner.stop()

    with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C ends at once, and what was committed stays
        loop.add_signal_handler(signal.SIGINT, runner.stop)
        loop.add_signal_handler(signal.SIGTERM, terminate)
    async with connection.open_async() as client:
        end = await runner.run(by_client(client))
    if end.ending is Ending.INTERRUPTED and is_terminated.is_set():
        return replace(end, ending=Ending.STOPPED, reason="stopped by SIGTERM")
    return end


def _report(flags: BatchFlags, job: Job, end: End, before: Counts) -> int:
    counts, folder = job.counts, job.output.path
    code = {Ending.STOPPED: STOPPED, Ending.INTERRUPTED: int(ExitCode.INTERRUPTED)}.get(end.ending)
    if code is None:
        code = SOME_FAILED if counts.num_failed else int(ExitCode.OK)
    if flags.is_json:
        made = {"state": end.ending.value, "reason": end.reason, "exit_code": code, "output": str(folder)}
        print(json.dumps({**made, **_numbers(counts), "made_now": counts.num_done - before.num_done}))
        return code
    if end.ending is not Ending.COMPLETE:
        say(f"error: {end.reason}; {counts.num_open} of {counts.num_rows} rows are left; run the same command again to go on")
    elif counts.num_failed:
        say(f"{counts.num_failed} of {counts.num_rows} rows failed: see {folder / 'errors.jsonl'}; --retry-failed tries again")
    print(f"{folder}: {counts.num_pictures} pictures of {counts.num_done} rows")
    return code


def _numbers(counts: Counts) -> dict[str, int]:
    return {
        "rows": counts.num_rows,
        "done": counts.num_done,
        "failed": counts.num_failed,
        "open": counts.num_open,
        "pictures": counts.num_pictures,
    }


# ---- only checking -------------------------------------------------------------------------------------------------


class _AnyScheduler(dict[str, str]):
    """Every name is known: which ones a model has, only a server can say."""

    def get(self, key: str, default: Any = None) -> Any:
        return key


class _AnyLora(dict[str, LoraInfo]):
    """The same for LoRAs."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> LoraInfo:
        return LoraInfo(name=name, revision="", rank=1)


def _only_check(flags: BatchFlags, settings: JobSettings, connection: Connection | None) -> int:
    if flags.given == STDIN:
        raise InvalidRequestError("INPUT", "must be a file or a folder with --only-check")
    if connection is not None:
        capabilities = server_info(connection, flags.max_stall_s).capabilities
    else:
        defaults = GenerationDefaults(scheduler="default")
        capabilities = Capabilities(
            limits=Limits(),
            defaults=defaults,
            schedulers=_AnyScheduler(),
            loras=_AnyLora(),
            parts=ModelParts(num_text_layers=1000),  # as many as any model has
        )
    with tempfile.TemporaryDirectory(prefix="mii_serve-check-") as folder:
        journal = Journal(Path(folder) / JOURNAL)
        try:
            num_rows, findings = only_check(flags.given, journal, settings, capabilities)
        finally:
            journal.close()
    _show_findings(findings)
    if flags.is_json:
        print(json.dumps({"rows": num_rows, "problems": findings.num_problems, "first_problems": findings.shown}))
    else:
        print(f"{flags.given}: {num_rows} rows, {findings.num_problems} of them wrong")
    return ExitCode.INVALID if findings.num_problems else ExitCode.OK


def _show_findings(findings: Findings | None) -> None:
    if findings is None:
        return
    for line in findings.shown:
        say(f"error: {line}")
    if (more := findings.num_problems - len(findings.shown)) > 0:
        say(f"error: and {more} more")


# ---- progress ------------------------------------------------------------------------------------------------------


class _Progress:
    """A bar on a terminal, else a line now and then. The time left is that of the work left, at the rate of the last rows."""

    def __init__(self, counts: Counts, *, is_quiet: bool) -> None:
        self._total, self._ended = counts.num_rows, counts.num_rows - counts.num_open
        self._work_left = counts.open_work
        self._is_quiet = is_quiet
        self._recent: deque[tuple[float, int]] = deque([(time.monotonic(), 0)], maxlen=RATE_ROWS)
        self._num_failed = 0
        self._said_at = time.monotonic()
        self._trouble = ""
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> _Progress:
        if not self._is_quiet and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[more]}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=self._total, completed=self._ended, more="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def on_row(self, work: int, is_done: bool) -> None:
        self._ended += 1
        self._num_failed += not is_done
        self._work_left -= work
        self._recent.append((time.monotonic(), work))
        self._trouble = ""
        self._show()

    def on_trouble(self, text: str) -> None:
        self._trouble = f"waiting: {text}"
        self._show()

    def _show(self) -> None:
        if self._is_quiet:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=self._ended, more=self._words())
        elif time.monotonic() - self._said_at > LINE_EVERY_S:
            self._said_at = time.monotonic()
            say(f"{self._ended} of {self._total} rows, {self._words()}")

    def _words(self) -> str:
        elapsed_s = self._recent[-1][0] - self._recent[0][0]
        done = sum(work for _, work in self._recent) - self._recent[0][1]
        parts = []
        if elapsed_s > 0 and done > 0:
            parts = [
                f"{(len(self._recent) - 1) / elapsed_s:.2f} rows/s",
                f"{_duration(self._work_left * elapsed_s / done)} left",
            ]
        if self._num_failed:
            parts.append(f"{self._num_failed} failed")
        return ", ".join([*parts, self._trouble] if self._trouble else parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
