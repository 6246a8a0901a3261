"""The worker of `batch_score.py`: a deployment of its own, and the pictures of one mini-batch after another.

Reads one JSON object per line, `{"files": [...], "output": FOLDER}`, and answers each with one: `{"rows": [...]}` or `{"error":
TEXT}`. All rows of a mini-batch are in flight at once. The server checks every picture before it leaves, so nothing unchecked
comes here. Pictures are kept in a folder on the node until the whole mini-batch has ended, and only then written to the output:
a mini-batch that fails leaves nothing behind, one that is run again writes the same names.

Settings are environment variables: `AZUREML_MODEL_DIR` names the model; `MII_SERVE_BATCH_PARAMETERS` is a JSON object with
parameters for rows that do not name them, and `seed`, from which the seeds of rows without one follow;
`MII_SERVE_BATCH_STALL_S` is how long the server may make nothing before a mini-batch is given up; `MII_SERVE_*` and
`CONTENT_SAFETY_*` are the server's.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from mii_serve.batch.generate import Generate, Made, by_client
from mii_serve.batch.inputs import content_of
from mii_serve.batch.readers import READERS
from mii_serve.batch.rows import Row
from mii_serve.batch.runner import FINAL, FIRST_PAUSE_S, HOPELESS, LONGEST_PAUSE_S, MAX_TRIES, TEMPORARY
from mii_serve.batch.settings import DEFAULT_NAMES, JobSettings
from mii_serve.cli.own_server import own_server
from mii_serve.client import AsyncClient
from mii_serve.config import CONTENT_SAFETY_VARIABLES
from mii_serve.errors import ConfigError, ContentBlockedError, InvalidRequestError, MiiServeError
from mii_serve.types import Capabilities, EffectiveParameters, ImageFormat, RequestedParams

BLOCKED = "Blocked By Azure AI Content Safety"
"""What the samples of Azure's catalog write instead of the name of a picture."""
MAX_IN_FLIGHT = 256
"""Of a mini-batch; more than the slots of any machine, and few enough to be held in memory."""
LOCK_TIMEOUT_S = 60.0
"""A deployment whose worker was killed takes less to give the devices back."""
DEFAULT_STALL_S = 600.0
BATCH_THRESHOLD = "1"
"""Of content safety, as in Azure's batch samples; a server's default is 2."""
CONTENT_SAFETY_PREFIX = "MII_SERVE_CONTENT_SAFETY__"
PARAMETERS_VARIABLE, STALL_VARIABLE = "MII_SERVE_BATCH_PARAMETERS", "MII_SERVE_BATCH_STALL_S"
MODEL_MARKS = ("MLmodel", "model_index.json", "mlflow_model_folder")
NAMES = uuid.UUID("6f0a3c58-2f0e-5d0b-9d6e-6b1f3f1c8d11")
"""The namespace of the pictures' names."""


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A row of an input file; `n` counts the rows of its file from 0."""

    file: Path
    n: int
    row: Row

    @property
    def key(self) -> str:
        """What its seed depends on, where it names none."""
        return self.row.id or f"{self.file.name}:{self.n}"


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that was made, as it waits for its mini-batch to end; None for one that content safety blocked."""

    staged: Path | None
    nsfw: bool | None
    record: Mapping[str, Any]


@dataclass(slots=True)
class FileOutcome:
    """What has become of the rows of a file."""

    sha256: str = ""
    made: dict[int, list[Picture]] = field(default_factory=dict)
    prompts: dict[int, str] = field(default_factory=dict)
    problems: list[dict[str, Any]] = field(default_factory=list)

    @property
    def has_failed(self) -> bool:
        return bool(self.problems) and not self.made


class MiniBatchError(Exception):
    """Nothing of the mini-batch was written; it can be run again."""


