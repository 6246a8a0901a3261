"""Draws the pictures of a set of requests as a replica does: the real scheduler plans the turns."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mii_serve.engine import Engine
from mii_serve.engine.warmup import input_image_of
from mii_serve.scheduler import Scheduler
from mii_serve.types import Picture, Request
from mii_serve.verify.cases import PictureCase

TURNS_BETWEEN_ARRIVALS = 2
TURN_S = 1.0
"""The duration of a turn as the scheduler gets it, which only estimates with it."""


def draw(engine: Engine, cases: Sequence[PictureCase]) -> dict[str, Picture]:
    """Draw the requests together, as many at once as the engine holds, each a few turns after the one before.

    Raises:
        MiiServeError: the engine failed, or one image did.
    """
    scheduler = Scheduler(engine.capacity, max_waiting_samples=2**16, max_waiting_s=math.inf)
    names, pictures, turn = {case.name: case.picture_names for case in cases}, {}, 0
    to_come = list(reversed(cases))
    while to_come or scheduler.num_running or scheduler.num_waiting:
        if to_come and turn % TURNS_BETWEEN_ARRIVALS == 0:
            case = to_come.pop()
            request = Request(
                id=case.name,
                params=case.params,
                num_calls=engine.check(case.params),
                input_image=input_image_of(case.params),
            )
            scheduler.add(request, now=turn * TURN_S)
        turn += 1
        if (plan := scheduler.plan()) is None:
            continue
        progress = engine.run(plan)
        scheduler.advance(progress, TURN_S)
        for one in progress:
            if one.error is not None:
                raise one.error
            if one.picture is not None:
                pictures[names[one.id.request_id][one.id.image_index]] = one.picture
    return pictures
