"""One measurement: a warm-up, the load, and what the server reports of itself before and after."""

from __future__ import annotations

import contextlib
import itertools
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from mii_serve.bench.arrivals import Arrival, constant, poisson
from mii_serve.bench.check import PictureSample, SampledPicture
from mii_serve.bench.grpc_driver import GrpcDriver
from mii_serve.bench.load import Driver, LoadLimits, closed_loop, open_loop
from mii_serve.bench.mix import Mix
from mii_serve.bench.values import OK, Answer, PlannedRequest, Record
from mii_serve.client import ServerInfo
from mii_serve.errors import MiiServeError

if TYPE_CHECKING:
    from mii_serve.bench.observe import Scrape

_Look: TypeAlias = "tuple[ServerInfo | None, Scrape | str | None]"
Protocol = Literal["grpc", "http", "mii"]
WARMUP_CALLERS = 4
"""Callers of an open loop's warm-up, which is a closed loop; a closed loop warms up with its own callers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """How requests arrive: `callers` that each wait for their answer, `rate` requests/s, or at the times of a `trace`."""

    kind: Literal["closed", "poisson", "constant", "trace"]
    callers: int | None = None
    rate: float | None = None
    trace: Sequence[Arrival] = field(default=(), repr=False)
    name: str = ""

    def __str__(self) -> str:
        match self.kind:
            case "closed":
                return f"closed loop, {self.callers} callers"
            case "trace":
                return f"open loop, trace {self.name} of {len(self.trace)} requests"
            case _:
                return f"open loop, {self.kind}, {self.rate:g} requests/s"

    def arrivals(self, seed: str) -> Iterator[Arrival]:
        match self.kind:
            case "poisson":
                return poisson(self.rate or 1.0, seed)
            case "constant":
                return constant(self.rate or 1.0)
            case _:
                return iter(self.trace)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure. `sample_size` pictures are kept for the check; `metrics` is the HTTP address to scrape."""

    loop: Loop
    mix: Mix
    limits: LoadLimits
    seed: str = "0"
    num_warmup: int = 4
    preview_every: int | None = None
    sample_size: int = 4
    metrics: str | None = None

    def requests(self, purpose: str = "") -> Iterator[PlannedRequest]:
        seed = self.seed + purpose
        return (self.mix.request(seed, index, preview_every=self.preview_every) for index in itertools.count())

    def schedule(self) -> Iterator[tuple[float, PlannedRequest]]:
        for arrival, request in zip(self.loop.arrivals(self.seed), self.requests(), strict=False):
            if arrival.params:
                request = replace(request, kind="trace", asked=replace(request.asked, **arrival.params))
            yield arrival.at_s, request


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What came of a load. `examples` has, for each code, the first text that came with it."""

    records: list[Record]
    sampled: list[SampledPicture]
    observed: Mapping[str, Any]
    examples: Mapping[str, str]


OnRecord = Callable[[Record], None]


async def measure(
    plan: Plan,
    driver: Driver,
    *,
    on_record: OnRecord = lambda record: None,
    tls: ssl.SSLContext | None = None,
    headers: Mapping[str, str] | None = None,
) -> Measurement:
    """Warm the server up, then load it; no figure counts the warm-up. `tls` and `headers` are for the metrics."""
    loop = plan.loop
    if plan.num_warmup:
        warmup = LoadLimits(max_requests=plan.num_warmup, timeout_s=plan.limits.timeout_s)
        await closed_loop(driver, plan.requests("/warm-up"), min(plan.num_warmup, loop.callers or WARMUP_CALLERS), warmup)
    examples: dict[str, str] = {}
    sample = PictureSample(plan.sample_size, len(plan.mix.kinds), plan.seed)

    def on_answer(request: PlannedRequest, answer: Answer, record: Record) -> None:
        examples.setdefault(answer.code, answer.text)
        sample(request, answer, record)
        on_record(record)

    before = await _look(plan, driver, tls, headers)
    if loop.kind == "closed":
        records = await closed_loop(driver, plan.requests(), loop.callers or 1, plan.limits, on_answer)
    else:
        records = await open_loop(driver, plan.schedule(), plan.limits, on_answer)
    observed = _observed(before, await _look(plan, driver, tls, headers))
    examples.pop(OK, None)
    return Measurement(records=records, sampled=sample.pictures, observed=observed, examples=examples)


async def _look(plan: Plan, driver: Driver, tls: ssl.SSLContext | None, headers: Mapping[str, str] | None) -> _Look:
    """What the server reports now: `GetServerInfo` over our gRPC, and `/metrics` where the plan names it."""
    info = None
    if isinstance(driver, GrpcDriver):
        with contextlib.suppress(MiiServeError):
            info = await driver.server_info()
    if plan.metrics is None:
        return info, None
    from mii_serve.bench.observe import scrape

    return info, await scrape(plan.metrics, tls, headers)


def _observed(before: _Look, after: _Look) -> dict[str, Any]:
    """What the server did between two looks; under `text`, why its metrics could not be read."""
    observed: dict[str, Any] = {}
    if before[0] is not None and after[0] is not None:
        first, last = before[0].activity, after[0].activity
        if (num_calls := last.num_turns - first.num_turns) > 0:
            observed |= {"images_per_call": (last.num_steps - first.num_steps) / num_calls, "num_calls": num_calls}
    match before[1], after[1]:
        case (str(reason), _) | (_, str(reason)):
            observed["text"] = reason
        case (Mapping() as first_scrape, Mapping() as last_scrape):
            from mii_serve.bench.observe import between

            observed |= between(first_scrape, last_scrape)
    return observed


def describe_server(info: ServerInfo | None) -> dict[str, Any]:
    """What a result records of the server."""
    if info is None:
        return {}
    names = ("version", "deployment_name", "model", "model_revision", "engine", "dtype", "device", "has_safety_checker")
    slots = {"max_slots": info.activity.max_slots, "num_replicas": max(1, len(info.replicas))}
    return {**{name: getattr(info, name) for name in names}, **slots}


def describe_plan(plan: Plan, protocol: Protocol, target: str, target_s: float | None) -> dict[str, Any]:
    """What a result records of the load; `target_s` is the goodput's target in seconds."""
    return {
        "protocol": protocol,
        "target": target,
        "loop": str(plan.loop),
        "mix": plan.mix.describe(),
        "prompts": list(plan.mix.prompts),
        "seed": plan.seed,
        "num_warmup": plan.num_warmup,
        "preview_every": plan.preview_every,
        "target_s": target_s,
        "bounds": asdict(plan.limits),
    }
