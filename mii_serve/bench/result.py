"""A run as one JSON object: the load, the server, the figures, the check of the pictures, and the record of every request."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mii_serve.bench.check import PictureCheck
from mii_serve.bench.summary import summary
from mii_serve.bench.values import Record
from mii_serve.errors import ConfigError

FORMAT = "mii_serve bench 1"
COLUMNS = tuple(one.name for one in fields(Record))


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """`about` is the circumstances, `settings` the load, `server` what the server reported of itself, `observed` what it did
    during the load.
    """

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
        """A picture is wrong, so the figures do not count."""
        return self.check.get("is_ok") is False

    @property
    def target_s(self) -> float | None:
        target: float | None = self.settings.get("target_s")
        return target

    def to_json(self) -> str:
        parts = {
            name: getattr(self, name) for name in ("about", "settings", "server", "summary", "observed", "check", "examples")
        }
        rows = [[getattr(record, column) for column in COLUMNS] for record in self.records]
        # Strict JSON has no infinity and no NaN: they become null.
        text = json.dumps(_finite({"format": FORMAT, **parts}), indent=1, allow_nan=False)
        lines = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in rows)
        return f'{text[:-2]},\n "columns": {json.dumps(COLUMNS)},\n "requests": [\n{lines}\n ]\n}}\n'


def build(
    *,
    about: Mapping[str, Any],
    settings: Mapping[str, Any],
    server: Mapping[str, Any],
    records: Sequence[Record],
    observed: Mapping[str, Any],
    check: PictureCheck,
    examples: Mapping[str, str],
) -> Result:
    """The result of a run. Confidence intervals need numpy; without it there are none."""
    target_s = settings.get("target_s")
    figures = summary(records, target_s=target_s)
    figures["intervals"] = {}
    if importlib.util.find_spec("numpy") is not None:
        from mii_serve.bench.spread import spread

        figures["intervals"] = spread(records, target_s=target_s).intervals()
    return Result(
        about=about,
        settings=settings,
        server=server,
        summary=_finite(figures),
        observed=_finite(dict(observed)),
        check=_finite({"is_ok": check.is_ok, **asdict(check)}),
        examples=examples,
        records=tuple(sorted(records, key=lambda record: record.intended_s)),
    )


def read(file: Path) -> Result:
    """Read a file that holds the text of `Result.to_json`.

    Raises:
        ConfigError: it does not.
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
"""Settings that change the figures, in the order of the warnings about them."""


def compare(first: Result, second: Result) -> dict[str, Any]:
    """The differences between the figures of two runs, and between their settings, which may be the reason. Needs numpy."""
    from mii_serve.bench.spread import by_name, differences

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
    """The same value, with None for every number that is not finite and floats rounded to six digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
