"""Times at which requests are meant to start, in seconds since the load began: functions of a rate and a seed, or a file."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mii_serve.bench.mix import check_params
from mii_serve.errors import ConfigError

MAX_TRACE_LINES = 1_000_000


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request's time. `params` replace parameters of the mix."""

    at_s: float
    params: Mapping[str, Any] = field(default_factory=dict)


def constant(rate: float) -> Iterator[Arrival]:
    """One arrival every 1/`rate` seconds, the first at 0."""
    index = 0
    while True:
        yield Arrival(index / rate)
        index += 1


def poisson(rate: float, seed: str) -> Iterator[Arrival]:
    """A Poisson process of `rate` arrivals a second on average: many independent callers."""
    rng, at_s = random.Random(f"{seed}/arrivals"), 0.0
    while True:
        at_s += rng.expovariate(rate)
        yield Arrival(at_s)


def read_trace(file: Path, *, speed: float = 1.0) -> list[Arrival]:
    """The arrivals of a file of JSON objects, one a line: `at_s` (seconds) and optionally parameters. `speed` divides times.

    Raises:
        ConfigError: naming the line and the rule.
    """
    arrivals: list[Arrival] = []
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--trace", f"cannot read {file}: {error}") from None
    if len(lines) > MAX_TRACE_LINES:
        raise ConfigError("--trace", f"{file} has {len(lines)} lines, more than {MAX_TRACE_LINES}")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"line {number} of {file}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError("--trace", f"{where} is not JSON: {error}") from None
        if not isinstance(entry, dict):
            raise ConfigError("--trace", f"{where} must be an object")
        at_s = entry.pop("at_s", None)
        if isinstance(at_s, bool) or not isinstance(at_s, int | float) or not math.isfinite(at_s) or at_s < 0:
            raise ConfigError("--trace", f"at_s in {where} must be seconds, 0 or more, got {at_s!r}")
        if arrivals and at_s / speed < arrivals[-1].at_s:
            raise ConfigError("--trace", f"at_s in {where} is earlier than the line before")
        try:
            arrivals.append(Arrival(at_s / speed, check_params(entry)))
        except ConfigError as error:
            raise ConfigError("--trace", f"{where}: {error}") from None
    if not arrivals:
        raise ConfigError("--trace", f"{file} holds no arrivals")
    return arrivals
