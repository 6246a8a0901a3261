"""The files and jobs of callers on this server's disk: what each is, whose it is, and how many there may be.

Every file and job belongs to an owner, the API key it was made with, and is there for no other. Ids are random.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from mii_serve.errors import MiiServeError, RateLimitedError

MAX_OPEN_BATCHES = 4
MAX_FILES = 1000
MAX_STORED_BYTES = 2 * 1024**3
"""Of one owner's uploads."""
RETRY_AFTER_S = 30.0
META, CONTENT, JOB = "meta.json", "content.jsonl", "job"


class NoSuchJobError(MiiServeError):
    """There is no such file or job for this caller."""

    grpc_code = "NOT_FOUND"
    http_status = 404


class FileInUseError(MiiServeError):
    """A job that has not ended reads this file."""

    grpc_code = "FAILED_PRECONDITION"
    http_status = 409


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file of a caller. The output of a job is one, too; then `batch_id` names the job, and it is not stored but rendered."""

    id: str
    owner: str
    name: str
    num_bytes: int
    purpose: str
    created_at: int
    batch_id: str = ""
    expires_at: int | None = None
    """Seconds since 1970; from then on it is not there. None where it stays until it is deleted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBatch:
    """A job. The times are seconds since 1970, by state; `errors` say why it failed before any work."""

    id: str
    owner: str
    client: str
    input_file_id: str
    status: str
    created_at: int
    expires_at: int
    metadata: dict[str, str] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)
    errors: tuple[dict[str, Any], ...] = ()
    total: int = 0
    completed: int = 0
    failed: int = 0
    output_bytes: int | None = None
    error_bytes: int | None = None
    """None where there is no such file, or not yet, or not any more."""
    output_expires_s: int | None = None
    """After they were made; None where they stay until they are deleted."""

    @property
    def is_open(self) -> bool:
        return self.status in ("validating", "in_progress", "finalizing", "cancelling")

    @property
    def output_file_id(self) -> str:
        return f"file-{self.id.removeprefix('batch_')}-output"

    @property
    def error_file_id(self) -> str:
        return f"file-{self.id.removeprefix('batch_')}-errors"


Stored = TypeVar("Stored", StoredFile, StoredBatch)


