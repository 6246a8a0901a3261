"""`mii_serve bench`: send load to a server, check its images, and report the results.

Against a gRPC server the base installation is enough. `--protocol http`, `--metrics`, `--html` and YAML mixes need the extra
`bench`, and the check of the pictures needs the extra `server`.
"""

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
from urllib.parse import urlsplit

from rich.console import Console

from mii_serve.bench import arrivals, check, result, tables
from mii_serve.bench.environment import circumstances
from mii_serve.bench.http_client import http_address
from mii_serve.bench.load import LoadLimits
from mii_serve.bench.mix import parse_mix
from mii_serve.bench.run import Loop, Measurement, Plan, Protocol, describe_plan, describe_server, measure
from mii_serve.cli.connection import API_KEY_VARIABLE, Connection
from mii_serve.cli.exits import ExitCode, say
from mii_serve.errors import ConfigError, MiiServeError, UnavailableError
from mii_serve.extras import how_to_get, is_installed

if TYPE_CHECKING:
    from mii_serve.bench.load import Driver
    from mii_serve.bench.values import Record
    from mii_serve.types import ServerInfo

DEFAULT_CONCURRENCY = 8
DEFAULT_DURATION_S = 30.0
BUILT_IN_MODELS = ("demo", "random-sd-v1-4")


def run(values: dict[str, Any], connection: Connection) -> int:
    """Measure, check, report, and return the exit code.

    Raises:
        ConfigError: naming the flag and the rule.
        UnavailableError: the server does not answer.
    """
    plan = plan_of(values)
    protocol: Protocol = values["protocol"]
    for name in ("output", "html"):
        if values[name] is not None and not values[name].absolute().parent.is_dir():
            raise ConfigError(f"--{name}", f"no such folder: {values[name].absolute().parent}")
    _positive("--goodput", values["goodput"])
    if values["html"] is not None:  # before the load, not after it
        from mii_serve.bench import html
    if plan.metrics is not None:
        import mii_serve.bench.observe  # noqa: F401
    is_quiet = not sys.stderr.isatty()
    info, measured = asyncio.run(_measure(plan, protocol, connection, is_quiet=is_quiet))
    checked = _check(plan, measured, info, values, is_quiet=is_quiet)
    run = result.build(
        about=circumstances(),
        settings=describe_plan(plan, protocol, connection.target, values["goodput"]),
        server=describe_server(info),
        records=measured.records,
        observed=measured.observed,
        check=checked,
        examples=measured.examples,
    )
    if values["output"] is not None:
        values["output"].write_text(run.to_json())
    if values["html"] is not None:
        values["html"].write_text(html.page(run))
    if values["json"]:
        sys.stdout.write(run.to_json())
    else:
        tables.show(run, Console())
    if run.is_rejected:
        say("error: rejected: the server's images differ from the reference's")
        return ExitCode.REJECTED
    if not run.summary["num_ok"]:
        say("error: no request succeeded")
        return ExitCode.FAILED
    return ExitCode.OK


def compare(files: tuple[Path, Path], *, is_json: bool) -> int:
    """Print what differs between two results.

    Raises:
        ConfigError: a file is not a result.
    """
    first, second = (result.read(file) for file in files)
    compared = result.compare(first, second)
    if is_json:
        print(json.dumps(compared))
    else:
        tables.differences(compared, Console())
    return ExitCode.REJECTED if compared["rejected"] else ExitCode.OK


