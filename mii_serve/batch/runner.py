"""Makes the open rows of a job: keeps a bounded number of requests in flight, writes pictures, commits groups of outcomes.

A row ends as done or failed where its outcome is its own. What is the server's (no room, not reachable, content safety without
a verdict) leaves the row open, and it is asked for again until nothing has come for `max_stall_s`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from mii_serve.batch.generate import Generate, Made
from mii_serve.batch.inputs import InputFile
from mii_serve.batch.journal import Journal, JournalRow, Outcome, PictureRecord
from mii_serve.batch.output import OutputFolder
from mii_serve.batch.readers import Reader
from mii_serve.batch.rows import RowError
from mii_serve.batch.settings import JobSettings, Maker, MakerChangedError, check_maker
from mii_serve.errors import (
    DeadlineExceededError,
    EngineError,
    EngineLostError,
    InvalidRequestError,
    MiiServeError,
    NotFiniteError,
    PermissionDeniedError,
    PoisonedRequestError,
    QueueFullError,
    RequestCancelledError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)
from mii_serve.types import EffectiveParameters, RequestedParams

SAFE_EVERY_S = 30.0
"""Between two moments at which all pictures so far are known to be on the disk."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 30.0
MAX_TRIES = 3
"""Of a row whose failure may have been the server's."""
MAX_MESSAGE_CHARS = 500
NUM_WRITERS = 2
FINAL = (InvalidRequestError, PoisonedRequestError, NotFiniteError)
"""The row's own failures: asking again gives the same answer."""
TEMPORARY = (UnavailableError, QueueFullError, DeadlineExceededError, EngineLostError, RequestCancelledError)
HOPELESS = (UnauthenticatedError, PermissionDeniedError, UnsupportedError)
"""No row will fare better."""
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")


class Ending(Enum):
    COMPLETE = "complete"
    STOPPED = "stopped"
    INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True)
class End:
    """How a run ended; `reason` says why, where it did not make every row."""

    ending: Ending
    reason: str = ""


@dataclass(slots=True)
class Watch:
    """Who wants to know how a run goes on."""

    on_row: Callable[[int, bool], None] = lambda work, is_done: None
    """A row has ended: its work, and whether it has its pictures."""
    on_trouble: Callable[[str], None] = lambda text: None
    """Rows wait for something that is not theirs."""


class _StopError(Exception):
    """Ends the run; the text says why."""


