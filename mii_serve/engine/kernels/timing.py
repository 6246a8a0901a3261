"""Times a call on a CUDA device. **This has not run on a GPU yet.**

The calls are captured as a graph and replayed, as turns are: launched one by one, small kernels take as long as the host takes
to launch them, and the way with the shortest launch would seem the fastest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

NUM_CALLS = 10
NUM_REPLAYS = 3


def time_ms(call: Callable[[], object], num_calls: int = NUM_CALLS) -> float:
    """The least mean of a few replays of so many calls, after calls that compile, choose algorithms and allocate.

    What cannot be captured is launched call by call.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    run = _captured(call, num_calls, stream) or _one_by_one(call, num_calls)
    run()
    found = []
    for _ in range(NUM_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / num_calls)
    return min(found)


def _captured(call: Callable[[], object], num_calls: int, stream: torch.cuda.Stream) -> Callable[[], None] | None:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(num_calls):
                call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as failure:
        logger.info("a call is timed without a graph: %s", str(failure).splitlines()[0])
        return None
    return graph.replay


def _one_by_one(call: Callable[[], object], num_calls: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(num_calls):
            call()

    return run
