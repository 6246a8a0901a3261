"""How many replicas there are to be: as many as bring the seconds of accepted work of each down to a target.

Ray's controller runs a copy of this module, so it imports nothing of ours. Bounds and delays are Ray's (`min_replicas`,
`max_replicas`, `upscale_delay_s`, `downscale_delay_s`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

METRIC = "queued_work_s"
"""What each replica reports, by this name."""


class Context(Protocol):
    """What is read of Ray's `AutoscalingContext`."""

    @property
    def aggregated_metrics(self) -> Mapping[str, Mapping[Any, float]] | None: ...


def num_replicas(queued_s: Iterable[float], target_s: float) -> int:
    """At least one: an idle replica keeps no client waiting for a start."""
    return max(1, math.ceil(sum(queued_s) / target_s))


class QueuedWork:
    """Ray's policy: an object it calls at each of its turns."""

    def __init__(self, target_s: float) -> None:
        self._target_s = target_s

    def __call__(self, context: Context) -> tuple[int, dict[str, Any]]:
        queued_s = (context.aggregated_metrics or {}).get(METRIC, {})
        return num_replicas(queued_s.values(), self._target_s), {}
