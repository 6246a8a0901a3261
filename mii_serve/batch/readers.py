"""Input files as records: JSON lines, CSV and Parquet. Each reads front to back in constant memory, and any row again.

A record that cannot be read is a problem with its line and column; the records after it are read all the same.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from mii_serve.batch.rows import Row, RowError, near_parameter, row_of, row_of_text
from mii_serve.errors import InvalidRequestError

MAX_LINE_BYTES = 1024 * 1024
"""Of a line of JSON or text; far above what any valid row needs."""
BOM = b"\xef\xbb\xbf"
NUM_PARQUET_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Record:
    """One row, or why there is none. `position` finds it again; `line` counts from 1, in Parquet the rows."""

    position: int
    line: int
    row: Row | None
    problem: Problem | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, and where: `column` is a character's number from 1, or the name of a column; None for the whole line."""

    line: int
    column: int | str | None
    text: str

    def __str__(self) -> str:
        return f"{self.line}: {self.text}" if self.column is None else f"{self.line}:{self.column}: {self.text}"


class Reader(Protocol):
    def records(self, position: int = 0, line: int = 1) -> Iterator[Record]:
        """All records from a position on, where this line is."""

    def row_at(self, position: int, line: int) -> Row:
        """The row of a record that was read before.

        Raises:
            RowError: it is not there any more.
        """


class _BadLineError(Exception):
    def __init__(self, column: int | str | None, text: str) -> None:
        super().__init__(text)
        self.column = column


class _Lines:
    """The lines of a file as text, and where the next one begins."""

    def __init__(self, file: BinaryIO, position: int, line: int) -> None:
        self._file = file
        self.position, self.line = position, line
        file.seek(position)

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        raw = self._file.readline(MAX_LINE_BYTES + 1)
        if not raw:
            raise StopIteration
        is_too_long, is_first = len(raw) > MAX_LINE_BYTES, self.position == 0
        self.position += len(raw)
        while is_too_long and not raw.endswith(b"\n") and (raw := self._file.readline(MAX_LINE_BYTES)):
            self.position += len(raw)
        self.line += 1
        if is_too_long:
            raise _BadLineError(None, f"the line is longer than {MAX_LINE_BYTES} bytes")
        if is_first:
            raw = raw.removeprefix(BOM)
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            column = len(raw[: error.start].decode()) + 1
            raise _BadLineError(column, f"not UTF-8: byte 0x{raw[error.start]:02x}") from None
        if (column := text.find("\0")) >= 0:
            raise _BadLineError(column + 1, "a NUL character")
        return text


class JsonLines:
    """One JSON object on each line; empty lines are left out."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def records(self, position: int = 0, line: int = 1) -> Iterator[Record]:
        with self._path.open("rb") as file:
            lines = _Lines(file, position, line)
            while True:
                start, number = lines.position, lines.line
                try:
                    text = next(lines)
                    if text.strip():
                        yield Record(start, number, _json_row(text))
                except StopIteration:
                    return
                except _BadLineError as error:
                    yield Record(start, number, None, Problem(number, error.column, str(error)))
                except RowError as error:
                    yield Record(start, number, None, Problem(number, _column_in(text, error.name), str(error)))

    def row_at(self, position: int, line: int) -> Row:
        return _row_at(self, position, line)


def _json_row(text: str) -> Row:
    try:
        record = _JSON.decode(text.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        raise _BadLineError(error.colno, f"not JSON: {error.msg}") from None
    except RecursionError:
        raise _BadLineError(None, "not JSON: nested too deeply") from None
    except ValueError as error:
        raise _BadLineError(None, f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise _BadLineError(1, f"must be a JSON object, got {type(record).__name__}")
    return row_of(record)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        raise RowError(next(name for name in names if names.count(name) > 1), "is there twice")
    return members


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _column_in(text: str, name: str) -> int | None:
    """Where a line has this member; None where it has not."""
    column = text.find(json.dumps(name)) if name else -1
    return column + 1 if column >= 0 else None


_JSON = json.JSONDecoder(object_pairs_hook=_without_duplicates, parse_constant=_no_constant)


class CsvFile:
    """Comma-separated values, in quotes where they need some; the first line has the names of the columns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: list[str] | None = None

    def records(self, position: int = 0, line: int = 1) -> Iterator[Record]:
        with self._path.open("rb") as file:
            if self._names is None or position == 0:
                header = _Lines(file, 0, 1)
                try:
                    self._names = _checked_names(next(csv.reader(header, strict=True), []))
                except (_BadLineError, csv.Error) as error:
                    yield Record(0, 1, None, Problem(1, getattr(error, "column", None), str(error)))
                    return
                position, line = (header.position, header.line) if position == 0 else (position, line)
            yield from self._rows(_Lines(file, position, line), self._names)

    def _rows(self, lines: _Lines, names: list[str]) -> Iterator[Record]:
        reader = csv.reader(lines, strict=True)
        while True:
            start, number = lines.position, lines.line
            try:
                cells = next(reader)
                if not cells:
                    continue
                if len(cells) != len(names):
                    raise _BadLineError(None, f"has {len(cells)} of {len(names)} columns")
                yield Record(start, number, row_of_text(dict(zip(names, cells, strict=True))))
            except StopIteration:
                return
            except RowError as error:
                yield Record(start, number, None, Problem(number, error.name or None, str(error)))
            except (_BadLineError, csv.Error) as error:
                yield Record(start, number, None, Problem(lines.line - 1, getattr(error, "column", None), str(error)))
                reader = csv.reader(lines, strict=True)

    def row_at(self, position: int, line: int) -> Row:
        return _row_at(self, position, line)