class MiniBatches:
    """Makes the pictures of mini-batches, one after another."""

    def __init__(self, generate: Generate, staging: Path, settings: JobSettings, *, stall_s: float = DEFAULT_STALL_S) -> None:
        """`staging` is a folder on this machine for pictures that wait for the end of their mini-batch."""
        self._generate = generate
        self._staging = staging
        self._settings = settings
        self._stall_s = stall_s
        self._last_success = time.monotonic()

    async def run(self, files: list[Path], output: Path) -> list[dict[str, Any]]:
        """The rows of predictions.csv, those of the first file first.

        Raises:
            MiniBatchError: no row can be made, or the server makes none.
            OSError: the output cannot be written; what was written of this mini-batch was removed.
        """
        self._last_success = time.monotonic()
        outcomes: dict[Path, FileOutcome] = {file: FileOutcome() for file in files}
        with tempfile.TemporaryDirectory(dir=self._staging) as staged:
            try:
                rows = [row for file in files for row in _rows_of(file, outcomes[file])]
                await self._make_all(rows, outcomes, Path(staged))
            except ExceptionGroup as group:
                if not isinstance(error := _first(group), MiiServeError | OSError):
                    raise
                raise MiniBatchError(f"nothing was written, and the mini-batch can be run again: {error}") from error
            for file, outcome in outcomes.items():
                _show_problems(file, outcome)
            if outcomes and all(outcome.has_failed for outcome in outcomes.values()):
                lines = [f"{file.name}:\n{outcome.problems[0]['message']}" for file, outcome in outcomes.items()]
                raise MiniBatchError("\n".join(["No input file could be processed. Record of errors by filename:", *lines]))
            return await asyncio.to_thread(_publish, outcomes, output)

    async def _make_all(self, rows: list[BatchRow], outcomes: Mapping[Path, FileOutcome], staged: Path) -> None:
        room = asyncio.Semaphore(MAX_IN_FLIGHT)

        async def make(number: int, row: BatchRow) -> None:
            outcome = outcomes[row.file]
            async with room:
                try:
                    pictures = await self._make(row, staged / str(number))
                except ContentBlockedError as error:
                    pictures = [Picture(None, None, {"error": type(error).__name__, "message": str(error)})]
                except MiiServeError as error:
                    if isinstance(error, (*TEMPORARY, *HOPELESS)):
                        raise
                    outcome.problems.append({"row": row.n, "error": type(error).__name__, "message": str(error)})
                    return
            outcome.prompts[row.n] = row.row.params.prompt or ""
            outcome.made[row.n] = pictures

        async with asyncio.TaskGroup() as tasks:
            for number, row in enumerate(rows):
                tasks.create_task(make(number, row))

    async def _make(self, row: BatchRow, staged: Path) -> list[Picture]:
        """The pictures of a row, asked for until the server has made them or refuses.

        Raises:
            MiiServeError: a temporary one when nothing was made for `stall_s`; any other one is the row's own.
        """
        asked = self._settings.requested(replace(row.row, id=row.key), row.n)
        tries, pause_s = 0, FIRST_PAUSE_S
        while True:
            try:
                made = await self._generate(asked, ImageFormat.PNG)
                self._last_success = time.monotonic()
                return await asyncio.to_thread(_stage, made, staged)
            except (*FINAL, *HOPELESS):
                raise
            except MiiServeError as error:
                tries += not isinstance(error, TEMPORARY)
                if tries >= MAX_TRIES or time.monotonic() - self._last_success >= self._stall_s:
                    raise
            await asyncio.sleep(pause_s * random.uniform(1.0, 1.25))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


# ---- files in ------------------------------------------------------------------------------------------------------


def _rows_of(file: Path, outcome: FileOutcome) -> Iterator[BatchRow]:
    """The rows of a file; what is wrong with it or with a row becomes a problem of its outcome."""
    if (reader := READERS.get(file.suffix.lower())) is None:
        accepted = ", ".join(repr(suffix) for suffix in READERS)
        text = f"File type '{file.suffix}' is not supported. Current accepted filetypes are: [{accepted}]"
        outcome.problems.append({"row": None, "error": "InvalidRequestError", "message": text})
        return
    try:
        outcome.sha256 = content_of(file).sha256
        for n, record in enumerate(reader(file).records()):
            if (problem := record.problem) is not None:
                text = f"line {problem.line}: {problem.text}"
                outcome.problems.append({"row": n, "error": "InvalidRequestError", "message": text})
            elif record.row is not None:
                yield BatchRow(file, n, record.row)
    except (OSError, InvalidRequestError) as error:
        outcome.problems.append({"row": None, "error": type(error).__name__, "message": str(error)})


