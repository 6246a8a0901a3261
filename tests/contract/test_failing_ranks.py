"""A group that fails ends as one, and says what failed."""

from __future__ import annotations

import psutil
import pytest
from drawing import ranked_engine

from mii_serve.errors import EngineError
from mii_serve.types import SampleId, StepPlan


@pytest.mark.slow
def test_what_fails_on_every_rank_is_the_error_of_the_order_and_ends_the_group():
    engine = ranked_engine(2)
    processes = [psutil.Process(pid) for pid in engine.follower_pids]
    with pytest.raises(EngineError, match="native failed: KeyError"):
        engine.run(StepPlan(steps=(SampleId("nobody", 0),)))
    assert not any(process.is_running() for process in processes)
    engine.close()
