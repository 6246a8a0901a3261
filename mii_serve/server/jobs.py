"""Runs the jobs of callers: each by a `JobRunner` over this server's own dispatcher, with the priority of batch requests.

A job that has not ended when the server stops goes on when it starts again. A stopping server does not wait for one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from mii_serve.batch.check import Findings, InputRefusedError
from mii_serve.batch.generate import Generate, Made
from mii_serve.batch.job import Job, open_job
from mii_serve.batch.journal import Journal
from mii_serve.batch.openai_output import Kind, Renderer
from mii_serve.batch.output import JOURNAL, OutputFolder
from mii_serve.batch.rows import Row
from mii_serve.batch.runner import Ending, JobRunner, Watch
from mii_serve.batch.settings import JobSettings
from mii_serve.errors import (
    ConfigError,
    ContentBlockedError,
    InvalidRequestError,
    PermissionDeniedError,
    UnavailableError,
)
from mii_serve.server.call import CallContext
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.job_store import JobStore, StoredBatch, StoredFile
from mii_serve.server.keys import KeyRing
from mii_serve.server.threads import in_thread
from mii_serve.types import (
    GenerationRequest,
    ImageFormat,
    OutputOptions,
    Priority,
    RequestedParams,
    ServerInfo,
)

logger = logging.getLogger(__name__)

MAX_RUNNING = 2
"""Jobs that run at once; the others wait their turn."""
WINDOW_S = 24 * 3600
"""A job that has not ended by then expires; what it has made is kept."""
NOT_READY_PAUSE_S = 1.0
GRACE_S = 30.0
"""For the requests in flight of a job that expires."""
PAUSE_S = 60.0
"""Before a job is tried again that could not go on."""
EXPIRE_EVERY_S = 60.0
"""Between two times that files are looked for whose time is over; no caller sees such a file meanwhile."""
COUNTS_EVERY_ROWS = 20
"""Between two times that a job's counts are brought up to date."""
REVOKED = {"code": "api_key_revoked", "message": "the API key of this batch is not known any more", "line": None, "param": None}
"""Why a job was cancelled without a caller's request."""