def _show_problems(file: Path, outcome: FileOutcome) -> None:
    for problem in outcome.problems:
        where = file.name if problem["row"] is None else f"{file.name}, row {problem['row']}"
        sys.stderr.write(f"{where}: {problem['message']}\n")


def _first(group: ExceptionGroup[Exception]) -> Exception:
    error: Exception = group
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


# ---- pictures out --------------------------------------------------------------------------------------------------


def _stage(made: Made, folder: Path) -> list[Picture]:
    """Keep the pictures of a row, but for the blocked ones, which are kept nowhere."""
    folder.mkdir()
    pictures = []
    for i, content in enumerate(made.files):
        record = {"seed": made.seeds[i], "nsfw_content_detected": made.nsfw[i], "moderation_blocked": made.blocked[i]}
        if made.blocked[i]:
            pictures.append(Picture(None, made.nsfw[i], {**record, **_effective(made.parameters)}))
            continue
        staged = folder / f"{i}.png"
        staged.write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        pictures.append(Picture(staged, made.nsfw[i], {**record, "sha256": sha256, **_effective(made.parameters)}))
    return pictures


def _effective(parameters: EffectiveParameters) -> dict[str, Any]:
    kept = parameters.as_record()
    for name in ("prompt", "negative_prompt", "device", "seed"):
        kept.pop(name, None)
    return {name: value for name, value in kept.items() if value not in ("", {}, None)}


def _publish(outcomes: Mapping[Path, FileOutcome], output: Path) -> list[dict[str, Any]]:
    """Write the pictures of a mini-batch, over those of an earlier try; all of them or none."""
    output.mkdir(parents=True, exist_ok=True)
    rows, written = [], list[Path]()
    try:
        for file, outcome in outcomes.items():
            lines = []
            for n, pictures in sorted(outcome.made.items()):
                for i, picture in enumerate(pictures):
                    name = _name(file, outcome.sha256, n, i)
                    if picture.staged is None:
                        (output / name).unlink(missing_ok=True)  # of an earlier try, which content safety let pass
                    else:
                        written.append(output / name)
                        _copy(picture.staged, output / name)
                    shown = BLOCKED if picture.staged is None else name
                    columns = {"generated_image": shown, "nsfw_content_detected": picture.nsfw}
                    rows.append({"row": n, "prompt": outcome.prompts[n], **columns, "_azureml_filename": file.name})
                    lines.append({"row": n, "image": i, "generated_image": shown, **picture.record})
            for kind, entries in (("parameters", lines), ("errors", outcome.problems)):
                path = output / f"{kind}_{file.name}.jsonl"
                path.unlink(missing_ok=True)
                if entries:
                    written.append(path)
                    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    except OSError:
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        raise
    return rows


def _name(file: Path, sha256: str, n: int, i: int) -> str:
    """The same for the same row of the same file, on any machine and however often it is made."""
    return f"image_{uuid.uuid5(NAMES, f'{file.name} {sha256} {n} {i}')}.png"


def _copy(staged: Path, target: Path) -> None:
    half = target.with_name(f"{target.name}.part")
    try:
        shutil.copyfile(staged, half)
        half.replace(target)
    except OSError:
        with contextlib.suppress(OSError):
            half.unlink(missing_ok=True)
        raise


# ---- the process ---------------------------------------------------------------------------------------------------


def settings_of(environment: Mapping[str, str], capabilities: Capabilities) -> JobSettings:
    """The parameters of rows that do not name them.

    Raises:
        ConfigError: the variable has something else in it.
    """
    text = environment.get(PARAMETERS_VARIABLE, "").strip() or "{}"
    try:
        given = json.loads(text)
        seed = given.pop("seed", 0)
        if unknown := [name for name in given if name not in DEFAULT_NAMES]:
            raise ValueError(f"{unknown[0]} is none of {', '.join(DEFAULT_NAMES)}, seed")
        capabilities.resolve(RequestedParams(prompt="a", seed=seed, **given), fallback_seed=0)
    except (AttributeError, TypeError, ValueError, InvalidRequestError) as error:
        raise ConfigError(PARAMETERS_VARIABLE, f"must be a JSON object of parameters: {error}") from None
    return JobSettings(defaults=given, seed=seed)