def _checked_names(cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    for number, name in enumerate(names):
        if name in names[:number] and name:
            raise _BadLineError(name, "this column is there twice")
        if (meant := near_parameter(name)) is not None and meant != name:
            raise _BadLineError(name, f"no such parameter; did you mean {meant}? Rename the column if it is something else")
    if "prompt" not in names:
        raise _BadLineError(None, f"there is no column prompt, only {', '.join(names[:10])}")
    return [name or f"column {number + 1}" for number, name in enumerate(names)]


class ParquetFile:
    """A Parquet file; needs the extra `parquet`."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet

        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise InvalidRequestError("INPUT", f"{path} is not a Parquet file: {error}") from None
        self._kept: tuple[int, list[dict[str, Any]]] | None = None

    def records(self, position: int = 0, line: int = 1) -> Iterator[Record]:
        for number, record in self._raw_records(position):
            try:
                yield Record(number, number + 1, row_of(_without_nan(record)))
            except RowError as error:
                yield Record(number, number + 1, None, Problem(number + 1, error.name or None, str(error)))

    def row_at(self, position: int, line: int) -> Row:
        if self._kept is None or not 0 <= position - self._kept[0] < len(self._kept[1]):
            self._kept = None
            block: list[dict[str, Any]] = []
            for _, record in self._raw_records(position):
                block.append(record)
                if len(block) == NUM_PARQUET_ROWS:
                    break
            self._kept = position, block
        return row_of(_without_nan(self._kept[1][position - self._kept[0]]))

    def _raw_records(self, position: int) -> Iterator[tuple[int, dict[str, Any]]]:
        first = 0
        for group in range(self._file.num_row_groups):
            num_rows = self._file.metadata.row_group(group).num_rows
            if first + num_rows > position:
                number = first
                for batch in self._file.iter_batches(NUM_PARQUET_ROWS, row_groups=[group]):
                    if number + batch.num_rows > position:
                        for offset, record in enumerate(batch.to_pylist()):
                            if number + offset >= position:
                                yield number + offset, record
                    number += batch.num_rows
            first += num_rows


def _without_nan(record: dict[str, Any]) -> dict[str, Any]:
    """pandas writes a missing value of a column of numbers as NaN; in a prompt it is an error."""
    return {name: None if value != value and name != "prompt" else value for name, value in record.items()}


def _row_at(reader: JsonLines | CsvFile, position: int, line: int) -> Row:
    record = next(reader.records(position, line), None)
    if record is None or record.row is None:
        raise RowError("", f"line {line} cannot be read any more: {record.problem if record is not None else 'it is gone'}")
    return record.row


READERS: Mapping[str, Callable[[Path], Reader]] = {
    ".jsonl": JsonLines,
    ".ndjson": JsonLines,
    ".csv": CsvFile,
    ".parquet": ParquetFile,
    ".pqt": ParquetFile,
}
APPENDABLE = frozenset({".jsonl", ".ndjson", ".csv"})
"""Files to which rows may be added while a job goes on."""
