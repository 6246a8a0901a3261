"""How long torch's threads spin at a barrier on a CPU before they sleep and leave the core to other processes.

torch's CPU build computes with GNU's OpenMP, whose threads spin at every barrier for about a millisecond. On an idle machine
that is fastest. On a busy one, the spinning thread occupies the core that the thread it waits for needs, and a UNet call has
hundreds of barriers. `benchmarks/threads.py` measures what each length of spinning costs; the one here is within a few percent
of the default on an idle machine. The runtime reads it once, when torch is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

SPIN_COUNT = 2500
"""Rounds of libgomp's waiting loop, about ten microseconds in all. Its own default is 300,000."""

WAIT_VARIABLES = frozenset({"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"})
"""Where the operator has set one of these, it stays as it is."""


def wait_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to the environment of a process that is going to load torch."""
    return {} if WAIT_VARIABLES & environment.keys() else {"GOMP_SPINCOUNT": str(SPIN_COUNT)}


def wait_briefly() -> None:
    """Set it for this process and its children. To be called before torch is imported; afterwards only children notice."""
    os.environ.update(wait_settings(os.environ))
