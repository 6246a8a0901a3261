"""`mii_serve evaluate`: makes prompts at several guidance scales as one batch job, and measures the pictures."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mii_serve.batch.check import InputRefusedError
from mii_serve.batch.inputs import STDIN, InputFile, find_files
from mii_serve.batch.job import only_check
from mii_serve.batch.journal import Journal
from mii_serve.batch.output import JOURNAL, MANIFEST, check_apart
from mii_serve.batch.settings import JobSettings, check_unchanged
from mii_serve.cli import batch
from mii_serve.cli.exits import ExitCode, say
from mii_serve.errors import InvalidRequestError, ModelError
from mii_serve.evaluate.measure import Asked, check_asked, measure
from mii_serve.evaluate.networks import chosen_device
from mii_serve.evaluate.pictures import lines_of, picture_of
from mii_serve.evaluate.report import to_json, to_markdown, write, write_json, write_sheet
from mii_serve.evaluate.sweep import Sweep, scales_of
from mii_serve.extras import how_to_get, is_installed
from mii_serve.types import RequestedParams, ServerInfo

if TYPE_CHECKING:
    from mii_serve.cli.connection import Connection
    from mii_serve.evaluate.grader import Grade

JOB, ROWS, SETTINGS, FEATURES = "job", "rows.jsonl", "evaluation.json", "features"
REPORT_JSON, REPORT, PLOT, SHEET = "report.json", "report.md", "pareto.svg", "sheet.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateFlags:
    """What the command line says of an evaluation, beside the server and the parameters of all rows."""

    given: Path
    output: Path
    guidance: str
    seed: int
    reference: Path | None
    checker: str | None
    inception: Path | None
    clip: Path | None
    grader: str | None
    device: str
    max_in_flight: int | None
    max_stall: float
    retry_failed: bool


def run(flags: EvaluateFlags, defaults: Mapping[str, Any], connection: Connection | None, own: Mapping[str, Any]) -> int:
    """Make the pictures, measure them, and return the exit code.

    Raises:
        InvalidRequestError: the prompts, the folder or an option cannot be used.
        ConfigError: the evaluation cannot be continued like this.
    """
    sweep = Sweep(scales=scales_of(flags.guidance), seed=flags.seed)
    if flags.given == STDIN:
        raise InvalidRequestError("PROMPTS", "must be a file or a folder")
    files = find_files(flags.given)
    check_apart(flags.given, flags.output)
    grade = _grader(flags)
    settings = JobSettings(defaults=defaults, seed=flags.seed)
    with batch.connected(connection, own) as target, batch.findings_shown():
        info = batch.server_info(target, flags.max_stall)
        asked = _asked(flags, sweep.scales, info.model if connection is not None else str(own.get("model", "demo")))
        _check_prompts(flags, sweep, settings, info)
        _begin(flags, sweep, files)
        code = batch.make_pictures(_job_flags(flags), flags.output / JOB, settings, target, info)
    if code not in (ExitCode.OK, batch.SOME_FAILED):
        return code
    say("measuring the pictures")
    _report(flags, asked, grade, settings)
    return code


def _grader(flags: EvaluateFlags) -> Grade | None:
    if flags.grader is None:
        return None
    from mii_serve.evaluate.grader import load_grader

    return load_grader(flags.grader)


def _asked(flags: EvaluateFlags, scales: Sequence[float], model: str) -> Asked:
    asked = Asked(
        scales=scales,
        checker=flags.checker or model,
        reference=flags.reference,
        inception=flags.inception,
        clip=flags.clip,
        grader=flags.grader,
        device=chosen_device(flags.device),
    )
    try:
        check_asked(asked)
    except ModelError as error:
        raise InvalidRequestError("--checker", f"names a model whose safety checker cannot be used: {error}") from error
    return asked


def _check_prompts(flags: EvaluateFlags, sweep: Sweep, settings: JobSettings, info: ServerInfo) -> None:
    """Check the prompts as they were given: the errors of the job would name its own rows."""
    for scale in sweep.scales:
        try:
            info.capabilities.resolve(RequestedParams(prompt="a", guidance_scale=scale), fallback_seed=0)
        except InvalidRequestError as error:
            raise InvalidRequestError("--guidance", error.rule, f"{scale:g}") from None
    with tempfile.TemporaryDirectory(prefix="mii_serve-check-") as folder:
        journal = Journal(Path(folder) / JOURNAL)
        try:
            _, findings = only_check(flags.given, journal, settings, info.capabilities)
        finally:
            journal.close()
    if findings.num_problems:
        raise InputRefusedError(findings)


def _begin(flags: EvaluateFlags, sweep: Sweep, files: Sequence[InputFile]) -> None:
    folder, place = flags.output, flags.output / SETTINGS
    now = {"guidance": list(sweep.scales), "seed": sweep.seed}
    if place.exists():
        check_unchanged(json.loads(place.read_text()), now)
    elif folder.is_dir() and any(folder.iterdir()):
        raise InvalidRequestError("-o", f"{folder} is not empty, and no evaluation was begun in it")
    folder.mkdir(parents=True, exist_ok=True)
    sweep.write(files, folder / ROWS)
    write_json(place, now)


def _job_flags(flags: EvaluateFlags) -> batch.BatchFlags:
    return batch.BatchFlags(
        given=flags.output / ROWS,
        output=flags.output / JOB,
        max_in_flight=flags.max_in_flight,
        max_errors=None,
        max_stall_s=flags.max_stall,
        retry_failed=flags.retry_failed,
        only_check=False,
        is_json=False,
    )


def _report(flags: EvaluateFlags, asked: Asked, grade: Grade | None, settings: JobSettings) -> None:
    folder, job = flags.output, flags.output / JOB
    measured = measure(job, folder / FEATURES, asked, grade, on_progress=say)
    manifest = json.loads((job / MANIFEST).read_text())
    about = {name: manifest[name] for name in ("model", "model_revision", "engine", "dtype", "mii_serve", "begun", "written")}
    chosen = {"seed": settings.seed, **settings.defaults, **_commons(job)}
    report = to_json({**about, "settings": chosen}, measured)
    plot = _plot(folder, report)
    pictures = [picture_of(line, job, len(asked.scales)) for line in lines_of(job)]
    if pictures:
        write_sheet(folder / SHEET, pictures, asked.scales)
    write_json(folder / REPORT_JSON, report)
    write(folder / REPORT, to_markdown(report, plot, SHEET if pictures else None))
    print(folder / REPORT)


def _commons(job: Path) -> dict[str, Any]:
    """Steps, sampler and size of the pictures, where all have the same."""
    found: dict[str, set[Any]] = {name: set() for name in ("num_inference_steps", "scheduler", "height", "width")}
    for line in lines_of(job):
        for name, values in found.items():
            values.add(line.get(name))
    return {name: next(iter(values)) for name, values in found.items() if len(values) == 1}


def _plot(folder: Path, report: Mapping[str, Any]) -> str | None:
    if not is_installed("matplotlib"):
        say(f"no {PLOT}: {how_to_get('bench')}")
        return None
    from mii_serve.evaluate.plot import pareto

    if (svg := pareto(report)) is None:
        return None
    write(folder / PLOT, svg)
    return PLOT
