"""How a sample is stepped: by a compiled table where its scheduler is linear, else by a scheduler object of its own.

Both make the same number of calls with the same noise. An object costs the host a few small operations a call and keeps
no other sample from the batch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from mii_serve.errors import InvalidRequestError
from mii_serve.samplers.build import ModelSchedulers, try_scheduler
from mii_serve.samplers.table import NotCompiledError, SamplerTable, compile_table
from mii_serve.types import GenerationParams

MAX_CACHED = 512


@dataclass(frozen=True, slots=True)
class Uncompiled:
    """A sampler whose every sample needs a scheduler object."""

    num_calls: int
    reason: str


class Samplings:
    """Finds out how to step each (sampler, number of steps), once. Safe to use from several threads."""

    def __init__(self, schedulers: ModelSchedulers, *, has_blending: bool = True) -> None:
        """Without blending, the latents of samples with a mask are left alone between the calls."""
        self._schedulers = schedulers
        self._has_blending = has_blending
        self._cache: OrderedDict[tuple[str, int, int, bool], SamplerTable | Uncompiled] = OrderedDict()
        self._lock = threading.Lock()

    def of(
        self, sampler: str, num_inference_steps: int, num_skipped_steps: int = 0, *, is_blended: bool = False
    ) -> SamplerTable | Uncompiled:
        """How to step it without the first of its steps; `is_blended` where the latents are changed between the calls.

        Raises:
            InvalidRequestError: it cannot be done with this model.
        """
        key = sampler, num_inference_steps, num_skipped_steps, is_blended
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
        found: SamplerTable | Uncompiled
        try:
            found = compile_table(self._schedulers, *key[:3], is_blended=is_blended)
        except NotCompiledError as error:
            found = Uncompiled(try_scheduler(self._schedulers, *key[:3]), str(error))
        with self._lock:
            self._cache[key] = found
            while len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)
        return found

    def of_request(self, params: GenerationParams) -> SamplerTable | Uncompiled:
        """How to step the samples of a request.

        Raises:
            InvalidRequestError: it cannot be done with this model.
        """
        is_blended = params.has_mask and self._has_blending
        return self.of(params.scheduler, params.num_inference_steps, params.num_skipped_steps, is_blended=is_blended)

    def is_compiled(self, params: GenerationParams) -> bool:
        """Whether there is a table for a request; False as well where it cannot be done at all."""
        try:
            return isinstance(self.of_request(params), SamplerTable)
        except InvalidRequestError:
            return False
