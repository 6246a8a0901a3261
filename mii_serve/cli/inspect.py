"""`mii_serve inspect`: what files say about where they come from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from mii_serve.cli.exits import ExitCode, say
from mii_serve.errors import InvalidRequestError
from mii_serve.extras import how_to_get
from mii_serve.provenance import watermark
from mii_serve.provenance.report import FileReport, report_on
from mii_serve.provenance.xmp import XmpFacts

MAX_FILE_BYTES = 256 * 1024 * 1024


def run(files: Sequence[Path], trust: Path | None, *, is_json: bool) -> int:
    """Print what each file carries, and return the exit code.

    Raises:
        InvalidRequestError: a file cannot be read, or is no image.
    """
    trusted = None if trust is None else _content(trust, "trust").decode("ascii", "replace")
    reports = {str(file): report_on(_content(file, "file"), str(file), trusted) for file in files}
    if is_json:
        print(json.dumps([{"file": name, **report.to_json()} for name, report in reports.items()], indent=1))
    else:
        for name, report in reports.items():
            print(f"{name}: {report.format} {report.width}x{report.height}, {_verdict(report)}")
            for line in _lines(report):
                print(f"  {line}")
    if any(report.is_unchecked for report in reports.values()):
        say(f"Content Credentials were not checked: {how_to_get('provenance')}")
        return ExitCode.NOT_INSTALLED
    is_good = all(report.is_marked and not report.is_invalid for report in reports.values())
    return ExitCode.OK if is_good else ExitCode.FAILED


def _content(path: Path, name: str) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InvalidRequestError(name, f"must be at most {MAX_FILE_BYTES} bytes", str(path))
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequestError(name, f"{path} cannot be read: {error.strerror}") from None


def _verdict(report: FileReport) -> str:
    if report.is_invalid:
        return "NOT VALID: it is not as it was signed" if report.credentials is None else "NOT VALID"
    return "marked as generated" if report.is_marked else "not marked as generated"


def _lines(report: FileReport) -> Iterator[str]:
    yield f"XMP                  {_xmp(report.xmp)}"
    yield f"Content Credentials  {_credentials(report)}"
    if (reading := report.watermark) is None:
        yield f"watermark            not looked for: {report.watermark_note}"
    else:
        found = f"{watermark.TEXT} found" if reading.is_found else "none"
        yield f"watermark            {found}, {reading.num_matching} of {reading.num_bits} bits match"


def _xmp(facts: XmpFacts | None) -> str:
    if facts is None:
        return "none"
    kind = (facts.digital_source_type or "no digital source type").rpartition("/")[2]
    return ", ".join((kind, *_origin(facts.model, facts.model_revision), *([facts.creator_tool] if facts.creator_tool else [])))


def _credentials(report: FileReport) -> str:
    if (found := report.credentials) is None:
        return "none" if report.credentials_problem is None else f"there, {report.credentials_problem}"
    kind = (found.digital_source_type or "no digital source type").rpartition("/")[2]
    failures = [", ".join(found.failures)] if found.failures else []
    signer = f"signed by {found.signer or 'an unnamed signer'}"
    return ", ".join((found.state, *failures, signer, kind, *_origin(found.model, found.model_revision)))


def _origin(model: str | None, revision: str | None) -> list[str]:
    return [" ".join(("model", model, revision or "")).rstrip()] if model else []
