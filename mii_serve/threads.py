"""How torch's threads wait for each other on a CPU: briefly awake, and asleep soon, so that whatever else runs there can.

torch's CPU build computes with GNU's OpenMP, whose threads spin at every barrier for as long as something like a millisecond.
Alone that is fastest. Beside anything else that wants the cores, the spinning thread holds the core that the awaited one needs,
and a UNet call has hundreds of barriers. `benchmarks/threads.py` measures what each length of spinning costs; the one here is
within some percent of the default on an idle machine. The runtime reads it once, when torch is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

SPIN_COUNT = 2500
"""In turns of libgomp's waiting loop, some ten microseconds in all. Its own default is 300,000."""

WAIT_VARIABLES = frozenset({"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"})
"""An operator who set one of these has decided how threads wait, and is not overruled."""


def wait_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to the environment of a process that is going to load torch."""
    return {} if WAIT_VARIABLES & environment.keys() else {"GOMP_SPINCOUNT": str(SPIN_COUNT)}


def wait_briefly() -> None:
    """Set it for this process and its children. To be called before torch is imported; afterwards only children notice."""
    os.environ.update(wait_settings(os.environ))