class JobRunner:
    """One run over the open rows of a journal."""

    def __init__(
        self,
        journal: Journal,
        output: OutputFolder,
        inputs: list[InputFile],
        settings: JobSettings,
        maker: Maker,
        *,
        max_in_flight: int,
        max_errors: int | None,
        max_stall_s: float,
        grace_s: float = 30.0,
        watch: Watch | None = None,
    ) -> None:
        """With `max_errors`, the run stops when more rows have failed. `grace_s` is for requests in flight at a stop."""
        self._journal = journal
        self._output = output
        self._inputs = inputs
        self._settings = settings
        self._maker = maker
        self._max_in_flight = max_in_flight
        self._max_errors = max_errors
        self._max_stall_s = max_stall_s
        self._grace_s = grace_s
        self._watch = watch or Watch()
        self._readers: dict[int, Reader] = {}
        self._scribe = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._writers = ThreadPoolExecutor(NUM_WRITERS, thread_name_prefix="write")
        self._rows: asyncio.Queue[JournalRow | None] = asyncio.Queue(2 * max_in_flight)
        self._ended: list[tuple[Outcome, int]] = []
        self._has_ended = asyncio.Event()
        self._unsafe: dict[int, list[str]] = {}
        self._num_failed = journal.num_failed()
        self._last_success = time.monotonic()
        self._is_stopping = self._is_over = False
        self._work: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """Take no more rows, and let those in flight end within the grace; called again, do not wait for them."""
        if self._is_stopping:
            self._grace_s = 0.0
        self._is_stopping = True
        if self._work is not None:
            self._work.cancel()

    async def run(self, generate: Generate) -> End:
        """Make the open rows. Whatever ends the run, what was finished is committed.

        Raises:
            OSError, sqlite3.Error: the journal or the folder cannot be written to, and the disk is not full.
        """
        committing = asyncio.create_task(self._commit_groups())
        feeding = asyncio.create_task(self._feed())
        workers = [asyncio.create_task(self._worker(generate)) for _ in range(self._max_in_flight)]
        self._work = asyncio.create_task(_all((feeding, committing), workers))
        end = End(Ending.STOPPED, "it failed")
        try:
            try:
                if self._is_stopping:
                    self._work.cancel()
                await self._work
                end = End(Ending.COMPLETE)
            except asyncio.CancelledError:
                if not self._is_stopping:
                    raise
                end = End(Ending.INTERRUPTED, "interrupted")
                feeding.cancel()
                await self._let_end(workers)
            except _StopError as stop:
                end = End(Ending.STOPPED, str(stop))
        except (OSError, sqlite3.Error) as error:
            end = self._disk_trouble(error)
        finally:
            await _cancel(feeding, *workers)
            self._is_over = True
            self._has_ended.set()
            await asyncio.gather(committing, return_exceptions=True)  # cancelled, it could lose a group on its way
            try:
                await self._commit()
                await self._make_safe()
                if end.ending is Ending.COMPLETE:
                    assert not await self._in_journal(self._journal.next_open, -1, 1), "every row has ended"
            except (OSError, sqlite3.Error) as error:
                end = self._disk_trouble(error)
            self._scribe.shutdown()
            self._writers.shutdown()
        return end

    async def _let_end(self, workers: list[asyncio.Task[None]]) -> None:
        """Wait for the rows in flight, in short pieces: a second request to stop ends the wait."""
        while not self._rows.empty():
            self._rows.get_nowait()
        for _ in workers:
            with contextlib.suppress(asyncio.QueueFull):
                self._rows.put_nowait(None)
        started = time.monotonic()
        while time.monotonic() - started < self._grace_s:
            _, running = await asyncio.wait(workers, timeout=0.1)
            if not running:
                return

    def _disk_trouble(self, error: OSError | sqlite3.Error) -> End:
        is_full = error.errno in DISK_FULL if isinstance(error, OSError) else "full" in str(error)
        if not is_full:
            raise error
        return End(Ending.STOPPED, f"the disk is full at {self._output.path}")

    # ---- rows in -----------------------------------------------------------------------------------------------------

    async def _feed(self) -> None:
        """Give the workers every open row, then an end for each."""
        after = -1
        while block := await self._in_journal(self._journal.next_open, after, 2 * self._max_in_flight):
            for row in block:
                await self._rows.put(row)
            after = block[-1].n
        for _ in range(self._max_in_flight):
            await self._rows.put(None)

    async def _worker(self, generate: Generate) -> None:
        while (row := await self._rows.get()) is not None:
            outcome = await self._outcome(generate, row)
            self._ended.append((outcome, row.work))
            self._has_ended.set()
            if not outcome.pictures:
                self._num_failed += 1
                if self._max_errors is not None and self._num_failed > self._max_errors:
                    raise _StopError(f"{self._num_failed} rows have failed, at most {self._max_errors} may")

    async def _outcome(self, generate: Generate, row: JournalRow) -> Outcome:
        """Ask for the row's pictures until it has them or has failed.

        Raises:
            _StopError: the run cannot go on.
        """
        tries, pause_s = row.tries, FIRST_PAUSE_S
        try:
            asked = self._requested(row)
        except (RowError, OSError) as error:
            raise _StopError(f"the input has changed since it was checked: {error}") from None
        while True:
            tries += 1
            try:
                return await self._make(generate, row, asked, tries)
            except FINAL as error:
                return _failure(row, error, tries)
            except HOPELESS as error:
                raise _StopError(str(error)) from error
            except MakerChangedError as error:
                raise _StopError(str(error)) from error
            except TEMPORARY as error:
                tries -= 1
                wait_s = self._pause_after(error, pause_s)
            except MiiServeError as error:
                if tries >= MAX_TRIES:
                    return _failure(row, error, tries)
                wait_s = pause_s
            await asyncio.sleep(wait_s * random.uniform(1.0, 1.25))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _pause_after(self, error: MiiServeError, pause_s: float) -> float:
        stalled_s = time.monotonic() - self._last_success
        if stalled_s > self._max_stall_s:
            raise _StopError(f"nothing was made for {stalled_s:.0f} s; last: {error}")
        self._watch.on_trouble(str(error))
        if isinstance(error, QueueFullError) and error.retry_after_s is not None:
            return min(error.retry_after_s, LONGEST_PAUSE_S)
        return pause_s

    def _requested(self, row: JournalRow) -> RequestedParams:
        if (reader := self._readers.get(row.file)) is None:
            reader = self._readers[row.file] = self._inputs[row.file].open()
        return self._settings.requested(reader.row_at(row.position, row.line), row.n)

    async def _make(self, generate: Generate, row: JournalRow, asked: RequestedParams, tries: int) -> Outcome:
        made = await generate(asked, self._settings.format)
        parameters = made.parameters
        check_maker(self._maker, Maker(parameters.model, parameters.model_revision, parameters.engine, parameters.dtype))
        written = await asyncio.get_running_loop().run_in_executor(
            self._writers, self._output.write_pictures, row.n, made.files
        )
        self._last_success = time.monotonic()
        return Outcome(n=row.n, tries=tries, result=_effective(parameters), pictures=_pictures(made, written))

    # ---- outcomes out ------------------------------------------------------------------------------------------------

    async def _commit_groups(self) -> None:
        last_safe = time.monotonic()
        while not self._is_over:
            await self._has_ended.wait()
            await self._commit()  # those that end meanwhile are the next group
            if time.monotonic() - last_safe > SAFE_EVERY_S:
                last_safe = time.monotonic()
                await self._make_safe()

    async def _commit(self) -> None:
        ended, self._ended = self._ended, []
        self._has_ended.clear()
        if not ended:
            return
        await self._in_journal(self._journal.record, [outcome for outcome, _ in ended])
        names = self._unsafe.setdefault(self._journal.seq, [])
        for outcome, work in ended:
            count = len(outcome.pictures)
            names += [self._output.name_of(outcome.n, i, count) for i in range(count)]
            self._watch.on_row(work, bool(count))

    async def _make_safe(self) -> None:
        """Put the pictures of all groups so far on the disk, and then a note that they are."""
        unsafe, self._unsafe = self._unsafe, {}
        if not unsafe:
            return
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._writers, self._output.flush, [name for names in unsafe.values() for name in names])
        await self._in_journal(self._journal.mark_safe, max(unsafe))

    async def _in_journal(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._scribe, function, *arguments)


