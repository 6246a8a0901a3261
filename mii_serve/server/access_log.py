"""What became of each call: one line in the log, the front's metrics, its span. No prompt in any."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from mii_serve.metrics import FrontMetrics
from mii_serve.tracing import TRACEPARENT_KEY, ServerSpan, current_traceparent, open_server_span
from mii_serve.types import PARAMETERS, PLAIN, Done, Event, GenerationParams, ImageReady, Restarted, Started

logger = logging.getLogger(__name__)

_PROMPTS = ("prompt", "negative_prompt")
_OF_SOME = ("strength", "clip_skip", "eta", "prompt_syntax")
"""Logged only where a request has them."""
_LOGGED = tuple(parameter.name for parameter in PARAMETERS if parameter.name not in (*_PROMPTS, *_OF_SOME))
_WORK = frozenset({"Generate", "GenerateStream", "ModelInfer", "Txt2ImgReply"})


def is_work(method: str) -> bool:
    """Whether calls of this method make images: they count against a key's limits and get a line in the log.

    HTTP calls have the name "VERB /route".
    """
    return method.rpartition("/")[2] in _WORK or method.startswith("POST ")


class CallLog(dict[str, object]):
    """What becomes known of one call: fields of its log line and attributes of its span."""

    span: ServerSpan | None = None
    num_images = 0
    key_name: str | None = None

    def add_key(self, name: str | None) -> None:
        """The name of the API key that the call came with."""
        if name is not None:
            self.key_name = self["key"] = name

    def add_params(self, params: GenerationParams) -> None:
        self.update({name: getattr(params, name) for name in _LOGGED})
        self.update({name: value for name in _OF_SOME if (value := getattr(params, name)) not in (None, 0, PLAIN)})
        if params.timesteps is not None or params.sigmas is not None:
            self["has_own_steps"] = True
        if params.prompt_embeds is not None:
            self["has_prompt_embeds"] = True
        if params.loras:
            self["loras"] = ",".join(f"{name}:{scale:g}" for name, scale in params.loras.items())

    def add_event(self, event: Event) -> None:
        match event:
            case Started():
                self["is_started"] = True
            case Restarted():
                self._count("num_restarts", True)
            case ImageReady():
                self.num_images += 1
                self._count("num_flagged", event.nsfw_content_detected)
                self._count("num_blocked", event.moderation_blocked)
            case Done():
                self["queued_s"] = round(event.queued_s, 4)

    def _count(self, name: str, is_so: bool | None) -> None:
        if is_so:
            self[name] = int(str(self.get(name, 0))) + 1


class AccessLog:
    """Writes a line for each call as it ends, and counts it."""

    def __init__(self, metrics: FrontMetrics) -> None:
        self._metrics = metrics

    def open(self, method: str, headers: Mapping[str, str], log: CallLog) -> None:
        """A call of this method begins."""
        if is_work(method) and (span := open_server_span(method, headers.get(TRACEPARENT_KEY))):
            log.span = span
            current_traceparent.set(span.traceparent)

    def close(self, method: str, request_id: str, code: str, seconds: float, log: CallLog) -> None:
        """The call ended with this gRPC code after so many seconds."""
        if log.span is not None:
            log.span.end(code, _attributes(request_id, log))
        label, metrics = _label(method), self._metrics
        metrics.requests.labels(label, code).inc()
        metrics.request_duration.labels(label).observe(seconds, _exemplar(log.span))
        if log.key_name is not None:
            metrics.key_request(log.key_name, code, seconds, log.num_images)
        if isinstance(queued_s := log.get("queued_s"), float):
            metrics.queue.observe(queued_s)
        if code == "CANCELLED":
            metrics.cancelled.labels("running" if log.get("is_started") else "waiting").inc()
        metrics.restarted.inc(int(str(log.get("num_restarts", 0))))
        if is_work(method):
            line = {"request_id": request_id, "method": label, "code": code, "seconds": round(seconds, 4), **log}
            logger.info(" ".join(f"{name}={value}" for name, value in line.items()), extra={"request": line})


def _exemplar(span: ServerSpan | None) -> dict[str, str] | None:
    """The trace in which a slow call can be looked up; OpenMetrics has it beside the bucket."""
    if span is None or span.traceparent is None:
        return None
    return {"trace_id": span.traceparent.split("-")[1]}


def _label(method: str) -> str:
    """The last part of gRPC's "/package.Service/Method"; HTTP's "POST /route" as it is."""
    return method.rpartition("/")[2] if method.startswith("/") else method


def _attributes(request_id: str, log: CallLog) -> dict[str, str | int | float | bool]:
    """Names of the GenAI conventions where they have one: https://opentelemetry.io/docs/specs/semconv/gen-ai/."""
    values = {f"mii_serve.{name}": value for name, value in log.items() if isinstance(value, str | int | float)}
    if (seed := values.pop("mii_serve.seed", None)) is not None:
        values["gen_ai.request.seed"] = seed
    return {"mii_serve.request_id": request_id, "gen_ai.output.type": "image", **values}
