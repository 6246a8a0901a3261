"""Pictures in tar files as WebDataset reads them: those of a folder each, `NNNNNN.png` beside `NNNNNN.json` and `NNNNNN.txt`.

A shard is packed when every row of the job has ended, and its pictures are removed only when the shard is on the disk and in
the journal. A job that has rows to make again takes the shards of these rows apart first. So a shard is whole or absent, and
each picture is in one place, or in two that are the same.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

from mii_serve.batch.journal import Journal
from mii_serve.batch.output import PICTURES, SHARDS, OutputFolder


def shard_name(number: int) -> str:
    """The path of a shard below the folder of the job."""
    return f"{SHARDS}/{number:05d}.tar"


class Shards:
    """The shards of one job."""

    def __init__(self, journal: Journal, output: OutputFolder) -> None:
        self._journal = journal
        self._output = output

    def pack(self, lines: Iterable[dict[str, Any]]) -> None:
        """Pack what is not packed yet; `lines` are those of the index, in the order of the rows."""
        packed = self._journal.shards()
        (self._output.path / SHARDS).mkdir(exist_ok=True)
        for number, group in self._by_shard(lines):
            if number not in packed:
                self._write(number, group)
            self._remove_pictures(number)

    def unpack_where_open(self) -> None:
        """Take those shards apart that have rows to make, or that rows were added to."""
        for number in self._journal.shards():
            first = number * self._output.ROWS_PER_FOLDER
            if self._journal.num_open_between(first, first + self._output.ROWS_PER_FOLDER - 1):
                self._unpack(number)

    def _write(self, number: int, lines: list[dict[str, Any]]) -> None:
        content = io.BytesIO()
        name = shard_name(number)
        with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for line in lines:
                picture = Path(line["file"])
                _add(tar, picture.name, (self._output.path / picture).read_bytes())
                described = {key: value for key, value in line.items() if key != "file"}
                _add(tar, f"{picture.stem}.json", json.dumps(described, ensure_ascii=False).encode())
                _add(tar, f"{picture.stem}.txt", line["prompt"].encode())
        whole = content.getvalue()
        self._output.write_whole(name, whole)
        self._journal.add_shard(number, len(whole), hashlib.sha256(whole).hexdigest())

    def _unpack(self, number: int) -> None:
        shard = self._output.path / shard_name(number)
        if shard.exists():
            folder = self._output.path / PICTURES / f"{number:03d}"
            folder.mkdir(parents=True, exist_ok=True)
            with tarfile.open(shard) as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    if file is not None and not member.name.endswith((".json", ".txt")):
                        self._output.write_whole(f"{PICTURES}/{number:03d}/{Path(member.name).name}", file.read())
        self._journal.remove_shard(number)
        shard.unlink(missing_ok=True)

    def _by_shard(self, lines: Iterable[dict[str, Any]]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        numbered = ((line["row"] // self._output.ROWS_PER_FOLDER, line) for line in lines)
        for number, group in itertools.groupby(numbered, key=itemgetter(0)):
            yield number, [line for _, line in group]

    def _remove_pictures(self, number: int) -> None:
        shutil.rmtree(self._output.path / PICTURES / f"{number:03d}", ignore_errors=True)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time and no owner: the same pictures are the same tar
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
