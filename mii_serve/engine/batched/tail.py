"""Decodes pictures and encodes images beside the turns, so that no sample's next step waits for more than one batch of them.

On CUDA a thread with a stream of its own decodes, while the turns go on on theirs. On a CPU the same cores compute both, and a
second thread that computes would halve the speed of either (see `Engine`): there the parts that compute run in the engine's
thread between two turns, at most one batch of each part, and only the others run in a thread of their own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import torch

from mii_serve.engine.batched.decoding import Decoding

Computed = TypeVar("Computed")


class Tail:
    """All methods are for the engine's thread; `on_ready` is called in the other one when `has_ready` has become true."""

    def __init__(self, device: torch.device) -> None:
        self.on_ready: Callable[[], None] = lambda: None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._num_begun = self._num_ended = 0
        self._arrived: SimpleQueue[tuple[Decoding, BaseException | None]] = SimpleQueue()
        self._ready: deque[tuple[Decoding, BaseException | None]] = deque()

    def add(self, decoding: Decoding) -> None:
        """Begin to decode; the tensors it has are not written to any more."""
        self._num_begun += 1
        if self._stream is None:
            self._run_here(decoding)
            return
        computed = torch.cuda.Event()
        computed.record()
        for tensor in decoding.tensors:
            tensor.record_stream(self._stream)
        self._submit(decoding, self._run_on_stream, decoding, computed)

    @property
    def has_stream(self) -> bool:
        """Whether it computes beside the turns."""
        return self._stream is not None

    def compute(self, what: Callable[[], Computed]) -> Computed:
        """What this returns, computed among the batches where there is a stream, and at once where not. From any thread if
        there is a stream; what is on the device has to be waited for inside.
        """
        if self._stream is None:
            return what()

        def on_stream() -> Computed:
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                return what()

        return self._worker.submit(on_stream).result()

    @property
    def num_pending(self) -> int:
        """Batches that were added and are not finished."""
        return self._num_begun - self._num_ended

    def has_ready(self) -> bool:
        """Whether `take` has something to do."""
        return bool(self._ready) or not self._arrived.empty()

    def take(self) -> list[Decoding]:
        """Those that are finished, in the order they were added; goes on with one of them if it needs this thread."""
        while not self._arrived.empty():
            self._ready.append(self._arrived.get())
        finished: list[Decoding] = []
        has_computed = False
        while self._ready:
            decoding, error = self._ready[0]
            if error is not None:
                raise error
            if decoding.next_place is None:
                finished.append(decoding)
            elif has_computed:
                break
            else:
                has_computed = True
                self._run_here(decoding)
            self._ready.popleft()
        self._num_ended += len(finished)
        return finished

    def drain(self) -> list[Decoding]:
        """All that were added, finished."""
        finished: list[Decoding] = []
        while self.num_pending:
            if not self.has_ready():
                self._ready.append(self._arrived.get())
            finished += self.take()
        return finished

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _run_here(self, decoding: Decoding) -> None:
        """The next part, which computes; then hand over."""
        decoding.run_part()
        if decoding.next_place == "host":
            self._submit(decoding, _run_part, decoding)
        else:
            self._ready.append((decoding, None))

    def _submit(self, decoding: Decoding, run: Callable[..., None], *arguments: object) -> None:
        self._worker.submit(run, *arguments).add_done_callback(lambda done: self._hand_over(decoding, done))

    def _hand_over(self, decoding: Decoding, done: Future[None]) -> None:
        if not done.cancelled():
            self._arrived.put((decoding, done.exception()))
            self.on_ready()

    @torch.inference_mode()
    def _run_on_stream(self, decoding: Decoding, computed: torch.cuda.Event) -> None:
        with torch.cuda.stream(self._stream):
            computed.wait()
            decoding.finish()


@torch.inference_mode()
def _run_part(decoding: Decoding) -> None:
    decoding.run_part()
