"""The files of an input, and whether they are still what they were."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mii_serve.batch.readers import APPENDABLE, READERS, Reader
from mii_serve.errors import InvalidRequestError

STDIN = Path("-")
SUFFIXES = ", ".join(READERS)
_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of an input, by the name that a job knows it by: relative to the folder that was given."""

    name: str
    path: Path

    def open(self) -> Reader:
        return READERS[self.path.suffix.lower()](self.path)


@dataclass(frozen=True, slots=True)
class Content:
    """What a file holds: its size and the SHA-256 of that many bytes."""

    num_bytes: int
    sha256: str


def find_files(given: Path) -> list[InputFile]:
    """The files of an input: the one that was given, or all in a folder that can be read, by name.

    Raises:
        InvalidRequestError: there are none.
    """
    if given.is_dir():
        paths = sorted(path for path in given.iterdir() if path.suffix.lower() in READERS and path.is_file())
        if not paths:
            raise InvalidRequestError("INPUT", f"{given} has no file that ends in {SUFFIXES}")
        return [InputFile(path.name, path) for path in paths]
    if not given.is_file():
        raise InvalidRequestError("INPUT", f"no such file or folder: {given}")
    if given.suffix.lower() not in READERS:
        raise InvalidRequestError("INPUT", f"must end in {SUFFIXES}, got {given.name!r}")
    return [InputFile(given.name, given)]


def keep_stdin(path: Path) -> None:
    """Write what comes on standard input to a file: a job that goes on later reads it again."""
    half = path.with_name(f"{path.name}.part")
    with half.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    half.replace(path)


def content_of(path: Path) -> Content:
    with path.open("rb") as file:
        return _content(file, None)


def has_grown(path: Path, before: Content) -> bool:
    """Whether the file is what it was, with whole lines appended. False where nothing is new.

    Raises:
        InvalidRequestError: it is another file now.
    """
    with path.open("rb") as file:
        now = _content(file, before.num_bytes)
        if now != before:
            raise InvalidRequestError("INPUT", f"{path} has changed since this job began: {_differ(before, now)}")
        if not (more := file.read(1)):
            return False
        file.seek(max(0, before.num_bytes - 1))
        if path.suffix.lower() not in APPENDABLE or (before.num_bytes and b"\n" not in (file.read(1), more)):
            raise InvalidRequestError("INPUT", f"{path} has changed since this job began: only whole lines may be added")
    return True


def _content(file: BinaryIO, num_bytes: int | None) -> Content:
    digest, count = hashlib.sha256(), 0
    while chunk := file.read(_CHUNK_BYTES if num_bytes is None else min(_CHUNK_BYTES, num_bytes - count)):
        digest.update(chunk)
        count += len(chunk)
    return Content(count, digest.hexdigest())


def _differ(before: Content, now: Content) -> str:
    return f"SHA-256 {before.sha256[:12]} of {before.num_bytes} bytes before, {now.sha256[:12]} of {now.num_bytes} now"


def check_known(files: Sequence[InputFile], known: Sequence[str]) -> None:
    """See to it that the files a job began with are still there.

    Raises:
        InvalidRequestError: naming one that is not.
    """
    names = {file.name for file in files}
    for name in known:
        if name not in names:
            raise InvalidRequestError("INPUT", f"{name} is part of this job and is not there any more")
