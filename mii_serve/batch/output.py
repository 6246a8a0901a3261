"""The folder of a job: its pictures, and the files that describe them. Every file is whole or absent.

A picture's name is the number of its row, so no id ever becomes part of a path.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mii_serve.errors import InvalidRequestError
from mii_serve.types import ImageFormat

JOURNAL = "journal.db"
INDEX, ERRORS, MANIFEST = "index.jsonl", "errors.jsonl", "manifest.json"
PARQUET_INDEX = "index.parquet"
STDIN_COPY = "input.jsonl"
PICTURES, PARTS, SHARDS = "pictures", "parts", "shards"
SUFFIXES = {ImageFormat.PNG: "png", ImageFormat.JPEG: "jpg", ImageFormat.WEBP: "webp"}


class OutputFolder:
    """Writes below one folder. Half-written files are in a folder of their own, which is emptied when a job goes on."""

    ROWS_PER_FOLDER = 1000

    def __init__(self, path: Path, image_format: ImageFormat) -> None:
        self.path = path
        self._suffix = SUFFIXES[image_format]

    @property
    def journal_path(self) -> Path:
        return self.path / JOURNAL

    def prepare(self) -> None:
        """Make the folder, or take up one that a job was begun in.

        Raises:
            InvalidRequestError: it is a link, or in use for something else.
        """
        if self.path.is_symlink():
            raise InvalidRequestError("-o", f"{self.path} is a symbolic link; name the folder itself")
        if self.path.exists() and not self.path.is_dir():
            raise InvalidRequestError("-o", f"must be a folder, and {self.path} is a file")
        if self.path.is_dir() and not self.journal_path.exists() and any(self.path.iterdir()):
            raise InvalidRequestError("-o", f"{self.path} is not empty, and no job was begun in it")
        self.path.mkdir(parents=True, exist_ok=True)

    def clear_parts(self) -> None:
        """Delete what was being written when a job ended."""
        parts = self.path / PARTS
        parts.mkdir(exist_ok=True)
        for half in parts.iterdir():
            if half.is_dir():
                shutil.rmtree(half)
            else:
                half.unlink()

    def name_of(self, n: int, i: int, num_images: int) -> str:
        """The path of a picture below the folder, with forward slashes."""
        image = "" if num_images == 1 else f"-{i}"
        return f"{PICTURES}/{n // self.ROWS_PER_FOLDER:03d}/{n:06d}{image}.{self._suffix}"

    def write_pictures(self, n: int, files: Sequence[bytes]) -> list[tuple[int, str]]:
        """Write the pictures of a row, over any that were there. Returns the bytes and SHA-256 of each.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        written = []
        for i, content in enumerate(files):
            path = self.path / self.name_of(n, i, len(files))
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(path, content)
            written.append((len(content), hashlib.sha256(content).hexdigest()))
        return written

    def _write(self, path: Path, content: bytes) -> None:
        half = self.path / PARTS / path.name
        try:
            half.write_bytes(content)
            half.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                half.unlink(missing_ok=True)
            raise

    def write_whole(self, name: str, content: bytes) -> None:
        """Write a file and return when it is on the disk."""
        half = self.path / PARTS / Path(name).name
        with half.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        half.replace(self.path / name)
        _sync((self.path / name).parent)

    def is_intact(self, name: str, num_bytes: int, sha256: str) -> bool:
        """Whether a file is what was written."""
        try:
            content = (self.path / name).read_bytes()
        except OSError:
            return False
        return len(content) == num_bytes and hashlib.sha256(content).hexdigest() == sha256

    def flush(self, names: Iterable[str]) -> None:
        """Return when these files, and their names, are on the disk."""
        folders = set()
        for name in names:
            path = self.path / name
            with contextlib.suppress(FileNotFoundError):  # packed into a shard meanwhile
                _sync(path)
                folders.add(path.parent)
        for folder in folders | {self.path / PICTURES} if folders else ():
            _sync(folder)

    def write_lines(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        """Write a file with one JSON object on each line."""
        half = self.path / PARTS / name
        with half.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        half.replace(self.path / name)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        half = self.path / PARTS / name
        with half.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        half.replace(self.path / name)

    def remove_all(self) -> None:
        """Remove what a job has put out; its journal stays."""
        for folder in (PICTURES, SHARDS):
            shutil.rmtree(self.path / folder, ignore_errors=True)
        self.remove(INDEX, PARQUET_INDEX, ERRORS, MANIFEST)

    def remove(self, *names: str) -> None:
        for name in names:
            (self.path / name).unlink(missing_ok=True)


def _sync(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return  # a folder cannot be opened on Windows
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_apart(given: Path, output: Path) -> None:
    """See to it that neither of input and output is inside the other.

    Raises:
        InvalidRequestError: one is.
    """
    source, target = given.resolve(), output.resolve()
    if source.is_dir() and (target == source or source in target.parents):
        raise InvalidRequestError("-o", f"{output} is inside the input {given}")
    if target in source.parents:
        raise InvalidRequestError("-o", f"the input {given} is inside {output}")
