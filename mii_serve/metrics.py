"""Prometheus instruments of the front and of a replica, each on a registry that is passed in.

No prompt, request id or API key is ever a label, only the name that the operator gave a key. Callers cannot create series: what
they choose is grouped into a few classes.
Names follow https://prometheus.io/docs/practices/naming/.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    Summary,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.parser import text_string_to_metric_families

from mii_serve import __version__

disable_created_metrics()  # type: ignore[no-untyped-call]  # twice the lines for what a restart shows anyway

REQUEST_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300)
STEP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60, 300)
JOB_STATES = ("validating", "in_progress", "finalizing", "cancelling", "completed", "failed", "expired", "cancelled")
ROW_STATES = ("open", "done", "failed")
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
MAX_KEY_NAMES = 100
"""Names of API keys with series of their own since the start; the file may be read again any number of times."""
OTHER_KEYS = "(other)"
"""The label of all others; no key can have this name."""


class FrontMetrics:
    """What the front knows: requests and replicas."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry = registry or CollectorRegistry()
        self.requests = Counter("mii_serve_requests", "Finished calls, by gRPC code.", ("method", "code"), registry=registry)
        self.request_duration = Histogram(
            "mii_serve_request_duration_seconds",
            "From a call's arrival to its end.",
            ("method",),
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
        )
        self.queue = Histogram(
            "mii_serve_queue_seconds",
            "From a request's acceptance to its first image's start.",
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
        )
        self.requests_running = Gauge("mii_serve_requests_running", "Requests accepted and not ended.", registry=registry)
        self.cancelled = Counter(
            "mii_serve_cancelled", "Callers who left, by where their request was.", ("where",), registry=registry
        )
        self.restarted = Counter(
            "mii_serve_requests_restarted", "Parts of requests run again because their replica was lost.", registry=registry
        )
        self.replicas_ready = Gauge("mii_serve_replicas_ready", "Replicas that take work.", registry=registry)
        self.replica_restarts = Counter("mii_serve_replica_restarts", "Restarts of a replica.", ("replica",), registry=registry)
        self.moderation_checks = Counter(
            "mii_serve_moderation_checks", "Verdicts of content safety.", ("stage", "outcome"), registry=registry
        )
        self.moderation_duration = Histogram(
            "mii_serve_moderation_duration_seconds",
            "From sending a text or image to content safety to its verdict or failure.",
            ("stage",),
            buckets=REQUEST_BUCKETS_S,
            registry=registry,
        )
        self._key_names: set[str] = set()
        self._key_requests = Counter(
            "mii_serve_key_requests", "Finished calls with an API key, by its name.", ("key", "code"), registry=registry
        )
        self._key_duration = Summary(
            "mii_serve_key_request_duration_seconds",
            "From a call's arrival to its end, of calls with an API key.",
            ("key",),
            registry=registry,
        )
        self._key_images = Counter(
            "mii_serve_key_images", "Images sent to callers with an API key.", ("key",), registry=registry
        )
        self.signing_expiry = Gauge(
            "mii_serve_signing_certificate_expiry_timestamp_seconds",
            "When the certificate of Content Credentials expires and no image is sent any more; +Inf without one.",
            registry=registry,
        )
        ProcessCollector(registry=registry)
        build = Gauge("mii_serve_build_info", "Always 1.", ("version",), registry=registry)
        build.labels(__version__).set(1)
        for where in ("waiting", "running"):
            self.cancelled.labels(where)
        self._jobs = Gauge("mii_serve_jobs", "Batch jobs that are kept, by state.", ("state",), registry=registry)
        self._jobs_paused = Gauge(
            "mii_serve_jobs_paused", "Batch jobs that cannot go on now, such as while the disk is full.", registry=registry
        )
        self._job_rows = Gauge(
            "mii_serve_job_rows", "Rows of the batch jobs that have not ended, by state.", ("state",), registry=registry
        )

    def follow_jobs(self, jobs: JobsState) -> None:
        """Let the gauges of jobs read this from now on."""
        self._jobs_paused.set_function(lambda: jobs.num_paused)
        for state in JOB_STATES:
            self._jobs.labels(state).set_function(functools.partial(_one_of, jobs.job_counts, state))
        for state in ROW_STATES:
            self._job_rows.labels(state).set_function(functools.partial(_one_of, jobs.row_counts, state))

    def key_request(self, name: str, code: str, seconds: float, num_images: int) -> None:
        """Note a finished call with the API key of this name."""
        if name not in self._key_names and len(self._key_names) >= MAX_KEY_NAMES:
            name = OTHER_KEYS
        self._key_names.add(name)
        self._key_requests.labels(name, code).inc()
        self._key_duration.labels(name).observe(seconds)
        self._key_images.labels(name).inc(num_images)


class JobsState(Protocol):
    """What the gauges of batch jobs read when they are asked."""

    def job_counts(self) -> Mapping[str, int]: ...
    def row_counts(self) -> Mapping[str, int]: ...
    @property
    def num_paused(self) -> int: ...


class BatchState(Protocol):
    """The same of batch requests."""

    num_restarted: int

    @property
    def num_waiting(self) -> int: ...
    @property
    def num_parked(self) -> int: ...


class ReplicaState(Protocol):
    """What a replica's gauges read when they are asked."""

    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def queued_work_s(self) -> float: ...
    @property
    def batch(self) -> BatchState: ...


