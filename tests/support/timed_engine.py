"""The engine of replica processes that load no model, for tests of what is around them. See `deployments.deployed`."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

from fake_engine import FakeEngine

from mii_serve.types import Capabilities, EngineDescription, SampleProgress, StepPlan

TURN_S = 0.005
POISON = "poison"
"""A prompt that crashes the process."""


class TimedEngine(FakeEngine):
    """A fake whose turns take time, so that requests with many steps are there to be watched."""

    def __init__(self) -> None:
        super().__init__(max_slots=8)

    @property
    def description(self) -> EngineDescription:
        return replace(super().description, model="demo")

    @property
    def capabilities(self) -> Capabilities:
        asked = super().capabilities
        return replace(asked, schedulers={**asked.schedulers, "euler": "euler"})

    def run(self, plan: StepPlan) -> tuple[SampleProgress, ...]:
        if any(sample.params.prompt == POISON for sample in plan.joins):
            os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(TURN_S)
        made = super().run(plan)
        self.plans.clear()
        return made
