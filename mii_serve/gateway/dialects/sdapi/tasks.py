"""What runs for whom, for `progress`, `interrupt` and `skip`.

That API has one user. Here a caller sees and ends only what is their own: of their API key or, on a server without keys, of
their address (`CallContext.client`). `force_task_id` of a request, `id_task` of these calls, picks one among them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mii_serve.gateway.generation import to_base64
from mii_serve.types import Event, ImageReady, Preview, Restarted, Step

IDLE_STATE: dict[str, Any] = {
    "skipped": False,
    "interrupted": False,
    "stopping_generation": False,
    "job": "",
    "job_count": 0,
    "job_timestamp": "0",
    "job_no": 0,
    "sampling_step": 0,
    "sampling_steps": 0,
}
LEAST_PROGRESS = 0.01
"""Of a call that runs; 0 means that nothing does."""


@dataclass(slots=True, kw_only=True)
class Task:
    """One running call. `num_steps` are the UNet calls of an image, as they become known."""

    owner: str
    id: str
    job: str
    num_images: int
    batch_size: int
    num_steps: int
    timestamp: str = field(default_factory=lambda: time.strftime("%Y%m%d%H%M%S"))
    started_at: float = field(default_factory=time.monotonic)
    interrupted: asyncio.Event = field(default_factory=asyncio.Event)
    preview: bytes | None = None
    finished: set[int] = field(default_factory=set)
    steps: dict[int, int] = field(default_factory=dict)
    left_s: dict[int, float] = field(default_factory=dict)

    def add(self, event: Event, offset: int) -> None:
        """Take notice of an event of the request whose first image is the call's image `offset`."""
        match event:
            case Step():
                self.num_steps = event.num_steps
                self.steps[offset + event.image_index] = event.step
                if event.estimated_left_s is not None:
                    self.left_s[offset + event.image_index] = event.estimated_left_s
            case Preview():
                self.preview = event.encoded
            case Restarted():
                for index in event.image_indexes:
                    self.steps.pop(offset + index, None)
            case ImageReady():
                self.finished.add(offset + event.image_index)
            case _:
                pass

    @property
    def progress(self) -> float:
        """From `LEAST_PROGRESS` to 1."""
        done = sum(self.num_steps if i in self.finished else self.steps.get(i, 0) for i in range(self.num_images))
        return min(1.0, max(LEAST_PROGRESS, done / (self.num_images * self.num_steps)))

    @property
    def eta_s(self) -> float:
        """Seconds that are left: the engine's estimate, or by the time that was needed so far."""
        left = [seconds for index, seconds in self.left_s.items() if index not in self.finished]
        if left and len(self.steps) == self.num_images:
            return max(left)
        return (time.monotonic() - self.started_at) * (1 / self.progress - 1)

    def to_json(self, *, has_image: bool) -> dict[str, Any]:
        """The answer to `GET /sdapi/v1/progress`."""
        unfinished = [self.steps.get(i, 0) for i in range(self.num_images) if i not in self.finished]
        state = {
            **IDLE_STATE,
            "interrupted": self.interrupted.is_set(),
            "job": self.job,
            "job_count": -(-self.num_images // self.batch_size),
            "job_timestamp": self.timestamp,
            "job_no": len(self.finished) // self.batch_size,
            "sampling_step": min(unfinished, default=self.num_steps),
            "sampling_steps": self.num_steps,
        }
        image = to_base64(self.preview) if has_image and self.preview is not None else None
        return {
            "progress": self.progress,
            "eta_relative": self.eta_s,
            "state": state,
            "current_image": image,
            "textinfo": None,
        }


def idle_to_json() -> dict[str, Any]:
    """What `progress` says to a caller for whom nothing runs."""
    return {"progress": 0.0, "eta_relative": 0.0, "state": IDLE_STATE, "current_image": None, "textinfo": None}


class Tasks:
    """The running calls, in the order in which they came. There are no more than the server's calls at once."""

    def __init__(self) -> None:
        self._running: dict[int, Task] = {}

    @contextlib.contextmanager
    def running(self, task: Task) -> Iterator[Task]:
        """While the block runs, the task can be seen and interrupted."""
        self._running[id(task)] = task
        try:
            yield task
        finally:
            del self._running[id(task)]

    def of(self, owner: str, task_id: str | None = None) -> list[Task]:
        """The tasks of this caller; with an id only those that have it."""
        own = (task for task in self._running.values() if task.owner == owner)
        return [task for task in own if task_id is None or task.id == task_id]