class Jobs:
    """The jobs of one server. To be used inside of its event loop."""

    def __init__(
        self, folder: Path, dispatcher: Dispatcher, served_names: Sequence[str] = (), keys: KeyRing | None = None
    ) -> None:
        """`served_names` are the operator's names for the model; without any it has its own. `keys` are those of callers."""
        self._served_names = tuple(served_names)
        self._keys = keys or KeyRing()
        self.store = JobStore(folder)
        self._dispatcher = dispatcher
        self._turn = asyncio.Semaphore(MAX_RUNNING)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._runners: dict[str, JobRunner] = {}
        self._paused: set[str] = set()
        self._expiring: asyncio.Task[None] | None = None
        self._is_closing = False
        dispatcher.metrics.follow_jobs(self)

    def resume(self) -> None:
        """Go on with what had not ended, and delete files when their time is over."""
        for batch in self.store.open_batches():
            self._start(batch)
        self._expiring = asyncio.create_task(self._expire())

    async def _expire(self) -> None:
        while True:
            try:
                self.store.remove_expired()
            except OSError:
                logger.exception("files that have expired cannot be deleted")
            await asyncio.sleep(EXPIRE_EVERY_S)

    async def close(self) -> None:
        """Stop working. What was made is kept, and the jobs stay open."""
        self._is_closing = True
        if self._expiring is not None:
            self._expiring.cancel()
        for runner in self._runners.values():
            runner.stop()
            runner.stop()
        for batch_id, task in self._tasks.items():
            if batch_id not in self._runners:
                task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def create(
        self,
        owner: str,
        client: str,
        input_file_id: str,
        metadata: dict[str, str],
        output_expires_s: int | None = None,
    ) -> StoredBatch:
        """Begin a job over an uploaded file; what it puts out is deleted so many seconds after it was made.

        Raises:
            NoSuchJobError: the owner has no such file.
            RateLimitedError: the owner has too many jobs.
        """
        file = self.store.file(owner, input_file_id)
        if file.purpose != "batch":
            raise InvalidRequestError("input_file_id", "must be a file whose purpose is batch", repr(file.purpose))
        now = int(time.time())
        batch = StoredBatch(
            id=f"batch_{secrets.token_hex(16)}",
            owner=owner,
            client=client,
            input_file_id=input_file_id,
            status="validating",
            created_at=now,
            expires_at=now + WINDOW_S,
            metadata=metadata,
            output_expires_s=output_expires_s,
        )
        self.store.add_batch(batch)
        self._start(batch)
        return batch

    def cancel(self, owner: str, batch_id: str) -> StoredBatch:
        """Stop a job; what it has made is kept. Nothing happens to one that has ended, or ends just now.

        Raises:
            NoSuchJobError: the owner has no such job.
        """
        batch = self.store.batch(owner, batch_id)
        if batch.status in ("validating", "in_progress"):
            batch = self._put(batch, "cancelling")
            if (runner := self._runners.get(batch_id)) is not None:
                runner.stop()
                runner.stop()
        return batch

    def job_counts(self) -> Mapping[str, int]:
        """Of all owners: jobs by state."""
        return self.store.num_batches()

    def row_counts(self) -> Mapping[str, int]:
        """Rows of the jobs that have not ended, by state."""
        jobs = self.store.open_batches()
        done, failed = sum(job.completed for job in jobs), sum(job.failed for job in jobs)
        return {"open": sum(job.total for job in jobs) - done - failed, "done": done, "failed": failed}

    @property
    def num_paused(self) -> int:
        return len(self._paused)

    def lines(self, file: StoredFile) -> Iterator[bytes]:
        """The lines of an output file, rendered one by one; to be iterated in a thread."""
        batch = self.store.batch(file.owner, file.batch_id)
        kind = Kind.OUTPUT if file.id == batch.output_file_id else Kind.ERRORS
        journal = Journal.to_read(self.store.job_folder(batch) / JOURNAL)
        try:
            yield from self._renderer(batch, journal).lines(kind)
        finally:
            journal.close()

    def _start(self, batch: StoredBatch) -> None:
        task = self._tasks[batch.id] = asyncio.create_task(self._run(batch.owner, batch.id))
        task.add_done_callback(lambda _: self._tasks.pop(batch.id, None))

    async def _run(self, owner: str, batch_id: str) -> None:
        while not self._is_closing:
            try:
                async with self._turn:
                    await self._work(self.store.batch(owner, batch_id))
                return
            except _PausedError as error:
                self._paused.add(batch_id)
                logger.warning("a job is paused, batch_id=%s: %s", batch_id, error)
            except Exception:
                logger.exception("a job failed, batch_id=%s", batch_id)
                text = "the server failed to run this batch"
                problem = {"code": "server_error", "message": text, "line": None, "param": None}
                self._fail(self.store.batch(owner, batch_id), [problem])
                return
            try:
                await asyncio.sleep(PAUSE_S)
            finally:
                self._paused.discard(batch_id)

    async def _work(self, batch: StoredBatch) -> None:
        output = OutputFolder(self.store.job_folder(batch), ImageFormat.PNG)
        path = self.store.path_of(self.store.file(batch.owner, batch.input_file_id))
        info = await self._info()
        check = _RowCheck((*(self._served_names or (info.model,)), info.deployment_name))
        with ExitStack() as opened:
            opening = open_job(path, output, JobSettings(), info, check_row=check)
            try:
                job = await in_thread(opened.enter_context, opening)
            except InputRefusedError as error:
                self._fail(batch, sorted(_errors_of(error.findings), key=lambda problem: problem["line"]))
                return
            except (InvalidRequestError, ConfigError) as error:
                name = error.field if isinstance(error, InvalidRequestError) else error.setting
                code = "empty_file" if "has no rows" in str(error) else "invalid_input"
                self._fail(batch, [{"code": code, "message": str(error), "line": None, "param": name}])
                return
            ending = await self._make(batch.owner, batch.id, job, info)
            if self._is_closing:
                return
            batch, last = await self._finished(self.store.batch(batch.owner, batch.id), job, ending)
        self._put(batch, last)  # now that the journal is closed, it can be read

    async def _make(self, owner: str, batch_id: str, job: Job, info: ServerInfo) -> Ending:
        batch = self._counted(self.store.batch(owner, batch_id), job)
        if batch.status == "cancelling" or not job.counts.num_open:
            return Ending.COMPLETE
        self._put(batch, "in_progress")
        tally = _Tally(self.store, owner, batch_id)
        runner = self._runners[batch_id] = JobRunner(
            job.journal,
            job.output,
            job.inputs,
            job.settings,
            job.maker,
            max_in_flight=2 * max(1, info.activity.max_slots),
            max_errors=None,
            max_stall_s=float("inf"),
            grace_s=GRACE_S,
            watch=Watch(on_row=tally.on_row),
        )
        expiring = asyncio.get_running_loop().call_later(max(0.0, batch.expires_at - time.time()), runner.stop)
        try:
            end = await runner.run(self._generate(owner, batch.client))
        finally:
            expiring.cancel()
            del self._runners[batch_id]
        if end.ending is Ending.STOPPED and not self._is_revoked(owner):
            raise _PausedError(end.reason)
        return end.ending

    async def _finished(self, batch: StoredBatch, job: Job, ending: Ending) -> tuple[StoredBatch, str]:
        """The job with its counts and the sizes of its files, and the state to give it."""
        last = "completed"
        if batch.status == "cancelling":
            last = "cancelled"
        elif ending is Ending.INTERRUPTED:
            last = "expired"
        elif ending is Ending.STOPPED:
            last, batch = "cancelled", replace(batch, errors=(REVOKED,))
        batch = self._counted(batch, job)
        if last != "cancelled":
            batch = self._put(batch, "finalizing")
        renderer = self._renderer(replace(batch, status=last), job.journal)
        output_bytes, error_bytes = await in_thread(renderer.sizes)
        return replace(batch, output_bytes=output_bytes or None, error_bytes=error_bytes or None), last

    def _renderer(self, batch: StoredBatch, journal: Journal) -> Renderer:
        output = OutputFolder(self.store.job_folder(batch), ImageFormat.PNG)
        return Renderer(journal, output, batch.id, created=batch.created_at, is_expired=batch.status == "expired")

    def _counted(self, batch: StoredBatch, job: Job) -> StoredBatch:
        counts = job.counts
        return replace(batch, total=counts.num_rows, completed=counts.num_done, failed=counts.num_failed)

    def _put(self, batch: StoredBatch, status: str) -> StoredBatch:
        times = {**batch.times, status: batch.times.get(status, int(time.time()))}
        batch = replace(batch, status=status, times=times)
        self.store.put_batch(batch)
        return batch

    def _fail(self, batch: StoredBatch, problems: list[dict[str, Any]]) -> None:
        self._put(replace(batch, errors=tuple(problems)), "failed")

    def _is_revoked(self, owner: str) -> bool:
        """A job that was made without a key has none to lose."""
        return bool(owner) and not self._keys.has(owner)

    def _generate(self, owner: str, client: str) -> Generate:
        async def generate(asked: RequestedParams, image_format: ImageFormat) -> Made:
            if self._is_revoked(owner):
                raise PermissionDeniedError(REVOKED["message"])
            request = GenerationRequest(params=asked, output=OutputOptions(format=image_format), priority=Priority.BATCH)
            answer = await self._dispatcher.generate(request, CallContext(request_id=str(uuid.uuid4()), client=client))
            if all(image.moderation_blocked for image in answer.images):
                raise ContentBlockedError("prompt", {}, stage="output")
            return Made(
                parameters=answer.parameters,
                files=[image.encoded for image in answer.images],
                seeds=[image.seed for image in answer.images],
                nsfw=[image.nsfw_content_detected for image in answer.images],
                blocked=[image.moderation_blocked for image in answer.images],
            )

        return generate

    async def _info(self) -> ServerInfo:
        while True:
            with contextlib.suppress(UnavailableError):
                return await self._dispatcher.server_info()
            await asyncio.sleep(NOT_READY_PAUSE_S)