def model_folder(given: Path) -> Path:
    """The folder with the model: a batch job mounts it as the one folder inside `AZUREML_MODEL_DIR`."""
    while not any((given / mark).exists() for mark in MODEL_MARKS):
        inside = list(given.iterdir()) if given.is_dir() else []
        if len(inside) != 1 or not inside[0].is_dir():
            break
        given = inside[0]
    return given


def prepare_environment() -> list[str]:
    """Set what the server is to inherit; the arguments of `mii_serve deploy`."""
    is_moderated = any(name in CONTENT_SAFETY_VARIABLES or name.startswith(CONTENT_SAFETY_PREFIX) for name in os.environ)
    if is_moderated and f"{CONTENT_SAFETY_PREFIX}THRESHOLD" not in os.environ:
        os.environ.setdefault("CONTENT_SAFETY_THRESHOLD", BATCH_THRESHOLD)
    if (given := os.environ.get("AZUREML_MODEL_DIR")) and not os.environ.get("MLFLOW_MODEL_FOLDER"):
        return [str(model_folder(Path(given)))]
    return []


async def serve(target: str, staging: Path, questions: IO[str], answers: IO[str]) -> None:
    """Answer questions until there are no more."""
    stall_s = float(os.environ.get(STALL_VARIABLE, DEFAULT_STALL_S))
    async with AsyncClient(target, max_retries=0) as client:
        settings = settings_of(os.environ, (await client.server_info()).capabilities)
        batches = MiniBatches(by_client(client), staging, settings, stall_s=stall_s)
        waiting = _lines(questions)
        _answer(answers, {"ready": True})
        while (line := await waiting.get()) is not None:
            question = json.loads(line)
            working = asyncio.create_task(batches.run([Path(file) for file in question["files"]], Path(question["output"])))
            gone = asyncio.create_task(waiting.get())  # there is no next question before this one's answer
            await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)
                return
            gone.cancel()
            try:
                rows = working.result()
            except (MiniBatchError, OSError) as error:
                _answer(answers, {"error": str(error)})
                await client.health()  # a server that is gone ends this process, and the next mini-batch starts both again
            else:
                _answer(answers, {"rows": rows})


def _answer(answers: IO[str], answer: Mapping[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _lines(questions: IO[str]) -> asyncio.Queue[str | None]:
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[str | None]()

    def read() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            for line in questions:
                loop.call_soon_threadsafe(queue.put_nowait, line)
            loop.call_soon_threadsafe(queue.put_nowait, None)

    threading.Thread(target=read, name="questions", daemon=True).start()
    return queue


@contextlib.contextmanager
def staging_folder() -> Iterator[Path]:
    """An empty folder that is this process's alone; it is also what keeps a node from having two deployments.

    Raises:
        ConfigError: another worker of this node has it.
    """
    folder = Path(tempfile.gettempdir()) / f"mii_serve-batch-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ConfigError("TMPDIR", f"{folder} belongs to another user")
    with (folder / "lock").open("w") as lock:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    rule = "must be 1: one worker makes all rows of a mini-batch at once, on all devices of its node"
                    raise ConfigError("max_concurrency_per_instance", rule) from None
                time.sleep(0.5)
        staging = folder / "staging"
        shutil.rmtree(staging, ignore_errors=True)  # of a worker that was killed
        staging.mkdir()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed is no answer
    questions = os.fdopen(os.dup(0), encoding="utf-8")
    code = 0
    try:
        with staging_folder() as staging, own_server(prepare_environment()) as target:
            asyncio.run(serve(target, staging, questions, answers))
    except Exception as error:  # noqa: BLE001 - whatever it is, the driver is to know
        traceback.print_exc()
        with contextlib.suppress(OSError):
            _answer(answers, {"error": f"{type(error).__name__}: {error}"})
        code = 1
    os._exit(code)  # the thread that reads questions may still do so


if __name__ == "__main__":
    main()
