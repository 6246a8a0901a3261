"""A job in its output folder, from the first look at the input to the index: `open_job` begins it or takes it up again."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from mii_serve.batch.check import Findings, InputCheck, InputRefusedError
from mii_serve.batch.inputs import STDIN, InputFile, find_files, keep_stdin
from mii_serve.batch.journal import CLEARED, Counts, Journal
from mii_serve.batch.output import ERRORS, INDEX, JOURNAL, PARQUET_INDEX, PARTS, STDIN_COPY, OutputFolder, check_apart
from mii_serve.batch.report import IndexFormat, Report
from mii_serve.batch.rows import Row
from mii_serve.batch.runner import End, Ending
from mii_serve.batch.settings import JobSettings, Maker, check_defaults, check_maker, check_unchanged
from mii_serve.batch.shards import Shards
from mii_serve.errors import InvalidRequestError
from mii_serve.types import Capabilities, ServerInfo


@dataclass(slots=True)
class Job:
    """An open job: its journal is held until the end of `open_job`."""

    journal: Journal
    output: OutputFolder
    inputs: list[InputFile]
    settings: JobSettings
    maker: Maker
    findings: Findings

    @property
    def counts(self) -> Counts:
        return self.journal.counts()

    def finish(self, end: End, index: IndexFormat = "jsonl") -> None:
        """Write what describes the job: the index where all rows have ended, the manifest in any case."""
        report = Report(self.journal, self.output, self.inputs, self.settings, self.maker)
        if end.ending is Ending.COMPLETE:
            report.write_index(index)
        report.write_manifest(end.ending.value, end.reason)


@contextlib.contextmanager
def open_job(
    given: Path,
    output: OutputFolder,
    settings: JobSettings,
    info: ServerInfo,
    *,
    max_errors: int | None = None,
    retry_failed: bool = False,
    restart: bool = False,
    check_row: Callable[[Row], None] = lambda _: None,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Iterator[Job]:
    """Check the input and begin a job, or take up the one of this folder where it ended.

    With `restart`, a job of this folder is removed and begun anew, if the input can be used.

    Raises:
        InputRefusedError: rows of the input are wrong, more than `max_errors`.
        InvalidRequestError: the input or the folder cannot be used.
        ConfigError: another process works on the job, or it was begun with something else.
    """
    if given != STDIN:
        find_files(given)
        check_apart(given, output.path)
    is_new = not output.path.exists()
    output.prepare()
    journal = Journal(output.journal_path)
    is_begun = False
    try:
        output.clear_parts()
        if restart and journal.get("settings") is not None:
            _check_first(given, output, settings, info, max_errors or 0)
            journal.clear()
        if journal.get(CLEARED):
            _remove_outputs(output, journal)
        inputs = _inputs(given, output, journal)
        maker = _begin(journal, settings, info)
        check = InputCheck(
            journal,
            settings,
            info.capabilities,
            max_errors=max_errors or 0,
            check_row=check_row,
            on_progress=on_progress,
        )
        check.run(inputs)
        is_begun = True
        _look_again(journal, output)
        if retry_failed:
            journal.reopen_failed()
        Shards(journal, output).unpack_where_open()
        if journal.has_open():
            output.remove(INDEX, PARQUET_INDEX, ERRORS)  # they are not those of all rows
        known = {file.name: file for file in inputs}
        in_order = [known[name] for name, _ in journal.inputs()]
        yield Job(journal, output, in_order, settings, maker, check.findings)
    finally:
        is_empty = not is_begun and not journal.inputs()
        journal.close()
        if is_empty:
            _remove(output, folder=is_new)


def only_check(given: Path, journal: Journal, settings: JobSettings, capabilities: Capabilities) -> tuple[int, Findings]:
    """Check an input without beginning a job. Returns the number of rows, and what is wrong.

    Raises:
        InvalidRequestError: the input cannot be used at all.
    """
    check_defaults(settings, capabilities)
    check = InputCheck(journal, settings, capabilities)
    with contextlib.suppress(InputRefusedError):
        check.run(find_files(given))
    return check.num_rows, check.findings


def _check_first(given: Path, output: OutputFolder, settings: JobSettings, info: ServerInfo, max_errors: int) -> None:
    """Raises:
    InputRefusedError: nothing could be made of the input, so that what is there must not be removed for it.
    """
    if given == STDIN:
        return  # it can be read once; the job itself finds out
    with tempfile.TemporaryDirectory(dir=output.path / PARTS, prefix="check-") as folder:
        journal = Journal(Path(folder) / JOURNAL)
        try:
            _, findings = only_check(given, journal, settings, info.capabilities)
        finally:
            journal.close()
    if findings.num_problems > max_errors:
        raise InputRefusedError(findings)


def _remove_outputs(output: OutputFolder, journal: Journal) -> None:
    """Remove the files of a job that was cleared; a process that is killed meanwhile leaves the rest to the next."""
    output.remove_all()
    output.remove(STDIN_COPY)
    journal.put(CLEARED, False)


def _inputs(given: Path, output: OutputFolder, journal: Journal) -> list[InputFile]:
    if given != STDIN:
        return find_files(given)
    copy = output.path / STDIN_COPY
    if not copy.exists():
        keep_stdin(copy)
    elif not journal.inputs():
        raise InvalidRequestError("INPUT", f"{copy} is there already")
    return [InputFile(STDIN_COPY, copy)]


def _begin(journal: Journal, settings: JobSettings, info: ServerInfo) -> Maker:
    """Note what the job is begun with, or compare it with what it was begun with."""
    check_defaults(settings, info.capabilities)
    maker = Maker.of(info)
    if (before := journal.get("settings")) is None:
        journal.put("settings", settings.to_json())
        journal.put("maker", asdict(maker))
        journal.put("begun", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))
        return maker
    check_unchanged(before, settings.to_json())
    check_maker(Maker(**journal.get("maker")), maker)
    return maker


def _look_again(journal: Journal, output: OutputFolder) -> None:
    """After an end without a last note that all is on the disk: open the rows whose pictures are not what was written."""
    damaged = []
    for n in journal.unsafe_rows():
        pictures = journal.pictures(n)
        names = [output.name_of(n, i, len(pictures)) for i in range(len(pictures))]
        if not all(output.is_intact(name, one.num_bytes, one.sha256) for name, one in zip(names, pictures, strict=True)):
            damaged.append(n)
    if damaged:
        journal.reopen(damaged)


def _remove(output: OutputFolder, *, folder: bool) -> None:
    """Remove what was made for a job that was not begun."""
    for path in (output.journal_path, *output.path.glob(f"{output.journal_path.name}-*"), output.path / STDIN_COPY):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        (output.path / "parts").rmdir()
        if folder:
            output.path.rmdir()
