"""What became of each call: one line in the log, the front's metrics, its span. No prompt in any."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from mii_serve.metrics import FrontMetrics
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.tracing import TRACEPARENT_KEY, ServerSpan, current_traceparent, open_server_span
from mii_serve.types import GenerationParams

logger = logging.getLogger(__name__)

_TOLD = ("height", "width", "num_inference_steps", "guidance_scale", "num_images_per_prompt", "scheduler", "seed")


class Facts(dict[str, object]):
    """What is learnt of a call on its way; fields of its log line and attributes of its span."""

    span: ServerSpan | None = None

    def learn_params(self, params: GenerationParams) -> None:
        self.update({name: getattr(params, name) for name in _TOLD})

    def learn_event(self, event: pb.GenerateEvent) -> None:
        kind = event.WhichOneof("event")
        if kind == "started":
            self["is_started"] = True
        elif kind == "restarted":
            self["num_restarts"] = int(str(self.get("num_restarts", 0))) + 1
        elif kind == "image" and event.image.nsfw_content_detected:
            self["num_flagged"] = int(str(self.get("num_flagged", 0))) + 1
        elif kind == "done":
            self["queued_s"] = round(event.done.timings.queued_s, 4)


class Ledger:
    """Takes in calls as they end."""

    def __init__(self, metrics: FrontMetrics) -> None:
        self._metrics = metrics

    def new_facts(self, method: str, metadata: Mapping[str, str]) -> Facts:
        facts = Facts()
        if _is_work(method) and (span := open_server_span(method, metadata.get(TRACEPARENT_KEY))):
            facts.span = span
            current_traceparent.set(span.traceparent)
        return facts

    def close(self, method: str, request_id: str, code: str, seconds: float, facts: Mapping[str, object]) -> None:
        """Note that a call ended with this code after so many seconds."""
        if isinstance(facts, Facts) and facts.span is not None:
            facts.span.end(code, _attributes(request_id, facts))
        method, metrics = _label(method), self._metrics
        metrics.requests.labels(method, code).inc()
        metrics.request_duration.labels(method).observe(seconds)
        if isinstance(queued_s := facts.get("queued_s"), float):
            metrics.queue.observe(queued_s)
        if code == "CANCELLED":
            metrics.cancelled.labels("running" if facts.get("is_started") else "waiting").inc()
        metrics.restarted.inc(int(str(facts.get("num_restarts", 0))))
        if _is_work(method):
            told = {"request_id": request_id, "method": method, "code": code, "seconds": round(seconds, 4), **facts}
            logger.info(" ".join(f"{name}={value}" for name, value in told.items()), extra={"request": told})


def _label(method: str) -> str:
    """gRPC's "/package.Service/Method" is told by its last part, HTTP's "POST /route" as it is."""
    return method.rpartition("/")[2] if method.startswith("/") else method


def _is_work(method: str) -> bool:
    return method.rpartition("/")[2].startswith("Generate") or method.startswith("POST ")


def _attributes(request_id: str, facts: Facts) -> dict[str, str | int | float | bool]:
    """Names of the GenAI conventions where they have one: https://opentelemetry.io/docs/specs/semconv/gen-ai/."""
    told = {f"mii_serve.{name}": value for name, value in facts.items() if isinstance(value, str | int | float)}
    if (seed := told.pop("mii_serve.seed", None)) is not None:
        told["gen_ai.request.seed"] = seed
    return {"mii_serve.request_id": request_id, "gen_ai.output.type": "image", **told}
