"""The journal of a job: what has become of each row, in a SQLite database that one process holds at a time.

Rows are committed in groups. A process that is killed loses the groups it had not committed, and never more; a machine that
loses power may lose more of them, and the pictures of the rows after the last `mark_safe` have to be looked at again.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from mii_serve.batch.inputs import Content
from mii_serve.errors import ConfigError

CLEARED = "cleared"
"""The key that is there while the files of a job that was cleared are being removed."""
FORMAT = 1
"""Of the database; a journal of another format is not touched."""
LOCK_TIMEOUT_S = 0.5
CACHE_KIB, FILLING_CACHE_KIB = 2000, 32_000
"""Of pages in memory: SQLite's own default, and while the rows of an input are added."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS job(key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS input(file INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, bytes INTEGER, sha256 TEXT);
CREATE TABLE IF NOT EXISTS row(
    n INTEGER PRIMARY KEY, file INTEGER NOT NULL, position INTEGER NOT NULL, line INTEGER NOT NULL, id TEXT,
    work INTEGER NOT NULL, state INTEGER NOT NULL, tries INTEGER NOT NULL DEFAULT 0, result TEXT, seq INTEGER);
CREATE UNIQUE INDEX IF NOT EXISTS row_id ON row(id) WHERE id IS NOT NULL;
CREATE INDEX IF NOT EXISTS row_open ON row(n) WHERE state = 0;
CREATE INDEX IF NOT EXISTS row_seq ON row(seq) WHERE seq IS NOT NULL;
CREATE TABLE IF NOT EXISTS picture(
    n INTEGER, i INTEGER, seed TEXT NOT NULL, bytes INTEGER NOT NULL, sha256 TEXT NOT NULL, nsfw INTEGER, blocked INTEGER,
    PRIMARY KEY(n, i)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shard(number INTEGER PRIMARY KEY, bytes INTEGER NOT NULL, sha256 TEXT NOT NULL);
"""


class RowState(IntEnum):
    OPEN = 0
    DONE = 1
    FAILED = 2
    REFUSED = 3
    """The check of the input found it wrong; it is never tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRow:
    """A row as the check of the input leaves it. `work` is what it costs, as the scheduler counts it."""

    file: int
    position: int
    line: int
    id: str | None
    work: int
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureRecord:
    """One picture of a row. A flag is None where the server has no such check."""

    seed: int
    num_bytes: int
    sha256: str
    nsfw: bool | None
    blocked: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalRow:
    """A row and what has become of it. `result` are the effective parameters, or the error."""

    n: int
    file: int
    position: int
    line: int
    id: str | None
    work: int
    state: RowState
    tries: int
    result: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What to note of a row. Without pictures it has failed."""

    n: int
    tries: int
    result: dict[str, Any]
    pictures: tuple[PictureRecord, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    num_rows: int
    num_open: int
    num_done: int
    num_failed: int
    num_pictures: int
    open_work: int


class DuplicateIdError(Exception):
    """Two rows have one id; `first` is where the other one is, `second` the row that was to be added."""

    def __init__(self, first: JournalRow, second: NewRow) -> None:
        super().__init__(second.id)
        self.first = first
        self.second = second


_ROW = "n, file, position, line, id, work, state, tries, result"


class Journal:
    """To be used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Open the journal, or begin it.

        Raises:
            ConfigError: another process holds it, or it is none.
        """
        self._path = path
        self._database = sqlite3.connect(path, timeout=LOCK_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            # Exclusive before WAL: the index of the log is then in this process's memory, which works on network disks too.
            self._database.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute("BEGIN IMMEDIATE")
            for statement in _SCHEMA.split(";"):
                self._database.execute(statement)
            self._database.execute("COMMIT")
        except sqlite3.OperationalError as error:
            self._database.close()
            if "locked" in str(error):
                raise ConfigError("-o", f"another process works on {path.parent}") from None
            raise
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise ConfigError("-o", f"{path} is no journal of a job: {error}") from None
        if self.get("format", FORMAT) != FORMAT:
            self._database.close()
            raise ConfigError("-o", f"{path} was written by another version of mii_serve")
        last = self._database.execute("SELECT max(seq) FROM row WHERE seq IS NOT NULL").fetchone()[0]
        self._seq = last or 0

    @classmethod
    def to_read(cls, path: Path) -> Journal:
        """The journal of a job that no process works on; it cannot be written to, and any number may read it."""
        journal = cls.__new__(cls)
        journal._path, journal._seq = path, 0
        uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
        journal._database = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
        return journal

    def close(self) -> None:
        self._database.close()

    def clear(self) -> None:
        """Forget the job. What is left is the key `CLEARED`: its files are still to be removed."""
        with self.transaction() as database:
            for table in ("row", "picture", "input", "shard", "job"):
                database.execute(f"DELETE FROM {table}")
            self.put(CLEARED, True)

    # ---- the job ---------------------------------------------------------------------------------------------------

    def get(self, key: str, default: Any = None) -> Any:
        found = self._database.execute("SELECT value FROM job WHERE key = ?", (key,)).fetchone()
        return default if found is None else json.loads(found[0])

    def put(self, key: str, value: Any) -> None:
        self._database.execute("INSERT OR REPLACE INTO job VALUES(?, ?)", (key, json.dumps(value)))

    def inputs(self) -> list[tuple[str, Content]]:
        """The files of the job, by number."""
        rows = self._database.execute("SELECT name, bytes, sha256 FROM input ORDER BY file")
        return [(name, Content(num_bytes, sha256)) for name, num_bytes, sha256 in rows]

    def put_input(self, file: int, name: str, content: Content) -> None:
        values = file, name, content.num_bytes, content.sha256
        self._database.execute("INSERT OR REPLACE INTO input VALUES(?, ?, ?, ?)", values)

    @contextlib.contextmanager
    def filling(self) -> Iterator[None]:
        """A transaction that may add very many rows: pages stay in memory meanwhile, so that fewer are written twice."""
        self._database.execute(f"PRAGMA cache_size = -{FILLING_CACHE_KIB}")
        try:
            with self.transaction():
                yield
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # or the log stays as large as the rows
        finally:
            self._database.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            self._database.execute("PRAGMA shrink_memory")

    def transaction(self) -> sqlite3.Connection:
        """For `with`: what happens inside is committed whole, or not at all."""
        self._database.execute("BEGIN IMMEDIATE")
        return self._database

    # ---- rows ------------------------------------------------------------------------------------------------------

    def add(self, rows: Sequence[NewRow], first: int) -> None:
        """Append rows, numbered from `first` on; to be called within a transaction.

        Raises:
            DuplicateIdError: an id is there already. Nothing of this call is added.
        """
        values = [_values(first + offset, row) for offset, row in enumerate(rows)]
        self._database.execute("SAVEPOINT rows")
        try:
            self._database.executemany(_INSERT, values)
        except sqlite3.IntegrityError:
            self._database.execute("ROLLBACK TO rows")
            raise self._duplicate(rows, first) from None
        finally:
            self._database.execute("RELEASE rows")

    def _duplicate(self, rows: Sequence[NewRow], first: int) -> DuplicateIdError:
        seen: dict[str, int] = {}
        for offset, row in enumerate(rows):
            if row.id is None:
                continue
            if (found := self.with_id(row.id)) is not None:
                return DuplicateIdError(found, row)
            if row.id in seen:
                other = rows[seen[row.id]]
                return DuplicateIdError(_row_of((*_values(first, other)[:7], 0, None)), row)
            seen[row.id] = offset
        raise AssertionError("a row broke a rule of the database that is not its id's")

    def with_id(self, row_id: str) -> JournalRow | None:
        found = self._database.execute(f"SELECT {_ROW} FROM row WHERE id = ?", (row_id,)).fetchone()
        return None if found is None else _row_of(found)

    def last_of(self, file: int) -> JournalRow | None:
        """The last row of a file."""
        query = f"SELECT {_ROW} FROM row WHERE file = ? ORDER BY position DESC LIMIT 1"
        found = self._database.execute(query, (file,)).fetchone()
        return None if found is None else _row_of(found)

    def next_open(self, after: int, limit: int) -> list[JournalRow]:
        """The first open rows beyond a number."""
        query = f"SELECT {_ROW} FROM row WHERE state = 0 AND n > ? ORDER BY n LIMIT ?"
        return [_row_of(found) for found in self._database.execute(query, (after, limit))]

    def rows(self, *, after: int = -1, limit: int = 1000) -> list[JournalRow]:
        query = f"SELECT {_ROW} FROM row WHERE n > ? ORDER BY n LIMIT ?"
        return [_row_of(found) for found in self._database.execute(query, (after, limit))]

    def all_rows(self) -> Iterator[JournalRow]:
        """Every row by number, in constant memory."""
        after = -1
        while block := self.rows(after=after):
            yield from block
            after = block[-1].n

    def pictures(self, n: int) -> list[PictureRecord]:
        query = "SELECT seed, bytes, sha256, nsfw, blocked FROM picture WHERE n = ? ORDER BY i"
        return [
            PictureRecord(seed=int(seed), num_bytes=num_bytes, sha256=sha256, nsfw=_flag(nsfw), blocked=_flag(blocked))
            for seed, num_bytes, sha256, nsfw, blocked in self._database.execute(query, (n,))
        ]

    def record(self, outcomes: Iterable[Outcome]) -> None:
        """Commit what has become of some rows, in one group."""
        self._seq += 1
        with self.transaction() as database:
            for one in outcomes:
                state = RowState.DONE if one.pictures else RowState.FAILED
                database.execute(
                    "UPDATE row SET state = ?, tries = ?, result = ?, seq = ? WHERE n = ?",
                    (state, one.tries, json.dumps(one.result), self._seq, one.n),
                )
                database.executemany(
                    "INSERT OR REPLACE INTO picture VALUES(?, ?, ?, ?, ?, ?, ?)",
                    [
                        (one.n, i, str(made.seed), made.num_bytes, made.sha256, made.nsfw, made.blocked)
                        for i, made in enumerate(one.pictures)
                    ],
                )

    def reopen(self, rows: Iterable[int]) -> None:
        """Let rows be made again."""
        numbers = [(n,) for n in rows]
        with self.transaction() as database:
            database.executemany("DELETE FROM picture WHERE n = ?", numbers)
            database.executemany("UPDATE row SET state = 0, result = NULL, seq = NULL WHERE n = ?", numbers)

    def reopen_failed(self) -> int:
        """Let the rows that have failed be tried again; those the check refused stay. Returns how many."""
        return self._database.execute("UPDATE row SET state = 0, result = NULL, seq = NULL WHERE state = 2").rowcount

    def counts(self) -> Counts:
        """Reads every row once: half a second for a million."""
        query = "SELECT count(*), total(state = 0), total(state = 1), total((state = 0) * work) FROM row"
        [[num_rows, num_open, num_done, open_work]] = self._database.execute(query)
        [[num_pictures]] = self._database.execute("SELECT count(*) FROM picture")
        return Counts(
            num_rows=num_rows,
            num_open=int(num_open),
            num_done=int(num_done),
            num_failed=num_rows - int(num_open) - int(num_done),
            num_pictures=num_pictures,
            open_work=int(open_work),
        )

    def next_n(self) -> int:
        """The number that the next row gets."""
        found: int = self._database.execute("SELECT coalesce(max(n) + 1, 0) FROM row").fetchone()[0]
        return found

    def num_failed(self) -> int:
        found: int = self._database.execute("SELECT count(*) FROM row WHERE state >= 2").fetchone()[0]
        return found

    def has_open(self) -> bool:
        return bool(self.next_open(-1, 1))

    # ---- what survives the loss of power ---------------------------------------------------------------------------

    @property
    def seq(self) -> int:
        """The number of the last group."""
        return self._seq

    def mark_safe(self, seq: int) -> None:
        """Note that the pictures of all groups up to this one are on the disk, and put the note itself there."""
        self._database.execute("PRAGMA synchronous = FULL")
        self.put("safe_seq", seq)
        self._database.execute("PRAGMA synchronous = NORMAL")

    def unsafe_rows(self) -> list[int]:
        """Rows whose pictures may not have reached the disk before a loss of power."""
        safe = self.get("safe_seq", 0)
        return [n for (n,) in self._database.execute("SELECT n FROM row WHERE seq > ? AND state = 1 ORDER BY n", (safe,))]

    # ---- shards ----------------------------------------------------------------------------------------------------

    def shards(self) -> dict[int, tuple[int, str]]:
        """The finished shards: their bytes and SHA-256 by number."""
        return {number: (size, sha256) for number, size, sha256 in self._database.execute("SELECT * FROM shard")}

    def add_shard(self, number: int, num_bytes: int, sha256: str) -> None:
        self._database.execute("INSERT OR REPLACE INTO shard VALUES(?, ?, ?)", (number, num_bytes, sha256))

    def remove_shard(self, number: int) -> None:
        self._database.execute("DELETE FROM shard WHERE number = ?", (number,))

    def num_open_between(self, first: int, last: int) -> int:
        query = "SELECT count(*) FROM row WHERE state = 0 AND n BETWEEN ? AND ?"
        count: int = self._database.execute(query, (first, last)).fetchone()[0]
        return count


_INSERT = "INSERT INTO row(n, file, position, line, id, work, state, result) VALUES(?, ?, ?, ?, ?, ?, ?, ?)"


def _values(n: int, row: NewRow) -> tuple[Any, ...]:
    state = RowState.OPEN if row.problem is None else RowState.REFUSED
    result = None if row.problem is None else json.dumps({"error": "InvalidRequestError", "message": row.problem})
    return n, row.file, row.position, row.line, row.id, row.work, state, result


def _row_of(found: Sequence[Any]) -> JournalRow:
    n, file, position, line, row_id, work, state, tries, result = found
    return JournalRow(
        n=n,
        file=file,
        position=position,
        line=line,
        id=row_id,
        work=work,
        state=RowState(state),
        tries=tries,
        result={} if result is None else json.loads(result),
    )


def _flag(value: int | None) -> bool | None:
    return None if value is None else bool(value)
