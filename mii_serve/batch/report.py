"""What a job leaves beside its pictures: the index, the errors and the manifest, written from journal and input."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal

from mii_serve import __version__
from mii_serve.batch.inputs import InputFile
from mii_serve.batch.journal import Journal, JournalRow, RowState
from mii_serve.batch.output import ERRORS, INDEX, MANIFEST, PARQUET_INDEX, OutputFolder
from mii_serve.batch.readers import Reader
from mii_serve.batch.settings import JobSettings, Maker
from mii_serve.batch.shards import Shards, shard_name

IndexFormat = Literal["jsonl", "parquet"]


class Report:
    """Writes the files that describe a job."""

    def __init__(
        self, journal: Journal, output: OutputFolder, inputs: Sequence[InputFile], settings: JobSettings, maker: Maker
    ) -> None:
        self._journal = journal
        self._output = output
        self._inputs = inputs
        self._settings = settings
        self._maker = maker
        self._readers: dict[int, Reader] = {}

    def write_index(self, kind: IndexFormat) -> None:
        """One line for each picture, and one for each row that failed, in the order of the rows."""
        lines = self._pictures()
        if self._settings.shards == "webdataset":
            Shards(self._journal, self._output).pack(self._pictures())
            lines = map(self._in_shard, self._pictures())
        if kind == "parquet":
            from mii_serve.batch.parquet_index import write_parquet_index

            write_parquet_index(self._output, lines)
            self._output.remove(INDEX)
        else:
            self._output.write_lines(INDEX, lines)
            self._output.remove(PARQUET_INDEX)
        self._output.write_lines(ERRORS, self._errors())

    def write_manifest(self, state: str, reason: str = "") -> None:
        counts = self._journal.counts()
        inputs = [{"name": name, **asdict(content)} for name, content in self._journal.inputs()]
        manifest = {
            "state": state,
            "reason": reason,
            "rows": counts.num_rows,
            "done": counts.num_done,
            "failed": counts.num_failed,
            "open": counts.num_open,
            "pictures": counts.num_pictures,
            "begun": self._journal.get("begun"),
            "written": _now(),
            "mii_serve": __version__,
            **asdict(self._maker),
            "settings": self._settings.to_json(),
            "inputs": inputs,
        }
        self._output.write_json(MANIFEST, manifest)

    def _pictures(self) -> Iterator[dict[str, Any]]:
        for row in self._journal.all_rows():
            if row.state is RowState.DONE:
                yield from self._lines_of(row)

    def _lines_of(self, row: JournalRow) -> Iterator[dict[str, Any]]:
        asked = self._reader(row.file).row_at(row.position, row.line)
        params = self._settings.requested(asked, row.n)
        pictures = self._journal.pictures(row.n)
        common = {
            "input": self._inputs[row.file].name,
            "line": row.line,
            "prompt": params.prompt,
            "negative_prompt": params.negative_prompt or "",
            **row.result,
        }
        for i, picture in enumerate(pictures):
            yield {
                "row": row.n,
                "id": row.id,
                "image": i,
                "file": self._output.name_of(row.n, i, len(pictures)),
                **common,
                "seed": picture.seed,
                "nsfw_content_detected": picture.nsfw,
                "moderation_blocked": picture.blocked,
                "bytes": picture.num_bytes,
                "sha256": picture.sha256,
                **({"extra": dict(asked.extra)} if asked.extra else {}),
            }

    def _in_shard(self, line: dict[str, Any]) -> dict[str, Any]:
        shard = shard_name(line["row"] // self._output.ROWS_PER_FOLDER)
        return {**line, "file": shard, "member": line["file"].rpartition("/")[2]}

    def _errors(self) -> Iterator[dict[str, Any]]:
        for row in self._journal.all_rows():
            if row.state in (RowState.FAILED, RowState.REFUSED):
                name = self._inputs[row.file].name
                yield {"row": row.n, "id": row.id, "input": name, "line": row.line, "tries": row.tries, **row.result}

    def _reader(self, file: int) -> Reader:
        if file not in self._readers:
            self._readers[file] = self._inputs[file].open()
        return self._readers[file]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
