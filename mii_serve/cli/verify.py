"""`mii_serve verify`: compares the images of an engine with those of the FP32 reference."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mii_serve import __version__
from mii_serve.cli.exits import ExitCode, say
from mii_serve.cli.files import check_output, check_place, write_all
from mii_serve.logs import configure_logs

if TYPE_CHECKING:
    from mii_serve.verify.report import Report


def run(
    flags: dict[str, Any], file: Path | None, *, report_file: Path | None, picture_file: Path | None, log_level: str
) -> int:
    """Verify the configured engine, print the table, write what was asked for and return the exit code.

    Raises:
        ConfigError, ModelError: as `mii_serve deploy` would.
        EngineError: the reference failed, or the engine did while it was started.
    """
    image_format = None if picture_file is None else check_output(picture_file, "picture")
    if report_file is not None:
        check_place(report_file, "json")
    from mii_serve.config import DeployConfig

    config = DeployConfig.load(flags, file)
    configure_logs(log_level, "text")
    say(f"mii_serve {__version__}: verifying {config.model}; the reference runs first, then the engine")
    from mii_serve.models.deferred import import_for_drawing

    import_for_drawing("mii_serve.engine.factory")
    from mii_serve.verify.runs import verify_once

    report = verify_once(config)
    for line in _heading(report):
        print(line)
    for line in report.lines():
        print(line)
    print(report.verdict)
    if report_file is not None:
        write_all([report_file], [json.dumps(report.to_json(), indent=1, allow_nan=False).encode() + b"\n"])
    if picture_file is not None and image_format is not None:
        from mii_serve.verify.sheet import sheet

        write_all([picture_file], [sheet(report.pictures, image_format)])
        if not report.pictures:
            say(f"warning: {picture_file} is empty: the engine failed before it had made a batch")
    return ExitCode.OK if report.is_passed else ExitCode.FAILED


def _heading(report: Report) -> Iterator[str]:
    engine, reference = report.engine, report.reference
    yield f"model      {engine.model} {engine.model_revision}"
    yield f"engine     {engine.engine} {engine.dtype} on {engine.device}"
    yield f"reference  {reference.engine} {reference.dtype} on {reference.device}"
    for stage, bounds in report.limits.items():
        yield f"limits     {stage}: {bounds}"
    yield f"           {report.limits_measured}"
    yield ""
