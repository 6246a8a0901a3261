"""Where every request arrives, by whichever protocol: checked at the door, made by the replicas, its events passed back.

The edges (gRPC, MII's wire, HTTP) turn what their callers send into a `GenerateRequest` and a `Visit`, and what comes back into
answers of their own. Rules, limits, idempotency and draining are here, once for all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from mii_serve.errors import InvalidRequestError, UnavailableError
from mii_serve.metrics import FrontMetrics, together
from mii_serve.proto.codec import decode_request
from mii_serve.proto.interceptor import IDEMPOTENCY_KEY, check_idempotency_key
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.safety.moderation import Moderator
from mii_serve.server.answers import Answers
from mii_serve.server.guard import Guard
from mii_serve.server.ledger import Facts
from mii_serve.server.link import Loss
from mii_serve.server.router import Call, Router
from mii_serve.types import Capabilities, draw_seed

INFO_TIMEOUT_S = 10.0
METRICS_TIMEOUT_S = 2.0
"""One replica that does not answer must not cost the scrape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One request's circumstances: who asks, and how long they wait.

    `request_id` is for logs and answers; many may have the same. `client` is whose share of a busy server it takes, as
    `Request.client` is read. `deadline` is on `time.monotonic`'s clock. `key_name` is the API key it came with, None where the
    server wants none. `part` tells requests of one call with one idempotency key apart.
    """

    request_id: str
    client: str
    deadline: float | None = None
    key_name: str | None = None
    idempotency_key: str | None = None
    part: int | None = None
    facts: Facts = field(default_factory=Facts)

    def named_part(self, suffix: str) -> Visit:
        """The same for one request of several, which the log tells apart by the suffix."""
        return replace(self, request_id=f"{self.request_id}{suffix}")


class Desk:
    """Refuses everything until a replica is attached, and new work again after `drain`."""

    def __init__(
        self, router: Router | None = None, metrics: FrontMetrics | None = None, moderator: Moderator | None = None
    ) -> None:
        """With a `moderator`, no prompt is worked on and no picture leaves that it has not found harmless."""
        self._router = router or Router()
        self.metrics = metrics or FrontMetrics()
        self._guard = None if moderator is None else Guard(moderator, self.metrics)
        self.grpc_port: int | None = None
        """Where this deployment answers gRPC, for code that is shown to callers; None before it listens."""
        self.metrics.replicas_ready.set_function(lambda: sum(link.is_up for link in self._router.links))
        self.metrics.requests_running.set_function(lambda: len(self._active))
        for link in self._router.links:
            self.metrics.replica_restarts.labels(str(link.index))
        self._capabilities: Capabilities | None = None
        self._answers = Answers()
        self._is_draining = False
        self._is_stopping = False
        self._active: set[object] = set()
        self._waiting: set[asyncio.Task[object]] = set()
        """Who waits for the next event of a request just now."""
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def is_ready(self) -> bool:
        """Whether a request that arrives now would be worked on."""
        return self._router.is_up and not self._is_draining

    @property
    def capabilities(self) -> Capabilities:
        """What the model accepts and assumes.

        Raises:
            UnavailableError: no replica has told yet.
        """
        if self._capabilities is None:
            raise UnavailableError("the server is not ready: no replica has made its warm-up picture yet")
        return self._capabilities

    async def attach(self, socket: Path, index: int = 0, *, num_restarts: int = 0) -> pb.GetServerInfoResponse:
        """Give work to the replica behind this socket from now on; answer what it says of itself."""
        link = self._router.links[index]
        info, self._capabilities = await link.attach(socket)
        self.metrics.replica_restarts.labels(str(index)).inc(max(0, num_restarts - link.num_restarts))
        link.num_restarts = num_restarts
        self._router.serve_waiting()
        return info

    async def detach(self, index: int = 0, loss: Loss | None = None) -> None:
        await self._router.links[index].detach(loss or Loss(reason="the server is stopping", is_crash=False))
        self._router.serve_waiting()

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the running ones; False when some were left at the end."""
        self._is_draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        return not self._active

    def stop(self) -> None:
        """Refuse new requests, and tell the callers of the running ones that the server is stopping."""
        self._is_draining = self._is_stopping = True
        for task in self._waiting:
            task.cancel()

    async def events(self, request: pb.GenerateRequest, visit: Visit) -> AsyncGenerator[pb.GenerateEvent, None]:
        """All events of the request, `done` last. Leaving the iteration early cancels the work.

        Raises:
            InvalidRequestError: naming the field and the rule; a `ContentBlockedError` where content safety refuses it.
            UnavailableError: not ready, or draining.
            MiiServeError: what became of it.
        """
        capabilities = self.capabilities
        if self._is_draining:
            raise UnavailableError("the server is draining")
        params, output, priority = decode_request(request, capabilities, fallback_seed=draw_seed())
        call = Call(
            request_id=visit.request_id,
            client=visit.client,
            params=params,
            output=output,
            priority=priority,
            deadline=visit.deadline,
        )
        visit.facts.learn_params(params)
        with self._counted():
            async with contextlib.aclosing(self._made(call, request, visit)) as events:
                while (event := await self._next(events)) is not None:
                    visit.facts.learn_event(event)
                    event.request_id = visit.request_id  # an answer that is repeated was another call's
                    yield event

    async def _next(self, events: AsyncGenerator[pb.GenerateEvent, None]) -> pb.GenerateEvent | None:
        """The request's next event; None after the last. Not waited for any longer once the server is stopping."""
        task = asyncio.current_task()
        if self._is_stopping or task is None:
            raise UnavailableError("the server is stopping")
        self._waiting.add(task)
        try:
            return await anext(events, None)
        except asyncio.CancelledError:
            if not self._is_stopping:
                raise
            task.uncancel()
            raise UnavailableError("the server is stopping") from None
        finally:
            self._waiting.discard(task)

    def _made(self, call: Call, request: pb.GenerateRequest, visit: Visit) -> AsyncGenerator[pb.GenerateEvent, None]:
        """The call's events; of the first call, where its idempotency key has been seen."""

        def make() -> AsyncGenerator[pb.GenerateEvent, None]:
            return self._router.events(call) if self._guard is None else self._guard.events(call, self._router.events)

        key = visit.idempotency_key
        if key is None:
            return make()
        if call.output.preview_every is not None:
            raise InvalidRequestError("output.preview_every", f"cannot go with {IDEMPOTENCY_KEY}: previews are not kept")
        owner = call.client if visit.key_name is not None else ""
        fingerprint = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
        return self._answers.events((owner, check_idempotency_key(key), visit.part), fingerprint, make)

    async def server_info(self) -> pb.GetServerInfoResponse:
        """What runs here and how busy it is, of all replicas together.

        Raises:
            UnavailableError: not ready, or no replica answers.
        """
        _ = self.capabilities
        links = self._router.links
        answers = await asyncio.gather(*(link.info(INFO_TIMEOUT_S) for link in links))
        known = [info for info in answers if info is not None]
        if not known:
            raise UnavailableError("no replica answers; they are being restarted")
        merged = pb.GetServerInfoResponse()
        merged.CopyFrom(known[0])
        merged.activity.CopyFrom(_together([info.activity for info in known]))
        for link, info in zip(links, answers, strict=True):
            activity = None if info is None else info.activity
            merged.replicas.add(index=link.index, is_ready=info is not None, num_restarts=link.num_restarts, activity=activity)
        return merged

    async def metrics_text(self) -> bytes:
        """The front's metrics and those of every replica that answers, as Prometheus text."""
        links = self._router.links
        texts = await asyncio.gather(*(link.metrics(METRICS_TIMEOUT_S) for link in links))
        return together(self.metrics, {link.index: text for link, text in zip(links, texts, strict=True) if text is not None})

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


def deadline_in(left_s: float | None) -> float | None:
    """The point in time that is so many seconds from now, on `Visit.deadline`'s clock."""
    return None if left_s is None else time.monotonic() + left_s


def client_of(key_name: str | None, named: str | None, address: str) -> str:
    """Whose share a request takes, as `Request.client` is read: the API key's; where the server wants none, the address's, and
    within it a share for each client id. Client ids alone would give a caller that makes up new ones a share for each.
    """
    if key_name is not None:
        return f"key {key_name}".encode("ascii", "backslashreplace").decode()
    return f"{address}/{named}" if named else address


def _together(parts: list[pb.GetServerInfoResponse.Activity]) -> pb.GetServerInfoResponse.Activity:
    """Counts add up; the oldest replica's age and the tightest bound of memory stand for all."""
    total = pb.GetServerInfoResponse.Activity()
    for name in (column.name for column in total.DESCRIPTOR.fields):
        setattr(total, name, sum(getattr(part, name) for part in parts))
    total.uptime_s = max(part.uptime_s for part in parts)
    total.ClearField("max_cells_per_call")
    bounds = [part.max_cells_per_call for part in parts if part.HasField("max_cells_per_call")]
    if bounds:
        total.max_cells_per_call = min(bounds)
    return total
