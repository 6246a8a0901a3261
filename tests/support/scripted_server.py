"""A real gRPC server whose answers a test scripts."""

# ruff: noqa: N802 - gRPC names the methods

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse
from patience import PATIENCE_S
from PIL import Image

from mii_serve.errors import MiiServeError
from mii_serve.proto.codec import (
    decode_request,
    encode_answer,
    encode_event,
    encode_server_info,
)
from mii_serve.proto.status import encode_error
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.proto.v1.image_generation_pb2_grpc import (
    ImageGenerationServicer,
    add_ImageGenerationServicer_to_server,
)
from mii_serve.types import (
    Activity,
    Done,
    EffectiveParameters,
    Event,
    GenerationAnswer,
    GenerationDefaults,
    GenerationRequest,
    ImageFormat,
    ImageReady,
    Limits,
    Preview,
    Queued,
    ServerInfo,
    Started,
    Step,
)

Script = Callable[[GenerationRequest], Iterator[Event]]

REQUEST_ID = "request-1"
NUM_STEPS = 3


def colour(index: int) -> tuple[int, int, int]:
    return (200, 40 * index, 10)


def encoded(image_format: ImageFormat, index: int = 0, size: tuple[int, int] = (16, 8)) -> bytes:
    image = Image.new("RGB", size, colour(index))
    if image_format is ImageFormat.RAW_RGB:
        return image.tobytes()
    file = io.BytesIO()
    image.save(file, image_format.name)
    return file.getvalue()


def effective(request: GenerationRequest) -> EffectiveParameters:
    asked = request.params
    return EffectiveParameters(
        prompt=asked.prompt,
        negative_prompt=asked.negative_prompt or "",
        height=8,
        width=16,
        num_inference_steps=NUM_STEPS,
        guidance_scale=7.3,
        num_images_per_prompt=num_images(request),
        scheduler="ddim",
        seed=asked.seed or 0,
        engine="reference",
        dtype="fp32",
        device="cpu",
        model="scripted",
        model_revision="r1",
        dropped_prompt="",
        dropped_negative_prompt="",
        scheduler_class="DDIMScheduler",
        scheduler_options={"steps_offset": "1"},
        is_scheduler_compiled=True,
    )


def num_images(request: GenerationRequest) -> int:
    return request.params.num_images_per_prompt or 1


def image(request: GenerationRequest, index: int, *, flag: bool | None = False) -> ImageReady:
    return ImageReady(
        image_index=index,
        encoded=encoded(request.output.format, index),
        format=request.output.format,
        height=8,
        width=16,
        seed=(request.params.seed or 0) + index,
        nsfw_content_detected=flag,
    )


def preview(request: GenerationRequest, step: int = 1) -> Preview:
    return Preview(
        image_index=0,
        step=step,
        encoded=encoded(ImageFormat.JPEG),
        format=ImageFormat.JPEG,
        height=8,
        width=16,
        nsfw_content_detected=False,
    )


def queued(ahead: int = 2) -> Queued:
    return Queued(num_samples_ahead=ahead)


def done(parameters: EffectiveParameters) -> Done:
    return Done(parameters=parameters, queued_s=0.25, total_s=1.5)


def all_events(request: GenerationRequest, *, flag: bool | None = False) -> Iterator[Event]:
    """What a healthy server says."""
    yield queued()
    for index in range(num_images(request)):
        yield Started(image_index=index)
        for step in range(1, NUM_STEPS + 1):
            yield Step(image_index=index, step=step, num_steps=NUM_STEPS)
        yield image(request, index, flag=flag)
    yield done(effective(request))


ACTIVITY = Activity(
    uptime_s=61.0,
    max_slots=8,
    num_running=3,
    num_waiting=1,
    num_steps=70,
    num_images=0,
    num_requests=0,
    num_cancelled_requests=0,
    num_turns=0,
    num_graph_misses=0,
    max_cells_per_call=None,
)
INFO = ServerInfo(
    version="9.9",
    deployment_name="test",
    model="scripted",
    model_revision="r1",
    engine="reference",
    dtype="fp32",
    device="cpu",
    has_safety_checker=True,
    defaults=GenerationDefaults(scheduler="ddim"),
    limits=Limits(max_prompt_chars=100, max_num_inference_steps=200, max_size_px=768, max_images_per_prompt=4),
    schedulers={"ddim": "ddim", "DDIMScheduler": "ddim"},
    activity=ACTIVITY,
)


def refusal(error: MiiServeError) -> Script:
    def script(request: GenerationRequest) -> Iterator[Event]:
        raise error
        yield

    return script


@contextlib.contextmanager
def answered_errors(context: grpc.ServicerContext) -> Iterator[None]:
    try:
        yield
    except MiiServeError as error:
        code, text, trailing = encode_error(error)
        context.set_trailing_metadata(trailing)
        context.abort(code, text)


@dataclass
class ScriptedServicer(ImageGenerationServicer):
    script: Script = all_events
    info_error: MiiServeError | None = None
    requests: list[GenerationRequest] = field(default_factory=list)
    asked: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    """Set as soon as the last call is over, for whatever reason."""

    def endless(self, request: GenerationRequest) -> Iterator[Event]:
        """Say that it is queued and then nothing until the caller goes away."""
        yield queued()
        if not self.ended.wait(PATIENCE_S):
            raise AssertionError("the caller never went away")

    def _events(self, message: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[Event]:
        request = decode_request(message)
        self.requests.append(request)
        self.ended.clear()
        self.asked.set()
        context.add_callback(self.ended.set)
        with answered_errors(context):
            yield from self.script(request)

    def GenerateStream(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateEvent]:
        return (encode_event(REQUEST_ID, event) for event in self._events(request, context))

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> pb.GenerateResponse:
        events = list(self._events(request, context))
        images = tuple(event for event in events if isinstance(event, ImageReady))
        last = next(event for event in events if isinstance(event, Done))
        return encode_answer(REQUEST_ID, GenerationAnswer(images=images, done=last))

    def GetServerInfo(self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext) -> pb.GetServerInfoResponse:
        with answered_errors(context):
            if self.info_error is not None:
                raise self.info_error
        return encode_server_info(INFO)


@dataclass
class RunningServer:
    target: str
    servicer: ScriptedServicer
    health: health.HealthServicer

    def set_serving(self, is_serving: bool) -> None:
        status = HealthCheckResponse.SERVING if is_serving else HealthCheckResponse.NOT_SERVING
        self.health.set("", status)


@contextlib.contextmanager
def running(port: int = 0) -> Iterator[RunningServer]:
    server = grpc.server(ThreadPoolExecutor(max_workers=8))
    servicer, health_servicer = ScriptedServicer(), health.HealthServicer()
    add_ImageGenerationServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield RunningServer(target=f"127.0.0.1:{bound}", servicer=servicer, health=health_servicer)
    finally:
        servicer.ended.set()
        server.stop(0).wait(PATIENCE_S)
