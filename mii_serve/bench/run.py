"""One benchmark from warm-up to the records: asks, watches and keeps what the report needs."""

from __future__ import annotations

import contextlib
import itertools
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from mii_serve.bench.arrivals import Arrival, constant, poisson
from mii_serve.bench.check import Kept, Sampler
from mii_serve.bench.grpc_driver import GrpcDriver
from mii_serve.bench.http_wire import Url
from mii_serve.bench.load import Bounds, Driver, closed_loop, open_loop
from mii_serve.bench.mix import Mix
from mii_serve.bench.observe import between, between_activities, scrape
from mii_serve.bench.values import Answer, PlannedRequest, Record
from mii_serve.errors import MiiServeError
from mii_serve.types import ServerInfo

Protocol = Literal["grpc", "http", "mii"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """How requests come: `callers` that each wait for their answer, `rate` a second, or at the times of a `trace`."""

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
    """What is measured."""

    loop: Loop
    mix: Mix
    bounds: Bounds
    seed: str = "0"
    num_warmup: int = 4
    preview_every: int | None = None
    sample_size: int = 4
    metrics: Url | None = None

    def requests(self, purpose: str = "") -> Iterator[PlannedRequest]:
        seed = self.seed + purpose
        return (self.mix.request(seed, index, preview_every=self.preview_every) for index in itertools.count())

    def schedule(self) -> Iterator[tuple[float, PlannedRequest]]:
        for arrival, request in zip(self.loop.arrivals(self.seed), self.requests(), strict=False):
            if arrival.params:
                request = replace(request, kind="trace", asked=replace(request.asked, **arrival.params))
            yield arrival.at_s, request


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """`examples` has for each code what was said the first time it came."""

    records: list[Record]
    kept: list[Kept]
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
) -> Measured:
    """Warm up, then load; the warm-up is in no figure."""
    bounds, loop = plan.bounds, plan.loop
    if plan.num_warmup:
        warm = Bounds(max_requests=plan.num_warmup, timeout_s=bounds.timeout_s)
        await closed_loop(driver, plan.requests("/warm-up"), min(plan.num_warmup, loop.callers or 4), warm)
    examples: dict[str, str] = {}
    sampler = Sampler(plan.sample_size, len(plan.mix.kinds), plan.seed)

    def on_answer(request: PlannedRequest, answer: Answer, record: Record) -> None:
        examples.setdefault(answer.code, answer.text)
        sampler(request, answer, record)
        on_record(record)

    before_info = await _info(driver)
    before = None if plan.metrics is None else await scrape(plan.metrics, tls, headers)
    if loop.kind == "closed":
        records = await closed_loop(driver, plan.requests(), loop.callers or 1, bounds, on_answer)
    else:
        records = await open_loop(driver, plan.schedule(), bounds, on_answer)
    observed: dict[str, Any] = {}
    after_info = await _info(driver)
    if before_info is not None and after_info is not None:
        observed |= between_activities(before_info.activity, after_info.activity)
    if plan.metrics is not None and before is not None:
        after = await scrape(plan.metrics, tls, headers)
        if isinstance(before, str) or isinstance(after, str):
            observed["text"] = before if isinstance(before, str) else after
        else:
            observed |= between(before, after)
    examples.pop("OK", None)
    return Measured(records=records, kept=sampler.kept, observed=observed, examples=examples)


async def _info(driver: Driver) -> ServerInfo | None:
    if isinstance(driver, GrpcDriver):
        with contextlib.suppress(MiiServeError):
            return await driver.server_info()
    return None


def described(info: ServerInfo | None) -> dict[str, Any]:
    """What a result keeps of a server."""
    if info is None:
        return {}
    names = ("version", "deployment_name", "model", "model_revision", "engine", "dtype", "device", "has_safety_checker")
    slots = {"max_slots": info.activity.max_slots, "num_replicas": max(1, len(info.replicas))}
    return {**{name: getattr(info, name) for name in names}, **slots}


def settings(plan: Plan, protocol: Protocol, target: str, target_s: float | None) -> dict[str, Any]:
    """What a result keeps of a plan."""
    return {
        "protocol": protocol,
        "target": target,
        "loop": str(plan.loop),
        "mix": plan.mix.described(),
        "prompts": list(plan.mix.prompts),
        "seed": plan.seed,
        "num_warmup": plan.num_warmup,
        "preview_every": plan.preview_every,
        "target_s": target_s,
        "bounds": asdict(plan.bounds),
    }
