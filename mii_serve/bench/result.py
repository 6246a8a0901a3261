"""A run as one JSON object: what was asked of whom, the figures, the verdict on the pictures, and every request."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mii_serve.bench.check import Verdict
from mii_serve.bench.spread import by_name, differences, spread
from mii_serve.bench.summary import summary
from mii_serve.bench.values import Record
from mii_serve.errors import ConfigError

FORMAT = "mii_serve bench 1"
COLUMNS = tuple(one.name for one in fields(Record))


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """`about` are the circumstances, `settings` what the load was, `server` what the server said of itself before it."""

    about: Mapping[str, Any]
    settings: Mapping[str, Any]
    server: Mapping[str, Any]
    summary: Mapping[str, Any]
    observed: Mapping[str, Any]
    check: Mapping[str, Any]
    examples: Mapping[str, str]
    records: tuple[Record, ...] = field(repr=False)

    @property
    def is_rejected(self) -> bool:
        """The pictures are wrong, so that the figures are worth nothing."""
        return self.check.get("is_ok") is False

    @property
    def target_s(self) -> float | None:
        target: float | None = self.settings.get("target_s")
        return target

    def to_json(self) -> str:
        written = {
            name: getattr(self, name) for name in ("about", "settings", "server", "summary", "observed", "check", "examples")
        }
        rows = [[getattr(record, column) for column in COLUMNS] for record in self.records]
        # Strict JSON: a figure that is not finite says so by being null.
        text = json.dumps(_finite({"format": FORMAT, **written}), indent=1, allow_nan=False)
        lines = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in rows)
        return f'{text[:-2]},\n "columns": {json.dumps(COLUMNS)},\n "requests": [\n{lines}\n ]\n}}\n'


def make(
    *,
    about: Mapping[str, Any],
    settings: Mapping[str, Any],
    server: Mapping[str, Any],
    records: Sequence[Record],
    observed: Mapping[str, Any],
    verdict: Verdict,
    examples: Mapping[str, str],
) -> Result:
    target_s = settings.get("target_s")
    figures = summary(records, target_s=target_s)
    figures["intervals"] = spread(records, target_s=target_s).intervals()
    return Result(
        about=about,
        settings=settings,
        server=server,
        summary=_finite(figures),
        observed=_finite(dict(observed)),
        check=_finite({"is_ok": verdict.is_ok, **asdict(verdict)}),
        examples=examples,
        records=tuple(sorted(records, key=lambda record: record.intended_s)),
    )


def read(file: Path) -> Result:
    """Read what `Result.to_json` wrote.

    Raises:
        ConfigError: the file is not one.
    """
    try:
        loaded = json.loads(file.read_text())
        if loaded["format"] != FORMAT or tuple(loaded["columns"]) != COLUMNS:
            raise ConfigError(str(file), f"is not of this version of mii_serve bench: {loaded['format']}")
        records = tuple(Record(**dict(zip(COLUMNS, row, strict=True))) for row in loaded["requests"])
        parts = {name: loaded[name] for name in ("about", "settings", "server", "summary", "observed", "check", "examples")}
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(str(file), f"is no result of mii_serve bench: {type(error).__name__}: {error}") from None
    return Result(records=records, **parts)


COMPARABLE = ("protocol", "loop", "mix", "seed", "preview_every", "target_s")
"""Settings that make a difference to the figures; the order is that of the warnings."""


def compare(first: Result, second: Result) -> dict[str, Any]:
    """The differences between two runs, and what of their settings differs, which may be why."""
    unlike = [
        f"{name}: {first.settings.get(name)!r} and {second.settings.get(name)!r}"
        for name in COMPARABLE
        if first.settings.get(name) != second.settings.get(name)
    ]
    unlike += [
        f"{name}: {first.server.get(name)!r} and {second.server.get(name)!r}"
        for name in ("model_revision", "engine", "dtype", "device")
        if first.server.get(name) != second.server.get(name)
    ]
    if first.about.get("device") != second.about.get("device"):
        unlike.append(f"machine: {first.about.get('device')!r} and {second.about.get('device')!r}")
    target_s = first.target_s if first.target_s == second.target_s else None
    found = differences(
        first.records, second.records, target_s=target_s, figures=(by_name(dict(first.summary)), by_name(dict(second.summary)))
    )
    return {
        "unlike": unlike,
        "rejected": [name for name, run in (("first", first), ("second", second)) if run.is_rejected],
        "unchecked": [name for name, run in (("first", first), ("second", second)) if run.check.get("is_ok") is None],
        "differences": [_finite({**asdict(one), "verdict": one.verdict}) for one in found],
    }


def _finite(value: Any) -> Any:
    """The same with None for every number that is not finite, and floats short enough to read."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