class ReplicaMetrics:
    """What a replica knows: turns, stages and images."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry = registry or CollectorRegistry()
        self._running = Gauge("mii_serve_images_running", "Images in a slot.", registry=registry)
        self._waiting = Gauge(
            "mii_serve_images_waiting", "Images in the queue, without those of batch requests.", registry=registry
        )
        self._batch_waiting = Gauge(
            "mii_serve_batch_images_waiting", "Images of batch requests in their queue.", registry=registry
        )
        self._batch_parked = Gauge(
            "mii_serve_batch_images_parked",
            "Images of batch requests that hold a slot and give way to other images.",
            registry=registry,
        )
        self._batch_restarted = Gauge(
            "mii_serve_batch_images_restarted",
            "Images of batch requests that left their slot to another image and begin again, since the replica started.",
            registry=registry,
        )
        self._work = Gauge(
            "mii_serve_queued_work_seconds",
            "Seconds that the accepted work takes by the step time estimate, without that of batch requests.",
            registry=registry,
        )
        self.batch_size = Histogram("mii_serve_batch_size", "Images per UNet call.", buckets=BATCH_BUCKETS, registry=registry)
        self._steps = Histogram(
            "mii_serve_step_duration_seconds",
            "One UNet call with its sampler update; size_px is the side of a square of as many pixels, batch the images in it;"
            " both up to the next power of two.",
            ("engine", "size_px", "batch"),
            buckets=STEP_BUCKETS_S,
            registry=registry,
        )
        self._stages = Histogram(
            "mii_serve_stage_duration_seconds",
            "A stage of one turn: encode, denoise, decode, safety; or of one image: encode_image.",
            ("stage",),
            buckets=STEP_BUCKETS_S,
            registry=registry,
        )
        self.images = Counter("mii_serve_images", "Images made.", registry=registry)
        self.images_flagged = Counter("mii_serve_images_flagged", "Images the safety checker made black.", registry=registry)
        self.graph_misses = Counter(
            "mii_serve_graph_misses", "UNet calls that no captured CUDA graph fitted.", registry=registry
        )
        self._engine = Gauge(
            "mii_serve_engine_info",
            "Always 1; is_fallback is true if the preferred engine could not run.",
            ("engine", "dtype", "is_fallback"),
            registry=registry,
        )
        self._ranks = Gauge("mii_serve_ranks", "Devices that compute each UNet call together.", registry=registry)
        self._memory = Gauge(
            "mii_serve_gpu_memory_bytes", "GPU memory of torch's allocator, and of the device.", ("kind",), registry=registry
        )
        ProcessCollector(registry=registry)

    def follow(self, state: ReplicaState) -> None:
        """Let the gauges read this from now on."""
        self._running.set_function(lambda: state.num_running)
        self._waiting.set_function(lambda: state.num_waiting)
        self._work.set_function(lambda: state.queued_work_s)
        self._batch_waiting.set_function(lambda: state.batch.num_waiting)
        self._batch_parked.set_function(lambda: state.batch.num_parked)
        self._batch_restarted.set_function(lambda: state.batch.num_restarted)

    def engine(self, name: str, dtype: str, *, is_fallback: bool, num_ranks: int = 1) -> None:
        """Note what computes."""
        self._ranks.set(num_ranks)
        self._engine.labels(name, dtype, str(is_fallback).lower()).set(1)

    def follow_memory(self, read: Callable[[], Mapping[str, int]]) -> None:
        """Let `read` tell the bytes in use by kind whenever they are asked for."""
        for kind in read():
            self._memory.labels(kind).set_function(functools.partial(_one_of, read, kind))

    def turn(self, engine: str, shape_px: tuple[int, int], batch: int, stages: Mapping[str, float]) -> None:
        """Note one turn: `batch` images of `shape_px` (height, width) stepped, and the seconds by stage."""
        for stage, seconds in stages.items():
            self.stage(stage, seconds)
        if batch:
            self.batch_size.observe(batch)
            self._steps.labels(engine, str(size_class_px(*shape_px)), str(_power_of_two(batch))).observe(
                stages.get("denoise", 0.0)
            )

    def stage(self, name: str, seconds: float) -> None:
        self._stages.labels(name).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)


def size_class_px(height: int, width: int) -> int:
    """The side of the smallest square, of those whose side is a power of two, that has as many pixels as this picture."""
    return _power_of_two(math.isqrt(height * width - 1) + 1)


def _power_of_two(number: int) -> int:
    """The smallest one that is no less."""
    return 1 << (number - 1).bit_length()


def content_type(accept: str) -> str:
    """Of what `together` gives a reader that accepts this."""
    return choose_encoder(accept)[1]


def together(front: FrontMetrics, replicas: Mapping[int, bytes], accept: str = "") -> bytes:
    """One exposition of all: the replicas' own texts by index, labelled `replica`, one family for each name.

    `accept` is what the reader takes, as HTTP's header has it: OpenMetrics, or by default Prometheus' text.
    """
    families = {family.name: family for family in front.registry.collect()}
    for index, text in sorted(replicas.items()):
        for family in text_string_to_metric_families(text.decode()):
            merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            merged.samples += [sample._replace(labels={**sample.labels, "replica": str(index)}) for sample in family.samples]
    encode, _ = choose_encoder(accept)
    return encode(_Collected(families.values()))


def _one_of(read: Callable[[], Mapping[str, int]], kind: str) -> float:
    return read()[kind]


class _Collected(CollectorRegistry):
    def __init__(self, families: Iterable[Metric]) -> None:
        super().__init__(auto_describe=False)
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
