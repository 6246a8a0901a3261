"""`mii_serve bench`: a load, its figures, and whether they count."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mii_serve.bench import arrivals, check, html, result, tables
from mii_serve.bench.load import Bounds
from mii_serve.bench.mix import parse_mix
from mii_serve.bench.run import Loop, Measured, Plan, Protocol, described, measure, settings
from mii_serve.cli.connection import API_KEY_VARIABLE, Connection
from mii_serve.cli.exits import ExitCode, say
from mii_serve.errors import ConfigError, MiiServeError, UnavailableError

if TYPE_CHECKING:
    from mii_serve.bench.load import Driver
    from mii_serve.bench.values import Record
    from mii_serve.types import ServerInfo

DEFAULT_CONCURRENCY = 8
DEFAULT_DURATION_S = 30.0
MODELS_KNOWN_BY_NAME = ("demo", "random-sd-v1-4")


def run(values: dict[str, Any], connection: Connection) -> int:
    """Measure, check, report, and return the exit code.

    Raises:
        ConfigError: naming the flag and the rule.
        UnavailableError: nobody answers there.
    """
    plan = plan_of(values)
    protocol: Protocol = values["protocol"]
    for name in ("output", "html"):
        if values[name] is not None and not values[name].absolute().parent.is_dir():
            raise ConfigError(f"--{name}", f"no such folder: {values[name].absolute().parent}")
    _positive("--goodput", values["goodput"])
    is_quiet = not sys.stderr.isatty()
    info, measured = asyncio.run(_measure(plan, protocol, connection, is_quiet=is_quiet))
    verdict = _check(plan, measured, info, values, is_quiet=is_quiet)
    from mii_serve.bench.environment import circumstances

    made = result.make(
        about=circumstances(),
        settings=settings(plan, protocol, connection.target, values["goodput"]),
        server=described(info),
        records=measured.records,
        observed=measured.observed,
        verdict=verdict,
        examples=measured.examples,
    )
    if values["output"] is not None:
        values["output"].write_text(made.to_json())
    if values["html"] is not None:
        values["html"].write_text(html.page(made))
    if values["json"]:
        sys.stdout.write(made.to_json())
    else:
        tables.show(made, Console())
    if made.is_rejected:
        say("error: rejected: the server's pictures are not those of the reference")
        return ExitCode.REJECTED
    if not made.summary["num_ok"]:
        say("error: no request went well")
        return ExitCode.FAILED
    return ExitCode.OK


def compare(files: tuple[Path, Path], *, is_json: bool) -> int:
    """Say what differs between two results.

    Raises:
        ConfigError: a file is none.
    """
    first, second = (result.read(file) for file in files)
    compared = result.compare(first, second)
    if is_json:
        print(json.dumps(compared))
    else:
        tables.differences(compared, Console())
    return ExitCode.REJECTED if compared["rejected"] else ExitCode.OK


def plan_of(values: dict[str, Any]) -> Plan:
    """The plan that the flags describe.

    Raises:
        ConfigError: naming the flag and the rule.
    """
    for name in ("requests", "max_in_flight", "concurrency", "preview_every", "rate", "trace_speed", "duration", "timeout"):
        _positive(f"--{name.replace('_', '-')}", values[name])
    for name in ("warmup", "check"):
        if values[name] < 0:
            raise ConfigError(f"--{name}", f"must be 0 or more, got {values[name]}")
    duration_s = values["duration"]
    if duration_s is None and values["requests"] is None and values["trace"] is None:
        duration_s = DEFAULT_DURATION_S
    from mii_serve.bench.http_wire import Url

    return Plan(
        loop=_loop(values),
        mix=parse_mix(values["mix"]),
        bounds=Bounds(
            duration_s=duration_s,
            max_requests=values["requests"],
            timeout_s=values["timeout"],
            max_in_flight=values["max_in_flight"],
        ),
        seed=values["seed"],
        num_warmup=values["warmup"],
        preview_every=values["preview_every"],
        sample_size=values["check"],
        metrics=None if values["metrics"] is None else Url.parse(values["metrics"]),
    )


def _loop(values: dict[str, Any]) -> Loop:
    given = [name for name in ("concurrency", "rate", "trace") if values[name] is not None]
    if len(given) > 1:
        raise ConfigError(f"--{given[1]}", f"cannot go with --{given[0]}: they are different ways for requests to come")
    for name, partner in (("arrivals", "rate"), ("trace_speed", "trace")):
        if values[name] is not None and values[partner] is None:
            raise ConfigError(f"--{name.replace('_', '-')}", f"needs --{partner}")
    if values["rate"] is not None:
        return Loop(kind=values["arrivals"] or "poisson", rate=values["rate"])
    if values["trace"] is not None:
        trace = arrivals.read_trace(values["trace"], speed=values["trace_speed"] or 1.0)
        return Loop(kind="trace", trace=trace, name=values["trace"].name)
    return Loop(kind="closed", callers=values["concurrency"] or DEFAULT_CONCURRENCY)


def _positive(flag: str, value: float | None) -> None:
    # Not "value <= 0": a NaN is not above 0 either.
    if value is not None and not 0 < value < float("inf"):
        raise ConfigError(flag, f"must be a finite number above 0, got {value}")


# ---- the load ------------------------------------------------------------------------------------------------------


async def _measure(
    plan: Plan, protocol: Protocol, connection: Connection, *, is_quiet: bool
) -> tuple[ServerInfo | None, Measured]:
    driver, info = await _open(protocol, connection)
    headers, tls = _http_settings(connection)
    try:
        with _progress(plan, is_quiet=is_quiet) as on_record:
            return info, await measure(plan, driver, on_record=on_record, tls=tls, headers=headers)
    finally:
        await driver.close()


async def _open(protocol: Protocol, connection: Connection) -> tuple[Driver, ServerInfo | None]:
    """A driver whose server is there.

    Raises:
        UnavailableError: it is not.
    """
    if protocol == "http":
        from mii_serve.bench.http_driver import HttpDriver
        from mii_serve.bench.http_wire import Url

        url = Url.parse(connection.target)
        await _reach(url.host, url.port, connection.target)
        headers, tls = _http_settings(connection)
        return HttpDriver(url, tls=tls, headers=headers), None
    key = os.environ.get(API_KEY_VARIABLE)
    metadata = (("authorization", f"Bearer {key}"),) if key else ()
    credentials = connection.credentials()
    if protocol == "mii":
        from mii_serve.bench.mii_driver import MiiDriver

        host, _, port = connection.target.rpartition(":")
        if host and port.isdigit():
            await _reach(host.strip("[]"), int(port), connection.target)
        return MiiDriver(connection.target, credentials=credentials, metadata=metadata), None
    from mii_serve.bench.grpc_driver import GrpcDriver

    driver = GrpcDriver(connection.target, credentials=credentials, metadata=metadata)
    try:
        return driver, await driver.server_info()
    except MiiServeError:
        await driver.close()
        raise


async def _reach(host: str, port: int, target: str) -> None:
    try:
        async with asyncio.timeout(10.0):
            _, writer = await asyncio.open_connection(host, port)
            writer.close()
    except (OSError, TimeoutError) as error:
        raise UnavailableError(f"no answer from {target}: {error or 'timed out'}") from None


def _http_settings(connection: Connection) -> tuple[dict[str, str], ssl.SSLContext | None]:
    key = os.environ.get(API_KEY_VARIABLE)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    if connection.tls_ca is None:
        return headers, None
    connection.credentials()  # says which file cannot be used
    tls = ssl.create_default_context(cafile=str(connection.tls_ca))
    if connection.tls_cert is not None:
        tls.load_cert_chain(connection.tls_cert, connection.tls_key)
    return headers, tls


@contextmanager
def _progress(plan: Plan, *, is_quiet: bool) -> Iterator[Callable[[Record], None]]:
    """A bar on stderr, of the requests where their number is known and else of the time."""
    if is_quiet:
        yield lambda record: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    bounds = plan.bounds
    total = bounds.max_requests or (len(plan.loop.trace) or None)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("load", total=total or bounds.duration_s, told="")
        seen = {"ok": 0, "other": 0}

        def on_record(record: Record) -> None:
            seen["ok" if record.is_ok else "other"] += 1
            done = sum(seen.values()) if total else min(record.ended_s, bounds.duration_s or record.ended_s)
            told = f"{seen['ok']} answered" + (f", {seen['other']} not" if seen["other"] else "")
            bars.update(task, completed=done, told=f"{told}, last {record.total_s:.2f} s")

        yield on_record


# ---- the check -----------------------------------------------------------------------------------------------------


def _check(plan: Plan, measured: Measured, info: ServerInfo | None, values: dict[str, Any], *, is_quiet: bool) -> check.Verdict:
    tolerance = check.Tolerance.of(None if info is None else info.dtype)
    if values["check_psnr"] is not None:
        tolerance = replace(tolerance, min_psnr_db=values["check_psnr"])
    if not plan.sample_size:
        return check.Verdict(tolerance=tolerance, reference="none", text="--check 0")
    if not measured.kept:
        return check.Verdict(tolerance=tolerance, reference="none", text="no picture came")
    model = values["check_model"] or _model_of(info)
    if model is None:
        return check.Verdict(tolerance=tolerance, reference="none", text="--check-model says which model to hold them against")
    if not is_quiet:
        say(f"checking {len(measured.kept)} pictures against the reference engine, {model}")
    with check.open_reference(model) as reference:
        return check.check(measured.kept, reference, tolerance)


def _model_of(info: ServerInfo | None) -> str | None:
    """What the server calls its model, where that is enough to load it here: a built-in one, or a hub id."""
    if info is None or not (info.model in MODELS_KNOWN_BY_NAME or "/" in info.model):
        return None
    return info.model
