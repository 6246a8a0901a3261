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
from mii_serve.proto.codec import image_format_number
from mii_serve.proto.status import encode_error
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.proto.v1.image_generation_pb2_grpc import (
    ImageGenerationServicer,
    add_ImageGenerationServicer_to_server,
)
from mii_serve.types import ImageFormat

Script = Callable[[pb.GenerateRequest], Iterator[pb.GenerateEvent]]

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


def effective(request: pb.GenerateRequest) -> pb.EffectiveParameters:
    return pb.EffectiveParameters(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=8,
        width=16,
        num_inference_steps=NUM_STEPS,
        guidance_scale=7.3,
        num_images_per_prompt=request.num_images_per_prompt or 1,
        scheduler="ddim",
        seed=request.seed,
        engine="reference",
        dtype="fp32",
        device="cpu",
        model="scripted",
        model_revision="r1",
    )


def image(request: pb.GenerateRequest, index: int, *, flag: bool | None = False) -> pb.GenerateEvent:
    image_format = ImageFormat[pb.ImageFormat.Name(request.output.format).removeprefix("IMAGE_FORMAT_")]
    message = pb.GeneratedImage(
        index=index,
        data=encoded(image_format, index),
        format=image_format_number(image_format),
        height=8,
        width=16,
        seed=request.seed + index,
        nsfw_content_detected=flag,
    )
    return pb.GenerateEvent(request_id=REQUEST_ID, image=message)


def queued(ahead: int = 2) -> pb.GenerateEvent:
    return pb.GenerateEvent(request_id=REQUEST_ID, queued=pb.GenerateEvent.Queued(num_samples_ahead=ahead))


def done(parameters: pb.EffectiveParameters) -> pb.GenerateEvent:
    timings = pb.Timings(queued_s=0.25, total_s=1.5)
    return pb.GenerateEvent(request_id=REQUEST_ID, done=pb.GenerateEvent.Done(parameters=parameters, timings=timings))


def all_pictures(request: pb.GenerateRequest, *, flag: bool | None = False) -> Iterator[pb.GenerateEvent]:
    """What a healthy server says."""
    yield queued()
    for index in range(request.num_images_per_prompt or 1):
        yield pb.GenerateEvent(request_id=REQUEST_ID, started=pb.GenerateEvent.Started(image_index=index))
        for step in range(1, NUM_STEPS + 1):
            event = pb.GenerateEvent.Step(image_index=index, step=step, num_steps=NUM_STEPS)
            yield pb.GenerateEvent(request_id=REQUEST_ID, step=event)
        yield image(request, index, flag=flag)
    yield done(effective(request))


def refusal(error: MiiServeError) -> Script:
    def script(request: pb.GenerateRequest) -> Iterator[pb.GenerateEvent]:
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
    script: Script = all_pictures
    info_error: MiiServeError | None = None
    requests: list[pb.GenerateRequest] = field(default_factory=list)
    asked: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    """Set as soon as the last call is over, for whatever reason."""

    def endless(self, request: pb.GenerateRequest) -> Iterator[pb.GenerateEvent]:
        """Say that it is queued and then nothing until the caller goes away."""
        yield queued()
        if not self.ended.wait(PATIENCE_S):
            raise AssertionError("the caller never went away")

    def GenerateStream(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateEvent]:
        self.requests.append(request)
        self.ended.clear()
        self.asked.set()
        context.add_callback(self.ended.set)
        with answered_errors(context):
            yield from self.script(request)

    def Generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> pb.GenerateResponse:
        answer = pb.GenerateResponse(request_id=REQUEST_ID)
        for event in self.GenerateStream(request, context):
            if event.HasField("image"):
                answer.images.append(event.image)
            elif event.HasField("done"):
                answer.parameters.CopyFrom(event.done.parameters)
                answer.timings.CopyFrom(event.done.timings)
        return answer

    def GetServerInfo(self, request: pb.GetServerInfoRequest, context: grpc.ServicerContext) -> pb.GetServerInfoResponse:
        with answered_errors(context):
            if self.info_error is not None:
                raise self.info_error
        info = pb.GetServerInfoResponse
        return info(
            version="9.9",
            deployment_name="test",
            model="scripted",
            model_revision="r1",
            engine="reference",
            dtype="fp32",
            device="cpu",
            has_safety_checker=True,
            defaults=info.Defaults(scheduler="ddim", num_inference_steps=50, guidance_scale=7.5, height=512, width=512),
            limits=info.Limits(
                max_prompt_chars=100,
                max_num_inference_steps=200,
                max_guidance_scale=20,
                min_size_px=64,
                max_size_px=768,
                max_images_per_prompt=4,
            ),
            schedulers={"ddim": "ddim", "DDIMScheduler": "ddim"},
            activity=info.Activity(uptime_s=61.0, max_slots=8, num_running=3, num_waiting=1, num_steps=70),
        )


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
