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
from mii_serve.samplers.run import SamplerRun
from mii_serve.samplers.table import NotCompiledError, SamplerTable, compile_table
from mii_serve.types import GenerationParams

MAX_CACHED = 512
MAX_CACHED_OF_MANY = 128
"""Of runs that are one of many (`SamplerRun.is_one_of_many`), which callers can name any number of: in a cache of their own."""

MAX_COMPILED_OF_MANY = 100
"""Steps of such a run that is compiled, which takes 3 ms a step at most; a longer one is stepped by objects."""


@dataclass(frozen=True, slots=True)
class Uncompiled:
    """A sampler whose every sample needs a scheduler object."""

    num_calls: int
    reason: str


Key = tuple[SamplerRun, bool]


class Samplings:
    """Finds out how to step each run of a sampler, once. Safe to use from several threads."""

    def __init__(self, schedulers: ModelSchedulers, *, has_blending: bool = True) -> None:
        """Without blending, the latents of samples with a mask are left alone between the calls."""
        self._schedulers = schedulers
        self._has_blending = has_blending
        self._cache: OrderedDict[Key, SamplerTable | Uncompiled] = OrderedDict()
        self._cache_of_many: OrderedDict[Key, SamplerTable | Uncompiled] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, run: SamplerRun, *, is_blended: bool = False) -> SamplerTable | Uncompiled:
        """How to step it; `is_blended` where the latents are changed between the calls.

        Raises:
            InvalidRequestError: it cannot be done with this model.
        """
        found = self._known(run, is_blended)
        if found is not None:
            return found
        try:
            if run.is_one_of_many and run.num_inference_steps > MAX_COMPILED_OF_MANY:
                raise NotCompiledError("its many steps, or its eta, are a request's own")
            found = compile_table(self._schedulers, run, is_blended=is_blended)
        except NotCompiledError as error:
            found = Uncompiled(try_scheduler(self._schedulers, run), str(error))
        cache, most = (self._cache_of_many, MAX_CACHED_OF_MANY) if run.is_one_of_many else (self._cache, MAX_CACHED)
        with self._lock:
            cache[run, is_blended] = found
            while len(cache) > most:
                cache.popitem(last=False)
        return found

    def of_request(self, params: GenerationParams) -> SamplerTable | Uncompiled:
        """How to step the samples of a request.

        Raises:
            InvalidRequestError: it cannot be done with this model.
        """
        return self.of(SamplerRun.of(params), is_blended=self._is_blended(params))

    def table_of(self, params: GenerationParams) -> SamplerTable | None:
        """The table of a request that was found possible; None where an object has to step it.

        Of a run that is one of many, only a table that is still known: it is compiled while the request is checked, and never
        in the thread that steps.
        """
        run, is_blended = SamplerRun.of(params), self._is_blended(params)
        found = self._known(run, is_blended) if run.is_one_of_many else self.of(run, is_blended=is_blended)
        return found if isinstance(found, SamplerTable) else None

    def _is_blended(self, params: GenerationParams) -> bool:
        return params.has_mask and self._has_blending

    def is_compiled(self, params: GenerationParams) -> bool:
        """Whether there is a table for a request; False as well where it cannot be done at all."""
        try:
            return self.table_of(params) is not None
        except InvalidRequestError:
            return False

    def _known(self, run: SamplerRun, is_blended: bool) -> SamplerTable | Uncompiled | None:
        cache, key = self._cache_of_many if run.is_one_of_many else self._cache, (run, is_blended)
        with self._lock:
            if key in cache:
                cache.move_to_end(key)
            return cache.get(key)
