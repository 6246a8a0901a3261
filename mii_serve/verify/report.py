"""The result of a verification: a check for each output, what failed first, as a table and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mii_serve import __version__
from mii_serve.types import EngineDescription, Picture
from mii_serve.verify.compare import Difference
from mii_serve.verify.limits import Bounds, Stage

SCHEMA = 1
"""Raised when a key of the JSON report changes its meaning or goes; new keys do not raise it."""

Batching = Literal["alone", "batched"]
"""Whether an output was computed by itself or in a batch with others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One output of the engine, compared with the reference's. `faults` are the bounds it breaks, or why there is no output."""

    stage: Stage
    case: str
    batching: Batching
    difference: Difference | None
    faults: tuple[str, ...] = ()

    @property
    def is_passed(self) -> bool:
        return not self.faults


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """`skipped` are pictures that the model's schedulers cannot make, and why. `pictures` are pairs, the reference's first."""

    engine: EngineDescription
    reference: EngineDescription
    limits: Mapping[Stage, Bounds]
    limits_measured: str
    checks: tuple[Check, ...]
    skipped: Mapping[str, str]
    pictures: Mapping[str, tuple[Picture, Picture]] = field(repr=False)

    @property
    def is_passed(self) -> bool:
        return self.first_failure is None

    @property
    def first_failure(self) -> Check | None:
        """The stages are in the order of a request, so what comes later may only pass the fault on."""
        return next((check for check in self.checks if not check.is_passed), None)

    @property
    def verdict(self) -> str:
        """One sentence."""
        engine = f"{self.engine.engine} {self.engine.dtype} on {self.engine.device}"
        if (failure := self.first_failure) is None:
            return f"{engine} is within the limits of the reference in all {len(self.checks)} checks"
        failed = sum(not check.is_passed for check in self.checks)
        if failure.stage is Stage.PIPELINE:
            reference = f"{self.reference.engine} {self.reference.dtype} on {self.reference.device}"
            what = f"the {reference} is not diffusers' own StableDiffusionPipeline ({failure.case}: {failure.faults[0]})"
            return f"{what}, so nothing can be said about {engine}; {failed} of {len(self.checks)} checks failed"
        where = f"the {failure.stage} fails first ({failure.case}, {_BATCHING[failure.batching]}: {failure.faults[0]})"
        return f"{engine} is not the reference: {where}; {failed} of {len(self.checks)} checks failed"

    def to_json(self) -> dict[str, Any]:
        """Numbers that JSON cannot hold are null: `psnr_db` where nothing differs, any figure where an output is not finite."""
        failure = self.first_failure
        return {
            "schema": SCHEMA,
            "mii_serve": __version__,
            "is_passed": self.is_passed,
            "first_failed_stage": None if failure is None else failure.stage.value,
            "verdict": self.verdict,
            "engine": asdict(self.engine),
            "reference": asdict(self.reference),
            "limits": {stage.value: asdict(bounds) for stage, bounds in self.limits.items()},
            "limits_measured": self.limits_measured,
            "skipped": dict(self.skipped),
            "checks": [
                {
                    "stage": check.stage.value,
                    "case": check.case,
                    "company": _JSON_BATCHING[check.batching],
                    "is_passed": check.is_passed,
                    "faults": list(check.faults),
                    "difference": None if check.difference is None else _finite(asdict(check.difference)),
                }
                for check in self.checks
            ],
        }

    def lines(self) -> Iterator[str]:
        """A table for people: of the outputs alone and in a batch, the worse."""
        worse = self._worse()
        wide = max(len(name) for name in (*(check.case for check in worse), *self.skipped))
        yield f"{'stage':<13} {'case':<{wide}} {'max':>9} {'mean':>9} {'rel. rms':>9} {'PSNR dB':>8} {'SSIM':>8}"
        for check in worse:
            result = "ok" if check.is_passed else "FAILED"
            yield f"{check.stage:<13} {check.case:<{wide}} {_figures(check.difference)}  {result}"
            for fault in check.faults:
                yield f"{'':<15} {_BATCHING[check.batching]}: {fault}"
        for name, reason in self.skipped.items():
            yield f"{Stage.PICTURES:<13} {name:<{wide}} not drawn: {reason}"

    def _worse(self) -> list[Check]:
        worse: dict[tuple[Stage, str], Check] = {}
        for check in self.checks:
            key = check.stage, check.case
            worse[key] = max(worse.get(key, check), check, key=_badness)
        return list(worse.values())


_BATCHING: Mapping[Batching, str] = {"alone": "alone", "batched": "in a batch"}
_JSON_BATCHING: Mapping[Batching, str] = {"alone": "alone", "batched": "crowd"}
"""As schema 1 has it."""


def _badness(check: Check) -> tuple[bool, float]:
    return not check.is_passed, math.inf if check.difference is None else check.difference.relative_rms


def _figures(found: Difference | None) -> str:
    if found is None:
        return " " * 47
    psnr = "" if found.psnr_db is None else "same" if found.psnr_db == math.inf else f"{found.psnr_db:.1f}"
    similar = "" if found.ssim is None else f"{found.ssim:.5f}"
    return f"{found.max:>9.3g} {found.mean:>9.2g} {found.relative_rms:>9.2g} {psnr:>8} {similar:>8}"


def _finite(figures: dict[str, float | None]) -> dict[str, float | None]:
    return {name: value if value is not None and math.isfinite(value) else None for name, value in figures.items()}