class _Shelf(Generic[Stored]):
    """Values of one kind, each in a folder of its own."""

    def __init__(self, folder: Path, read: Callable[[dict[str, Any]], Stored]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.values: dict[str, Stored] = {}
        for entry in sorted(folder.iterdir()):
            if (entry / META).exists():
                value = read(json.loads((entry / META).read_text()))
                self.values[value.id] = value
            else:
                shutil.rmtree(entry, ignore_errors=True)  # it had not been begun

    def put(self, value: Stored) -> None:
        folder = self.folder / value.id
        folder.mkdir(exist_ok=True)
        half = folder / f"{META}.part"
        with half.open("w") as file:
            json.dump(asdict(value), file)
            file.flush()
            os.fsync(file.fileno())
        half.replace(folder / META)
        self.values[value.id] = value

    def remove(self, value_id: str) -> None:
        del self.values[value_id]
        (self.folder / value_id / META).unlink(missing_ok=True)
        shutil.rmtree(self.folder / value_id, ignore_errors=True)

    def of(self, owner: str) -> list[Stored]:
        """An owner's values, the newest first."""
        found = [value for value in self.values.values() if value.owner == owner]
        return sorted(found, key=lambda value: (value.created_at, value.id), reverse=True)


class JobStore:
    """Files and jobs below one folder."""

    def __init__(self, folder: Path) -> None:
        self._files = _Shelf(folder / "files", lambda meta: StoredFile(**meta))
        self._batches = _Shelf(folder / "batches", lambda meta: StoredBatch(**{**meta, "errors": tuple(meta["errors"])}))
        self.uploads = folder / "uploads"
        shutil.rmtree(self.uploads, ignore_errors=True)
        self.uploads.mkdir(parents=True)

    # ---- files -----------------------------------------------------------------------------------------------------

    def add_file(self, owner: str, uploaded: Path, name: str, purpose: str, expires_after_s: int | None = None) -> StoredFile:
        """Take over an uploaded file.

        Raises:
            RateLimitedError: the owner has too many, or too large ones.
        """
        num_bytes, own = uploaded.stat().st_size, self._files.of(owner)
        if len(own) >= MAX_FILES or sum(file.num_bytes for file in own) + num_bytes > MAX_STORED_BYTES:
            text = f"at most {MAX_FILES} files of {MAX_STORED_BYTES} bytes in all may be stored; delete some"
            raise RateLimitedError(text, RETRY_AFTER_S)
        now = int(time.time())
        stored = StoredFile(
            id=f"file-{secrets.token_hex(16)}",
            owner=owner,
            name=name,
            num_bytes=num_bytes,
            purpose=purpose,
            created_at=now,
            expires_at=None if expires_after_s is None else now + expires_after_s,
        )
        (self._files.folder / stored.id).mkdir()
        uploaded.replace(self.path_of(stored))
        self._files.put(stored)
        return stored

    def file(self, owner: str, file_id: str) -> StoredFile:
        """Raises:
        NoSuchJobError: the owner has no such file.
        """
        file = next((one for one in self.files(owner) if one.id == file_id), None)
        if file is None:
            raise NoSuchJobError(f"there is no file {file_id[:80]!r}")
        return file

    def files(self, owner: str) -> list[StoredFile]:
        """Uploads, and what jobs have put out."""
        made = [file for batch in self._batches.of(owner) for file in _output_files(batch)]
        there = [file for file in (*self._files.of(owner), *made) if not self._has_expired(file)]
        return sorted(there, key=lambda file: (file.created_at, file.id), reverse=True)

    def path_of(self, file: StoredFile) -> Path:
        return self._files.folder / file.id / CONTENT

    def delete_file(self, owner: str, file_id: str) -> None:
        """Raises:
        NoSuchJobError: the owner has no such file.
        FileInUseError: a job that has not ended reads it.
        """
        file = self.file(owner, file_id)
        if self._is_in_use(file):
            raise FileInUseError(f"a batch that has not ended reads {file_id}; cancel it first")
        self._remove(file)

    def remove_expired(self) -> int:
        """Delete all files whose time is over. Returns how many."""
        made = [file for batch in self._batches.values.values() for file in _output_files(batch)]
        expired = [file for file in (*self._files.values.values(), *made) if self._has_expired(file)]
        for file in expired:
            self._remove(file)
        return len(expired)

    def _has_expired(self, file: StoredFile) -> bool:
        """A file that a job still reads stays until the job has ended."""
        return file.expires_at is not None and file.expires_at <= time.time() and not self._is_in_use(file)

    def _is_in_use(self, file: StoredFile) -> bool:
        return any(batch.is_open and batch.input_file_id == file.id for batch in self._batches.of(file.owner))

    def _remove(self, file: StoredFile) -> None:
        if not file.batch_id:
            self._files.remove(file.id)
            return
        batch = self.batch(file.owner, file.batch_id)
        is_output = file.id == batch.output_file_id
        batch = replace(batch, output_bytes=None) if is_output else replace(batch, error_bytes=None)
        self._batches.put(batch)
        if batch.output_bytes is None and batch.error_bytes is None:
            shutil.rmtree(self.job_folder(batch), ignore_errors=True)

    # ---- jobs ------------------------------------------------------------------------------------------------------

    def add_batch(self, batch: StoredBatch) -> None:
        """Raises:
        RateLimitedError: the owner has too many that have not ended.
        """
        if sum(one.is_open for one in self._batches.of(batch.owner)) >= MAX_OPEN_BATCHES:
            raise RateLimitedError(f"at most {MAX_OPEN_BATCHES} batches may be open at once", RETRY_AFTER_S)
        self._batches.put(batch)

    def put_batch(self, batch: StoredBatch) -> None:
        self._batches.put(batch)

    def batch(self, owner: str, batch_id: str) -> StoredBatch:
        """Raises:
        NoSuchJobError: the owner has no such job.
        """
        batch = self._batches.values.get(batch_id)
        if batch is None or batch.owner != owner:
            raise NoSuchJobError(f"there is no batch {batch_id[:80]!r}")
        return batch

    def batches(self, owner: str) -> list[StoredBatch]:
        return self._batches.of(owner)

    def open_batches(self) -> list[StoredBatch]:
        """Of all owners, the oldest first."""
        return sorted((batch for batch in self._batches.values.values() if batch.is_open), key=lambda one: one.created_at)

    def num_batches(self) -> Counter[str]:
        """Of all owners, by state."""
        return Counter(batch.status for batch in self._batches.values.values())

    def job_folder(self, batch: StoredBatch) -> Path:
        return self._batches.folder / batch.id / JOB


def _output_files(batch: StoredBatch) -> list[StoredFile]:
    created_at = batch.times.get("finalizing", batch.created_at)
    return [
        StoredFile(
            id=file_id,
            owner=batch.owner,
            name=f"{batch.id}_{kind}.jsonl",
            num_bytes=num_bytes,
            purpose="batch_output",
            created_at=created_at,
            batch_id=batch.id,
            expires_at=None if batch.output_expires_s is None else created_at + batch.output_expires_s,
        )
        for kind, file_id, num_bytes in (
            ("output", batch.output_file_id, batch.output_bytes),
            ("errors", batch.error_file_id, batch.error_bytes),
        )
        if num_bytes is not None
    ]