def plan_of(values: dict[str, Any]) -> Plan:
    """The plan that the flags define.

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
    return Plan(
        loop=_loop(values),
        mix=parse_mix(values["mix"]),
        limits=LoadLimits(
            duration_s=duration_s,
            max_requests=values["requests"],
            timeout_s=values["timeout"],
            max_in_flight=values["max_in_flight"],
        ),
        seed=values["seed"],
        num_warmup=values["warmup"],
        preview_every=values["preview_every"],
        sample_size=values["check"],
        metrics=None if values["metrics"] is None else http_address(values["metrics"]),
    )


def _loop(values: dict[str, Any]) -> Loop:
    given = [name for name in ("concurrency", "rate", "trace") if values[name] is not None]
    if len(given) > 1:
        raise ConfigError(f"--{given[1]}", f"cannot be combined with --{given[0]}: both define when requests start")
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
    # Not "value <= 0", which is false of NaN.
    if value is not None and not 0 < value < float("inf"):
        raise ConfigError(flag, f"must be a finite number above 0, got {value}")


# ---- the load ------------------------------------------------------------------------------------------------------


async def _measure(
    plan: Plan, protocol: Protocol, connection: Connection, *, is_quiet: bool
) -> tuple[ServerInfo | None, Measurement]:
    driver, info = await _open(protocol, connection)
    headers, tls = _http_settings(connection)
    try:
        with _progress(plan, is_quiet=is_quiet) as on_record:
            return info, await measure(plan, driver, on_record=on_record, tls=tls, headers=headers)
    finally:
        await driver.close()


async def _open(protocol: Protocol, connection: Connection) -> tuple[Driver, ServerInfo | None]:
    """A driver whose server answers.

    Raises:
        ModuleNotFoundError: the protocol needs a package that is not installed.
        UnavailableError: the server does not answer.
    """
    if protocol == "http":
        from mii_serve.bench.http_driver import HttpDriver

        address = http_address(connection.target)
        parts = urlsplit(address)
        await _reach(parts.hostname or "", parts.port or 0, connection.target)
        headers, tls = _http_settings(connection)
        return HttpDriver(address, tls=tls, headers=headers), None
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
    """Show a progress bar on stderr: of requests if their number is known, else of time."""
    if is_quiet:
        yield lambda record: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    limits = plan.limits
    total = limits.max_requests or (len(plan.loop.trace) or None)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[counts]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("load", total=total or limits.duration_s, counts="")
        seen = {"ok": 0, "other": 0}

        def on_record(record: Record) -> None:
            seen["ok" if record.is_ok else "other"] += 1
            done = sum(seen.values()) if total else min(record.ended_s, limits.duration_s or record.ended_s)
            counts = f"{seen['ok']} ok" + (f", {seen['other']} not" if seen["other"] else "")
            bars.update(task, completed=done, counts=f"{counts}, last {record.total_s:.2f} s")

        yield on_record


# ---- the check -----------------------------------------------------------------------------------------------------


def _check(
    plan: Plan, measured: Measurement, info: ServerInfo | None, values: dict[str, Any], *, is_quiet: bool
) -> check.PictureCheck:
    tolerance = check.Tolerance.of(None if info is None else info.dtype)
    if values["check_psnr"] is not None:
        tolerance = replace(tolerance, min_psnr_db=values["check_psnr"])
    model = values["check_model"] or _model_of(info)
    if reason := _why_unchecked(plan, measured, model):
        return check.PictureCheck(tolerance=tolerance, reference="none", text=reason)
    if not is_quiet:
        say(f"checking {len(measured.sampled)} images with the reference engine, {model}")
    with check.open_reference(model or "") as reference:
        return check.check(measured.sampled, reference, tolerance)


def _why_unchecked(plan: Plan, measured: Measurement, model: str | None) -> str:
    """Why the images cannot be checked; empty if they can."""
    if not plan.sample_size:
        return "--check 0"
    if not measured.sampled:
        return "there are no pictures"
    if model is None:
        return "--check-model names the model to check them with"
    if not is_installed("torch"):
        return f"torch is not installed: {how_to_get('server')}"
    return ""


def _model_of(info: ServerInfo | None) -> str | None:
    """The server's model, if its name is enough to load it here: a built-in model, or a hub id."""
    if info is None or not (info.model in BUILT_IN_MODELS or "/" in info.model):
        return None
    return info.model
