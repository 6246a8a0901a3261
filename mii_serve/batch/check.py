"""Reads a whole input before any work is done: every row is checked by the server's rules and entered into the journal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from operator import attrgetter
from typing import Any

from mii_serve.batch.inputs import Content, InputFile, check_known, content_of, has_grown
from mii_serve.batch.journal import DuplicateIdError, Journal, NewRow
from mii_serve.batch.readers import Problem, Record
from mii_serve.batch.rows import Row
from mii_serve.batch.settings import JobSettings
from mii_serve.errors import InvalidRequestError
from mii_serve.types import A1111, PARAMETERS, Capabilities, RequestedParams

MAX_SHOWN = 20
"""Problems that are named one by one; the others are counted."""
BLOCK = 500
PROGRESS_EVERY = 100_000
MAX_KNOWN = 4096
"""Combinations of parameters whose work is remembered."""


@dataclass(slots=True)
class Findings:
    """What is wrong with an input."""

    num_problems: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, file: InputFile, problem: Problem) -> None:
        self.num_problems += 1
        if len(self.shown) < MAX_SHOWN:
            self.shown.append(f"{file.path}:{problem}")


class InputRefusedError(InvalidRequestError):
    """Rows of the input are wrong, and more of them than may be."""

    def __init__(self, findings: Findings) -> None:
        count = findings.num_problems
        super().__init__("INPUT", f"{count} row{'s' if count != 1 else ''} cannot be used; nothing was made")
        self.findings = findings


class _Rules:
    """The rules of a server for the rows of a job. Rows that differ in their texts and seeds alone are resolved once."""

    def __init__(self, settings: JobSettings, capabilities: Capabilities) -> None:
        self._defaults = settings.defaults
        self._capabilities = capabilities
        self._known: dict[tuple[Any, ...], int] = {}

    def work_of(self, asked: RequestedParams) -> int:
        """What the row costs.

        Raises:
            InvalidRequestError: naming the parameter and the rule.
        """
        key = *_NUMBERS(asked), None if asked.loras is None else tuple(sorted(asked.loras.items()))
        has_weights = A1111 in (asked.prompt_syntax, self._defaults.get("prompt_syntax"))  # which every text must have right
        if (work := self._known.get(key)) is None or has_weights:
            given = {name: value for name, value in self._defaults.items() if getattr(asked, name) is None}
            params = self._capabilities.resolve(replace(asked, **given), fallback_seed=0)
            work = params.num_inference_steps * params.work_per_call * params.num_images_per_prompt
            if len(self._known) < MAX_KNOWN:
                self._known[key] = work
            return work
        for parameter in _VARIABLE:
            if (value := getattr(asked, parameter.name)) is not None:
                parameter.checked(value, self._capabilities)
        return work


_VARIABLE = tuple(parameter for parameter in PARAMETERS if parameter.name in ("prompt", "negative_prompt", "seed"))
_NUMBERS = attrgetter(*(parameter.name for parameter in PARAMETERS if parameter not in _VARIABLE))


class InputCheck:
    """One pass over the files of an input."""

    def __init__(
        self,
        journal: Journal,
        settings: JobSettings,
        capabilities: Capabilities,
        *,
        max_errors: int = 0,
        check_row: Callable[[Row], None] = lambda _: None,
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """At most `max_errors` rows may be wrong; they count as failed. `on_progress` hears the number of rows read.

        `check_row` is a further rule: it raises an `InvalidRequestError`.
        """
        self._journal = journal
        self._rules = _Rules(settings, capabilities)
        self._max_errors = max_errors
        self._check_row = check_row
        self._on_progress = on_progress
        self._next_n = 0
        self.findings = Findings()

    @property
    def num_rows(self) -> int:
        """Rows read so far, wrong ones included."""
        return self._next_n

    def run(self, files: Sequence[InputFile]) -> int:
        """Enter the rows that are not in the journal yet; all of them or, where the input is refused, none. Returns how many.

        Raises:
            InputRefusedError: too many rows are wrong, or there are none.
            InvalidRequestError: what the journal knows of the input is not so any more.
        """
        known = self._journal.inputs()
        check_known(files, [name for name, _ in known])
        by_name = {file.name: file for file in files}
        numbers = {name: number for number, (name, _) in enumerate(known)}
        added: list[tuple[InputFile, int, Content | None]] = []
        for name, content in known:
            if has_grown(by_name[name].path, content):
                added.append((by_name[name], numbers[name], content))
        fresh = [file for file in files if file.name not in numbers]
        added += [(file, len(known) + offset, None) for offset, file in enumerate(fresh)]
        if not added:
            return 0
        self._next_n = first = self._journal.next_n()
        with self._journal.filling():
            for file, number, before in added:
                self._enter(file, number, before)
            if self.findings.num_problems > self._max_errors:
                raise InputRefusedError(self.findings)
            if self._next_n == 0:
                raise InvalidRequestError("INPUT", "has no rows")
        return self._next_n - first

    def _enter(self, file: InputFile, number: int, before: Content | None) -> None:
        """Enter the rows of one file, of a file that has grown the new ones."""
        self._journal.put_input(number, file.name, content_of(file.path))
        rows = self._new_rows(file, number, before)
        while block := list(islice(rows, BLOCK)):
            self._add(file, block)
            if self._next_n // PROGRESS_EVERY != (self._next_n - len(block)) // PROGRESS_EVERY:
                self._on_progress(self._next_n)

    def _add(self, file: InputFile, block: list[NewRow]) -> None:
        """Enter a block of rows; of two rows with one id, the second is wrong."""
        while True:
            try:
                self._journal.add(block, self._next_n)
            except DuplicateIdError as error:
                names = [name for name, _ in self._journal.inputs()]
                other = f"{names[error.first.file]}:{error.first.line}"
                text = f"id: {error.second.id!r} is the id of {other} already"[:200]
                self.findings.add(file, Problem(error.second.line, None, text))
                at = next(offset for offset, row in enumerate(block) if row is error.second)
                block[at] = NewRow(
                    file=error.second.file,
                    position=error.second.position,
                    line=error.second.line,
                    id=None,
                    work=0,
                    problem=text,
                )
                continue
            self._next_n += len(block)
            return

    def _new_rows(self, file: InputFile, number: int, before: Content | None) -> Iterator[NewRow]:
        for record in self._records(file, number, before):
            problem, row, work = record.problem, record.row, 0
            if row is not None:
                try:
                    self._check_row(row)
                    work = self._rules.work_of(row.params)
                except InvalidRequestError as error:
                    problem = Problem(record.line, error.field, error.rule)
            if problem is not None:
                self.findings.add(file, problem)
            yield NewRow(
                file=number,
                position=record.position,
                line=record.line,
                id=row.id if row is not None and problem is None else None,
                work=work,
                problem=None if problem is None else str(problem),
            )

    def _records(self, file: InputFile, number: int, before: Content | None) -> Iterator[Record]:
        reader = file.open()
        if before is None or (last := self._journal.last_of(number)) is None:
            yield from reader.records()
            return
        yield from islice(reader.records(last.position, last.line), 1, None)
