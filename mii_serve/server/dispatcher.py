"""Where calls become work: a request is resolved here and nowhere else, given to the router, and its events are passed back.

The edges (gRPC, MII's wire, HTTP) decode what their callers send into a `GenerationRequest` and a `CallContext`, and encode the
events that come back. Draining, idempotency and content safety apply here, once for all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import astuple, replace
from typing import Any

from mii_serve.errors import InvalidRequestError, UnavailableError
from mii_serve.metrics import FrontMetrics, together
from mii_serve.proto.metadata import IDEMPOTENCY_KEY, PROVENANCE_KEY, check_idempotency_key
from mii_serve.provenance import Origin, Provenance
from mii_serve.safety.moderation import Moderator
from mii_serve.server.call import CallContext
from mii_serve.server.idempotency import IdempotencyCache
from mii_serve.server.input_images import InputImages, files_of, pixels_of
from mii_serve.server.keys import KeyRing
from mii_serve.server.loras import Loras
from mii_serve.server.moderation import ModerationFilter
from mii_serve.server.replica_client import Loss, ReplicaAddress, ReplicaClient
from mii_serve.server.router import Router, Work
from mii_serve.types import (
    EMBEDS,
    Capabilities,
    Event,
    GenerationAnswer,
    GenerationRequest,
    ImageReady,
    LoraInfo,
    Priority,
    ReplicaInfo,
    ResolvedRequest,
    ServerInfo,
    Step,
    draw_seed,
    gather,
)

INFO_TIMEOUT_S = 10.0
METRICS_TIMEOUT_S = 2.0
"""One replica that does not answer must not cost the scrape."""


class Dispatcher:
    """Refuses everything until a replica is attached, and new work again after `drain`."""

    def __init__(
        self,
        router: Router | None = None,
        metrics: FrontMetrics | None = None,
        moderator: Moderator | None = None,
        provenance: Provenance | None = None,
    ) -> None:
        """With a `moderator`, no prompt is worked on and no image leaves that it has not found harmless.

        `provenance` is what the replicas put on their pictures, too.
        """
        self._router = router or Router()
        self.metrics = metrics or FrontMetrics()
        self._provenance = marks = provenance or Provenance()
        self.metrics.signing_expiry.set_function(lambda: marks.expires_at)
        self._moderation = None if moderator is None else ModerationFilter(moderator, self.metrics, self._provenance)
        self.grpc_port: int | None = None
        """Where this deployment answers gRPC, for code that is shown to callers; None before it listens."""
        self.metrics.replicas_ready.set_function(lambda: sum(replica.is_up for replica in self._router.replicas))
        self.metrics.requests_running.set_function(lambda: len(self._active))
        for replica in self._router.replicas:
            self.metrics.replica_restarts.labels(str(replica.index))
        self._capabilities: Capabilities | None = None
        self.loras = Loras(self._router, self._set_loras)
        self.admin_keys: KeyRing | None = None
        """Of those who may change what is served; None where it cannot be changed."""
        self._idempotency = IdempotencyCache()
        self._input_images = InputImages()
        self._is_draining = False
        self._is_stopping = False
        self._active: set[object] = set()
        self._waiting: dict[asyncio.Task[object], Priority] = {}
        """Tasks that wait for the next event of a request just now."""
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_ready(self) -> bool:
        """Whether a request that arrives now would be worked on."""
        return self._router.is_up and not self._is_draining

    @property
    def has_content_safety(self) -> bool:
        """Whether images are sent only if content safety has found them harmless."""
        return self._moderation is not None

    @property
    def capabilities(self) -> Capabilities:
        """What the model accepts and assumes.

        Raises:
            UnavailableError: no replica has described itself yet.
        """
        if self._capabilities is None:
            raise UnavailableError("the server is not ready: no replica has made its warm-up picture yet")
        return self._capabilities

    async def attach(self, address: ReplicaAddress, index: int = 0, *, num_restarts: int = 0) -> ServerInfo:
        """Give work to the replica at this address from now on; returns its description of itself."""
        replica = self._replica(index)
        info = await replica.attach(address, self.loras.prepare)
        self._capabilities = info.capabilities
        if self._moderation is not None:
            self._moderation.origin = Origin(model=info.model, model_revision=info.model_revision)
        self.metrics.replica_restarts.labels(str(index)).inc(max(0, num_restarts - replica.num_restarts))
        replica.num_restarts = num_restarts
        self._router.serve_waiting()
        return info

    async def detach(self, index: int = 0, loss: Loss | None = None) -> None:
        await self._replica(index).detach(loss or Loss(reason="the server is stopping", is_crash=False))
        self._router.serve_waiting()

    async def add(self, address: ReplicaAddress) -> ReplicaClient:
        """Attach one replica more, whose process another program supervises.

        Raises:
            grpc.aio.AioRpcError: nothing answers at the address.
        """
        replica = self._router.add()
        try:
            await self.attach(address, replica.index)
        except BaseException:
            await self.remove(replica, Loss(reason="it did not answer", is_crash=False))
            raise
        return replica

    def retire(self, replica: ReplicaClient, is_retiring: bool = True) -> None:
        """Let an added replica finish what it has, and give it nothing new; or, with False, take that back."""
        replica.is_retiring = is_retiring
        self._router.serve_waiting()

    async def remove(self, replica: ReplicaClient, loss: Loss) -> None:
        """Detach an added replica for good. What it has not finished is made again elsewhere."""
        await self._router.remove(replica, loss)

    def _set_loras(self, loras: Mapping[str, LoraInfo]) -> None:
        if self._capabilities is not None:
            self._capabilities = replace(self._capabilities, loras=loras)

    def _replica(self, index: int) -> ReplicaClient:
        return next(replica for replica in self._router.replicas if replica.index == index)

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the running ones; False when some were left at the end.

        Batch requests are not waited for: they end with an error that says that the server is stopping.
        """
        self._is_draining = True
        for task, priority in self._waiting.items():
            if priority is Priority.BATCH:
                task.cancel()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return not self._active

    def stop(self) -> None:
        """Refuse new requests, and end the running ones with an error that says that the server is stopping."""
        self._is_draining = self._is_stopping = True
        for task in self._waiting:
            task.cancel()

    def resolve(self, request: GenerationRequest) -> ResolvedRequest:
        """Fill in what the request leaves out and check every rule. `events` does this for a request that is not resolved.

        Raises:
            InvalidRequestError: naming the field and the rule.
            UnavailableError: no replica has described the model yet.
        """
        params = self.capabilities.resolve(request.params, fallback_seed=draw_seed())
        return ResolvedRequest(params=params, output=request.output, priority=request.priority)

    async def generate(self, request: GenerationRequest | ResolvedRequest, call: CallContext) -> GenerationAnswer:
        """The images of the request, all at once. Cancelling this cancels the work.

        Raises:
            MiiServeError: as `events`.
        """
        async with contextlib.aclosing(self.events(request, call, has_steps=False)) as events:
            return gather([event async for event in events])

    async def events(
        self, request: GenerationRequest | ResolvedRequest, call: CallContext, *, has_steps: bool = True
    ) -> AsyncGenerator[Event, None]:
        """All events of the request, `Done` last. Leaving the iteration early cancels the work.

        Without `has_steps` there is no `Step` among them, and without an idempotency key none is paid for.

        Raises:
            InvalidRequestError: naming the field and the rule; a `ContentBlockedError` where content safety refuses it.
            UnavailableError: not ready, draining or stopping.
            MiiServeError: the error that the request ended with.
        """
        if self._is_draining:
            raise UnavailableError("the server is draining")
        with self._counted(), self._input_images.held(files_of(request)):  # they wait for their turn to be decoded, too
            if isinstance(request, ResolvedRequest):
                resolved = request
            elif request.params.image is None:
                resolved = self.resolve(request)
            else:
                resolved = await self._input_images.resolved(self.capabilities, request, call)
            work = Work(
                request=resolved,
                call=call,
                has_steps=has_steps or call.idempotency_key is not None,  # a later call with the key may want them
            )
            call.log.add_params(work.params)
            with self._input_images.held(pixels_of(resolved)):
                async with contextlib.aclosing(self._events_of(work, request)) as events:
                    while (event := await self._next(events, work.request.priority)) is not None:
                        call.log.add_event(event)
                        if has_steps or not isinstance(event, Step):
                            yield event

    async def _next(self, events: AsyncGenerator[Event, None], priority: Priority) -> Event | None:
        """The request's next event; None after the last. Not awaited any longer once the server is stopping."""
        task = asyncio.current_task()
        if self._is_over_for(priority) or task is None:
            raise UnavailableError("the server is stopping")
        self._waiting[task] = priority
        try:
            return await anext(events, None)
        except asyncio.CancelledError:
            if not self._is_over_for(priority):
                raise
            task.uncancel()
            raise UnavailableError("the server is stopping") from None
        finally:
            del self._waiting[task]

    def _is_over_for(self, priority: Priority) -> bool:
        return self._is_stopping or (self._is_draining and priority is Priority.BATCH)

    def _events_of(self, work: Work, asked: GenerationRequest | ResolvedRequest) -> AsyncGenerator[Event, None]:
        """The events of new work; of the first call, where its idempotency key has been seen."""

        def run(resolved: ResolvedRequest) -> AsyncGenerator[Event, None]:
            given = replace(work, request=resolved)
            return (
                self._router.events(given) if self._moderation is None else self._moderation.events(given, self._router.events)
            )

        call, key = work.call, work.call.idempotency_key
        if key is None:
            return run(work.request)
        if asked.output.preview_every is not None:
            raise InvalidRequestError("output.preview_every", f"cannot go with {IDEMPOTENCY_KEY}: previews are not kept")
        owner = call.client if call.key_name is not None else ""
        fingerprint = _fingerprint(asked)
        return self._idempotency.events((owner, check_idempotency_key(key), call.part), fingerprint, work.request, run)

    def provenance_headers(self, image: ImageReady) -> dict[str, str]:
        """What marks the image carries, for protocols that also send raw pixels: those carry none but a watermark."""
        marks = self._provenance.marks(image.format, image.width, image.height)
        return {PROVENANCE_KEY: ", ".join(marks) or "none"}

    async def server_info(self) -> ServerInfo:
        """What runs here and how busy it is, of all replicas together.

        Raises:
            UnavailableError: not ready, or no replica answers.
        """
        _ = self.capabilities  # raises
        replicas = self._router.replicas
        answers = await asyncio.gather(*(replica.info(INFO_TIMEOUT_S) for replica in replicas))
        known = next((info for info in answers if info is not None), None)
        if known is None:
            raise UnavailableError("no replica answers; they are being restarted")
        return known.with_replicas(
            ReplicaInfo(
                index=replica.index,
                is_ready=info is not None,
                num_restarts=replica.num_restarts,
                activity=None if info is None else info.activity,
                devices=() if info is None else info.replicas[0].devices,
            )
            for replica, info in zip(replicas, answers, strict=True)
        )

    async def metrics_text(self, accept: str = "") -> bytes:
        """The front's metrics and those of every replica that answers, in the form that `accept` names."""
        replicas = self._router.replicas
        texts = await asyncio.gather(*(replica.metrics(METRICS_TIMEOUT_S) for replica in replicas))
        known = {replica.index: text for replica, text in zip(replicas, texts, strict=True) if text is not None}
        return together(self.metrics, known, accept)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """While the block runs, a request is active."""
        self._active.add(active := object())
        self._idle.clear()
        try:
            yield
        finally:
            self._active.remove(active)
            if not self._active:
                self._idle.set()


def _fingerprint(asked: GenerationRequest | ResolvedRequest) -> bytes:
    """The same for equal requests; images count by their digests."""
    images: tuple[bytes | None, ...] = ()
    if isinstance(asked, ResolvedRequest):
        if asked.input_image is not None:
            images = asked.input_image.rgb, asked.input_image.mask
            asked = replace(asked, input_image=None)
    elif asked.params.image is not None:
        images = asked.params.image, asked.params.mask_image
        asked = replace(asked, params=replace(asked.params, image=None, mask_image=None))
    params: Any = asked.params
    for name in EMBEDS:
        if (embeds := getattr(params, name)) is not None:
            images = (*images, embeds.data)
            params = replace(params, **{name: replace(embeds, data=b"")})
    digests = [None if image is None else hashlib.sha256(image).digest() for image in images]
    whole = astuple(params), asked.output, asked.priority, digests
    return hashlib.sha256(repr(whole).encode()).digest()
