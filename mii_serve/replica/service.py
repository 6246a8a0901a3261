"""What a replica answers to its front: orders in, a report of each turn out. The socket is private, or asks for a token."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

import mii_serve
from mii_serve.errors import MiiServeError
from mii_serve.proto.codec import CHANNEL_OPTIONS, decode_resolved, encode_lora, encode_server_info, fill_event
from mii_serve.proto.metadata import AUTHORIZATION_KEY
from mii_serve.proto.replica import replica_pb2 as pb
from mii_serve.proto.replica.replica_pb2_grpc import ReplicaServicer, add_ReplicaServicer_to_server
from mii_serve.proto.status import status_of
from mii_serve.proto.v1.image_generation_pb2 import GetServerInfoResponse
from mii_serve.replica.loop import ReplicaLoop
from mii_serve.types import (
    NO_LORAS,
    Done,
    Event,
    ImageReady,
    InputImage,
    LoraChoice,
    Preview,
    Queued,
    ReplicaInfo,
    RequestedParams,
    ServerInfo,
    Started,
    Step,
)

if TYPE_CHECKING:  # grpc's classes are generic in their type stubs only
    Context = grpc.aio.ServicerContext[Any, Any]
    Handler = grpc.RpcMethodHandler[Any, Any] | None
else:
    Context = grpc.aio.ServicerContext
    Handler = grpc.RpcMethodHandler

logger = logging.getLogger(__name__)

STEPS_EVERY_S = 0.25
"""How old the steps may be that the front counts work by, where no caller reads them."""
KEEPALIVE_MS = 10_000
"""How often a front on another machine is pinged, and how long its answer may take."""
MIN_PING_INTERVAL_MS = 5_000
"""A front may ping as often; gRPC's own bound is five minutes."""
MAX_REPORT_BYTES = 16 * 1024 * 1024
"""Of images in one report, which has one at least: far below the bound of a message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenOn:
    """Where a replica listens: a Unix socket, or HOST:PORT with TLS and a token that the front must show."""

    address: str
    credentials: grpc.ServerCredentials | None = None
    token: str | None = None

    @classmethod
    def socket(cls, path: Path) -> ListenOn:
        return cls(address=f"unix:{path}")


def replica_server(loop: ReplicaLoop, deployment_name: str, listen_on: ListenOn) -> tuple[grpc.aio.Server, int]:
    """A server for this loop that has not started yet, and the port that it is bound to, 1 for a Unix socket."""
    interceptors = () if listen_on.token is None else (_TokenCheck(listen_on.token),)
    keepalive = (
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_MS),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
    )
    options = CHANNEL_OPTIONS if listen_on.credentials is None else (*CHANNEL_OPTIONS, *keepalive)
    server = grpc.aio.server(interceptors=interceptors, options=options)
    add_ReplicaServicer_to_server(ReplicaService(loop, deployment_name), server)
    if listen_on.credentials is None:
        return server, server.add_insecure_port(listen_on.address)
    return server, server.add_secure_port(listen_on.address, listen_on.credentials)


class ReplicaService(ReplicaServicer):
    def __init__(self, loop: ReplicaLoop, deployment_name: str) -> None:
        self._loop = loop
        self._deployment_name = deployment_name
        engine = loop.engine
        asked = engine.capabilities.with_mask_if_needed(RequestedParams(prompt="the default scheduler"))
        usual = engine.capabilities.resolve(asked, fallback_seed=0)
        self._default_scheduler = engine.describe_scheduler(usual)

    async def Work(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[pb.Order], context: Context
    ) -> None:
        # Not a generator, which would not be closed when the call is cancelled in the middle of a write.
        front = _Front(self._loop)
        reading = asyncio.create_task(front.follow(request_iterator))
        try:
            while (report := await front.next_report(reading)) is not None:
                await context.write(report)
        except grpc.aio.BaseError:
            pass  # the front has gone
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            front.drop_all()

    async def GetInfo(self, request: pb.GetInfoRequest, context: Context) -> GetServerInfoResponse:  # noqa: N802
        engine, scheduler = self._loop.engine, self._default_scheduler
        described, capabilities, activity = engine.description, engine.capabilities, self._loop.activity()
        own = ReplicaInfo(index=0, is_ready=True, num_restarts=0, activity=activity, devices=described.devices)
        return encode_server_info(
            ServerInfo(
                version=mii_serve.__version__,
                deployment_name=self._deployment_name,
                model=described.model,
                model_revision=described.model_revision,
                engine=described.engine,
                dtype=described.dtype,
                device=described.device,
                has_safety_checker=described.has_safety_checker,
                engine_note=described.note,
                defaults=capabilities.defaults,
                limits=capabilities.limits,
                schedulers=capabilities.schedulers,
                parts=capabilities.parts,
                loras=tuple(capabilities.loras.values()),
                default_scheduler_class=scheduler.class_name,
                default_scheduler_options=scheduler.options,
                is_default_scheduler_compiled=scheduler.is_compiled,
                num_ranks=described.num_ranks,
                parallelism=described.parallelism,
                engine_kernels=described.kernels,
                needs_mask=capabilities.needs_mask,
                activity=activity,
                replicas=(own,),
            )
        )

    async def LoadLora(self, request: pb.LoadLoraRequest, context: Context) -> pb.LoraAnswer:  # noqa: N802
        try:
            return pb.LoraAnswer(lora=encode_lora(await self._loop.load_lora(request.name, Path(request.path))))
        except MiiServeError as error:
            return pb.LoraAnswer(error=status_of(error).SerializeToString())
        except Exception:
            logger.exception("unexpected error, LoRA %s", request.name)
            return pb.LoraAnswer(error=status_of(MiiServeError("internal error in the replica")).SerializeToString())

    async def RemoveLora(  # noqa: N802
        self, request: pb.RemoveLoraRequest, context: Context
    ) -> pb.RemoveLoraAnswer:
        await self._loop.remove_lora(request.name)
        return pb.RemoveLoraAnswer()

    async def GetMetrics(self, request: pb.GetMetricsRequest, context: Context) -> pb.Metrics:  # noqa: N802
        return pb.Metrics(text=self._loop.metrics.text())


_NUMBERS = itertools.count(1)


class _Front:
    """One front's stream: what it has ordered, and what it has not been sent yet."""

    def __init__(self, loop: ReplicaLoop) -> None:
        self._loop = loop
        self._running: dict[int, str] = {}
        """The loop's request id by the front's id."""
        self._wanting_steps: set[int] = set()
        self._accepting: dict[int, asyncio.Task[None]] = {}
        self._before: dict[tuple[int, int | None], Queued | Started] = {}
        """The latest place in the queue of each request, and the start of each image."""
        self._steps: dict[tuple[int, int], Step] = {}
        """The latest of each image, as with the previews."""
        self._previews: dict[tuple[int, int], Preview] = {}
        self._after: deque[tuple[int, Event | MiiServeError]] = deque()
        self._changed = asyncio.Event()
        self._reported_at = 0.0

    async def follow(self, orders: AsyncIterator[pb.Order]) -> None:
        """Carry out orders until the stream of them ends."""
        async for order in orders:
            if order.HasField("cancel"):
                self._drop(order.cancel.id)
            else:
                accepting = asyncio.create_task(self._accept(order.generate))
                self._accepting[order.generate.id] = accepting

    async def next_report(self, reading: asyncio.Task[None]) -> pb.Report | None:
        """What is new, awaited if nothing is; None once the front has ended its orders."""
        changed = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait((changed, reading), return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
        return None if reading.done() else self._take_report()

    def drop_all(self) -> None:
        for front_id in (*self._running, *self._accepting):
            self._drop(front_id)

    async def _accept(self, order: pb.Generate) -> None:
        front_id = order.id
        request_id = f"{order.request_id} {next(_NUMBERS)}"
        self._running[front_id] = request_id
        if order.has_steps:
            self._wanting_steps.add(front_id)
        try:
            parts = self._loop.engine.capabilities.parts
            await self._loop.submit(
                request_id,
                decode_resolved(
                    order.request, _input_image(order), _lora_choice(order.lora_choice), embeds_guidance=parts.embeds_guidance
                ),
                _Outlet(self, front_id),
                client=order.client,
                timeout_s=order.timeout_s if order.HasField("timeout_s") else None,
                traceparent=order.traceparent or None,
            )
        except MiiServeError as error:
            self.put(front_id, error)
        except Exception:
            logger.exception("unexpected error, request_id=%s", request_id)
            self.put(front_id, MiiServeError("internal error in the replica"))
        finally:
            self._accepting.pop(front_id, None)

    def _drop(self, front_id: int) -> None:
        if (accepting := self._accepting.pop(front_id, None)) is not None:
            accepting.cancel()
        if (request_id := self._forget(front_id)) is not None:
            self._loop.drop(request_id)

    def _forget(self, front_id: int) -> str | None:
        self._wanting_steps.discard(front_id)
        return self._running.pop(front_id, None)

    def put(self, front_id: int, entry: Event | Exception) -> None:
        """Send this with the next report."""
        match entry:
            case Step():
                self._steps[front_id, entry.image_index] = entry
                is_urgent = front_id in self._wanting_steps
                if not is_urgent and time.monotonic() - self._reported_at < STEPS_EVERY_S:
                    return
            case Queued() | Started():
                key = front_id, entry.image_index if isinstance(entry, Started) else None
                self._before.pop(key, None)  # the new one goes to the end
                self._before[key] = entry
            case Preview():
                self._previews[front_id, entry.image_index] = entry
            case Exception():
                self._forget(front_id)
                self._after.append((front_id, entry if isinstance(entry, MiiServeError) else MiiServeError(str(entry))))
            case _:
                if isinstance(entry, Done):
                    self._forget(front_id)
                self._after.append((front_id, entry))
        self._changed.set()

    def _take_report(self) -> pb.Report:
        report, self._reported_at = pb.Report(), time.monotonic()
        before, self._before = self._before, {}
        for (front_id, _), event in before.items():
            fill_event(report.before_steps.add(id=front_id).event, event)
        steps, self._steps = self._steps, {}
        for (front_id, index), step in steps.items():
            report.steps.id.append(front_id)
            report.steps.image_index.append(index)
            report.steps.step.append(step.step)
            report.steps.num_steps.append(step.num_steps)
            report.steps.estimated_left_s.append(step.estimated_left_s or 0.0)
        previews, self._previews = self._previews, {}
        for (front_id, _), preview in previews.items():
            fill_event(report.after_steps.add(id=front_id).event, preview)
        num_bytes = sum(len(preview.encoded) for preview in previews.values())
        while self._after and (not report.after_steps or num_bytes < MAX_REPORT_BYTES):
            front_id, entry = self._after.popleft()
            news = report.after_steps.add(id=front_id)
            if isinstance(entry, MiiServeError):
                news.error = status_of(entry).SerializeToString()
            else:
                fill_event(news.event, entry)
            num_bytes += len(entry.encoded) if isinstance(entry, ImageReady) else 0
        if not self._after:
            self._changed.clear()
        return report


def _lora_choice(message: pb.LoraChoice) -> LoraChoice:
    parts = tuple(zip(message.revisions, message.scales, strict=True))
    return LoraChoice(parts=parts, shares_calls=message.shares_calls) if parts else NO_LORAS


def _input_image(order: pb.Generate) -> InputImage | None:
    if not order.HasField("input_image"):
        return None
    image = order.input_image
    return InputImage(rgb=image.rgb, mask=image.mask if image.HasField("mask") else None)


@dataclass(frozen=True, slots=True)
class _Outlet:
    front: _Front
    front_id: int

    def put(self, entry: Event | Exception) -> None:
        self.front.put(self.front_id, entry)


class _TokenCheck(grpc.aio.ServerInterceptor):
    """Refuses calls that do not show the token."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]], details: grpc.HandlerCallDetails
    ) -> Any:
        shown = dict(details.invocation_metadata or ()).get(AUTHORIZATION_KEY, "")
        if hmac.compare_digest(str(shown).encode(), self._expected):
            return await continuation(details)
        return _REFUSAL


async def _refuse(request_iterator: Any, context: Context) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a replica wants its front's token")


_REFUSAL: Any = grpc.stream_stream_rpc_method_handler(_refuse)