class _PausedError(Exception):
    """The job cannot go on now, such as while the disk is full."""


class _Tally:
    """Brings a job's counts up to date now and then."""

    def __init__(self, store: JobStore, owner: str, batch_id: str) -> None:
        self._store = store
        self._owner, self._batch_id = owner, batch_id
        self._num_done = self._num_failed = 0

    def on_row(self, work: int, is_done: bool) -> None:
        self._num_done += is_done
        self._num_failed += not is_done
        if self._num_done + self._num_failed >= COUNTS_EVERY_ROWS:
            batch = self._store.batch(self._owner, self._batch_id)
            completed, failed = batch.completed + self._num_done, batch.failed + self._num_failed
            self._store.put_batch(replace(batch, completed=completed, failed=failed))
            self._num_done = self._num_failed = 0


class _RowCheck:
    """What a row of OpenAI's batch format must be, beside the rules of all rows."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = {name.casefold() for name in names} | {name.rpartition("/")[2].casefold() for name in names}

    def __call__(self, row: Row) -> None:
        if row.id is None:
            raise InvalidRequestError("custom_id", "is missing")
        model = row.extra.get("model")
        if model is not None and (not isinstance(model, str) or model.casefold() not in self._names):
            raise InvalidRequestError("model", f"is not a model of this server: {str(model)[:80]!r}")
        if row.extra.get("response_format") not in (None, "b64_json"):
            raise InvalidRequestError("response_format", "must be b64_json in a batch")
        if row.extra.get("output_format") not in (None, "png"):
            raise InvalidRequestError("output_format", "must be png in a batch")
        if row.extra.get("quality") not in (None, "auto", "standard", "medium"):
            raise InvalidRequestError("quality", "must be auto, standard or medium in a batch")


def _errors_of(findings: Findings) -> Iterator[dict[str, Any]]:
    for file_and_place in findings.shown:
        _, _, text = file_and_place.partition(".jsonl:")
        line, _, message = text.partition(":")
        column, _, rule = message.partition(": ")
        param = column.strip() if column.strip().isidentifier() else None
        code = "invalid_value"
        if "not JSON" in text or "not UTF-8" in text or "a NUL" in text:
            code = "invalid_json_line"
        elif "is the id of" in text:
            code = "duplicate_custom_id"
        elif param == "url":
            code = "url_mismatch"
        elif param == "model":
            code = "model_mismatch"
        yield {"code": code, "message": (rule or message).strip(), "line": int(line), "param": param}