async def _all(helpers: tuple[asyncio.Task[None], ...], workers: list[asyncio.Task[None]]) -> None:
    """Return when all workers have; raise what any of them, or a helper, raises."""
    waiting = {*helpers, *workers}
    while not all(worker.done() for worker in workers):
        ended, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in ended:
            task.result()
    for worker in workers:
        worker.result()


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _failure(row: JournalRow, error: MiiServeError, tries: int) -> Outcome:
    result: dict[str, Any] = {"error": type(error).__name__, "message": str(error)[:MAX_MESSAGE_CHARS]}
    if isinstance(error, InvalidRequestError):
        result |= {"field": error.field, "rule": error.rule[:MAX_MESSAGE_CHARS]}
    elif isinstance(error, EngineError):
        result["message"] = str(error)[:MAX_MESSAGE_CHARS]
    return Outcome(n=row.n, tries=tries, result=result)


def _effective(parameters: EffectiveParameters) -> dict[str, Any]:
    """What is kept of an answer: the prompts are in the input, and what was dropped of them where something was."""
    kept = parameters.as_record()
    for name in ("prompt", "negative_prompt", "device"):
        del kept[name]
    return {name: value for name, value in kept.items() if value not in ("", {})}


def _pictures(made: Made, written: list[tuple[int, str]]) -> tuple[PictureRecord, ...]:
    return tuple(
        PictureRecord(seed=made.seeds[i], num_bytes=num_bytes, sha256=sha256, nsfw=made.nsfw[i], blocked=made.blocked[i])
        for i, (num_bytes, sha256) in enumerate(written)
    )
