"""OpenTelemetry spans, where the extra `otel` is installed and `OTEL_EXPORTER_OTLP_ENDPOINT` names a collector.

Without either, every call here does nothing. Contexts travel as W3C `traceparent` (https://www.w3.org/TR/trace-context/).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING

from mii_serve.extras import how_to_get

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, SpanKind

logger = logging.getLogger(__name__)

TRACEPARENT_KEY = "traceparent"
ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
FLUSH_AT_EXIT_S = 2.0

Attributes = Mapping[str, str | int | float | bool]

current_traceparent: ContextVar[str | None] = ContextVar("current_traceparent", default=None)
"""The span that what is done now belongs to."""

_provider: TracerProvider | None = None


def start_tracing() -> None:
    """Send this process's spans to the collector the environment names, if it names one."""
    global _provider
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or not any(map(os.environ.get, ENDPOINT_VARIABLES)):
        return
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        logger.warning("OTEL_EXPORTER_OTLP_ENDPOINT is set, but traces need more: %s", how_to_get("otel"))
        return
    name = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "mii_serve"}
    _provider = TracerProvider(resource=Resource.create(name), shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))


def flush_traces() -> None:
    """Send what has not been sent, for at most `FLUSH_AT_EXIT_S` seconds."""
    if _provider is None:
        return
    # In a thread, because the SDK's own bound is not kept: https://github.com/open-telemetry/opentelemetry-python/issues/4568
    flushing = threading.Thread(target=_provider.force_flush, name="flush-traces", daemon=True)
    flushing.start()
    flushing.join(FLUSH_AT_EXIT_S)


class ServerSpan:
    """A call's span, opened as it comes in; the work done for it hangs below `traceparent`."""

    def __init__(self, method: str, parent: str | None) -> None:
        """`method`: gRPC's "/package.Service/Method" or HTTP's "POST /route". `parent`: the caller's `traceparent`."""
        from opentelemetry.trace import SpanKind

        self._span = _open(method.strip("/"), parent, time.time_ns(), SpanKind.SERVER)
        if method.startswith("/"):
            service, _, name = method.strip("/").rpartition("/")
            self._span.set_attributes({"rpc.system": "grpc", "rpc.service": service, "rpc.method": name})
        else:
            verb, _, route = method.partition(" ")
            self._span.set_attributes({"http.request.method": verb, "http.route": route})
        self.traceparent = _traceparent_of(self._span)

    def end(self, code: str, attributes: Attributes) -> None:
        """`code`: the gRPC status by name. A caller's own mistake, or leave, is no error of the server's."""
        from opentelemetry.trace import StatusCode

        self._span.set_attributes({"rpc.grpc.status_code": code, **attributes})
        if code in ("INTERNAL", "UNAVAILABLE", "UNKNOWN", "DEADLINE_EXCEEDED"):
            self._span.set_status(StatusCode.ERROR, code)
        self._span.end()


def open_server_span(method: str, parent: str | None) -> ServerSpan | None:
    """None where no collector is configured."""
    return None if _provider is None else ServerSpan(method, parent)


def add_span(name: str, parent: str | None, start: float, end: float, attributes: Attributes) -> None:
    """A piece of work that is over: from `start` to `end`, both of `time.monotonic()`. Without a parent nothing is recorded."""
    if _provider is None or parent is None:
        return
    from opentelemetry.trace import SpanKind

    epoch_ns = time.time_ns() - time.monotonic_ns()
    span = _open(name, parent, epoch_ns + int(start * 1e9), SpanKind.INTERNAL)
    span.set_attributes(attributes)
    span.end(epoch_ns + int(end * 1e9))


def _open(name: str, parent: str | None, start_ns: int, kind: SpanKind) -> Span:
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    assert _provider is not None
    above = TraceContextTextMapPropagator().extract({TRACEPARENT_KEY: parent} if parent else {}, Context())
    return _provider.get_tracer("mii_serve").start_span(name, above, kind, start_time=start_ns)


def _traceparent_of(span: Span) -> str | None:
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
    return carrier.get(TRACEPARENT_KEY)
