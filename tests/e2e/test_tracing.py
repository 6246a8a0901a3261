"""Spans as a real OTLP collector receives them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from deployments import deployed
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from patience import PATIENCE_S

from mii_serve.client import Client
from mii_serve.errors import InvalidRequestError
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.proto.v1.image_generation_pb2_grpc import ImageGenerationStub

TRACE_ID, CALLER_SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PROMPT = "a red circle"
STAGES = ["queue", "encode", "denoise", "decode", "safety", "encode_image"]


class Collector(TraceServiceServicer):
    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        self._lock = threading.Lock()

    def Export(self, request, context):  # noqa: N802
        with self._lock:
            self.requests.append(request)
        return ExportTraceServiceResponse()

    def spans(self) -> list[Span]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    with ThreadPoolExecutor(2) as threads:
        server, collector = grpc.server(threads), Collector()
        add_TraceServiceServicer_to_server(collector, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield collector, f"http://127.0.0.1:{port}"
        server.stop(None).wait()


def attributes(span: Span) -> dict:
    values = {entry.key: entry.value for entry in span.attributes}
    return {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()}


def test_a_request_is_one_trace_from_the_caller_down_to_each_stage_of_each_image(collector):
    collected, endpoint = collector
    with deployed("demo", env={"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}) as running:
        with grpc.insecure_channel(running.grpc) as channel:
            request = pb.GenerateRequest(prompt=PROMPT, num_inference_steps=4, num_images_per_prompt=2, seed=5)
            metadata = (("traceparent", f"00-{TRACE_ID}-{CALLER_SPAN_ID}-01"), ("x-request-id", "mine"))
            ImageGenerationStub(channel).Generate(request, metadata=metadata, timeout=PATIENCE_S)
        with Client(running.grpc) as client, pytest.raises(InvalidRequestError):
            client.generate(PROMPT, scheduler="no such thing")
        assert running.stop(signal.SIGTERM) == 0
    spans = collected.spans()
    [server] = [span for span in spans if span.parent_span_id.hex() == CALLER_SPAN_ID]
    assert (server.name, server.kind) == ("mii_serve.v1.ImageGeneration/Generate", Span.SPAN_KIND_SERVER)
    told = attributes(server)
    assert told["rpc.grpc.status_code"] == "OK" and told["gen_ai.request.seed"] == 5
    assert told["mii_serve.request_id"] == "mine" and told["mii_serve.num_inference_steps"] == 4
    below = [span for span in spans if span.parent_span_id == server.span_id]
    assert {span.trace_id.hex() for span in [server, *below]} == {TRACE_ID}
    for image_index in range(2):
        stages = [span for span in below if attributes(span)["mii_serve.image_index"] == image_index]
        stages.sort(key=lambda span: (span.start_time_unix_nano, span.end_time_unix_nano))
        assert [span.name for span in stages] == STAGES
        assert stages[0].start_time_unix_nano >= server.start_time_unix_nano
        assert stages[-1].end_time_unix_nano <= server.end_time_unix_nano
        assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in stages)
    [refused] = [span for span in spans if span.trace_id != server.trace_id]
    assert attributes(refused)["rpc.grpc.status_code"] == "INVALID_ARGUMENT"
    assert not any(PROMPT in str(request) for request in collected.requests), "a prompt is nobody's to collect"


def test_a_collector_that_is_not_there_costs_no_picture_and_no_clean_end():
    with deployed("demo", env={"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, has_model=False) as running:
        with Client(running.grpc) as client:
            assert client.generate(PROMPT, num_inference_steps=2).images
        assert running.stop(signal.SIGTERM) == 0
