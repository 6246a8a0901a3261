"""`mii_serve status`: is the server there, what does it run, how busy is it."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING

from mii_serve.cli.connection import Connection
from mii_serve.cli.exits import ExitCode, exit_code_of, say
from mii_serve.errors import DeadlineExceededError, MiiServeError, UnavailableError

if TYPE_CHECKING:
    from rich.table import Table

    from mii_serve.types import Activity, LoraInfo, ServerInfo

SERVING = "SERVING"
UNREACHABLE = "UNREACHABLE"


def run(connection: Connection, *, timeout: float, is_json: bool) -> int:
    """Show the server and return the exit code."""
    target = connection.target
    health, info, failure = UNREACHABLE, None, None
    with connection.open() as client:
        try:
            health = client.health(timeout=timeout)
            info = client.server_info(timeout=timeout)
        except MiiServeError as error:
            if health == UNREACHABLE and not isinstance(error, UnavailableError | DeadlineExceededError):
                raise
            failure = error
    if is_json:
        described = None if info is None else asdict(info)
        print(json.dumps({"target": target, "health": health, "info": described}))
    elif health != UNREACHABLE:
        _show(target, health, info)
    if failure is not None:
        say(f"error: {failure}")
    if health != SERVING:
        if failure is None:
            say(f"error: {target} is not ready: its health is {health}")
        return ExitCode.UNAVAILABLE
    return ExitCode.OK if failure is None else exit_code_of(failure)


def _show(target: str, health: str, info: ServerInfo | None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("health", Text(health, style="green" if health == SERVING else "red"))
    table.add_row("target", Text(target))
    for name, value in _rows(info) if info is not None else ():
        table.add_row(name, Text(value))
    console = Console()
    console.print(table)
    if info is not None and info.replicas:
        console.print(_replica_table(info))


def _replica_table(info: ServerInfo) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("replica", "state", "restarts", "slots", "waiting", "images", "images per call", "up for", "devices"):
        is_text = name in ("replica", "state", "devices")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=name != "devices")
    for replica in info.replicas:
        state, activity = "ready" if replica.is_ready else "not ready", replica.activity
        row = [str(replica.index), state, str(replica.num_restarts)]
        if activity is not None:
            row += [f"{activity.num_running} of {activity.max_slots}", str(activity.num_waiting), str(activity.num_images)]
            row += [_occupancy(activity), str(timedelta(seconds=round(activity.uptime_s))), "\n".join(replica.devices)]
        table.add_row(*row)
    return table


def _occupancy(activity: Activity) -> str:
    return f"{activity.num_steps / activity.num_turns:.1f}" if activity.num_turns else "-"


def _default_scheduler(info: ServerInfo) -> str:
    options = ", ".join(f"{name}={value}" for name, value in sorted(info.default_scheduler_options.items()))
    how = "" if info.is_default_scheduler_compiled else "; not compiled"
    return f"{info.defaults.scheduler} ({info.default_scheduler_class}{': ' if options else ''}{options}{how})"


def _ranks(info: ServerInfo) -> str:
    return f", {info.num_ranks} ranks per replica, {info.parallelism}" if info.num_ranks > 1 else ""


def _lora(lora: LoraInfo) -> str:
    return f"{lora.name}, rank {lora.rank}" + (f"; {lora.note}" if lora.note else "")


def _rows(info: ServerInfo) -> list[tuple[str, str]]:
    defaults, limits, activity = info.defaults, info.limits, info.activity
    return [
        ("version", info.version),
        ("deployment", info.deployment_name),
        ("model", f"{info.model} {info.model_revision}".rstrip()),
        ("engine", f"{info.engine} {info.dtype} on {info.device}{_ranks(info)}"),
        *([("", info.engine_note)] if info.engine_note else []),
        *([("kernels", info.engine_kernels)] if info.engine_kernels else []),
        *([("takes", "images with a mask: it is an inpainting model")] if info.needs_mask else []),
        *([("LoRAs", "\n".join(map(_lora, info.loras)))] if info.loras else []),
        ("safety checker", "on" if info.has_safety_checker else "none: images are not checked"),
        (
            "defaults",
            f"{_default_scheduler(info)}, {defaults.num_inference_steps} steps, guidance {defaults.guidance_scale:g}, "
            f"{defaults.width}x{defaults.height}",
        ),
        (
            "limits",
            f"{limits.max_num_inference_steps} steps, guidance {limits.max_guidance_scale:g}, "
            f"{limits.min_size_px} to {limits.max_size_px} px, {limits.max_images_per_prompt} images, "
            f"{limits.max_prompt_chars} characters",
        ),
        ("schedulers", f"{len(set(info.schedulers.values()))}; --json lists them"),
        ("up for", str(timedelta(seconds=round(activity.uptime_s)))),
        ("slots", f"{activity.num_running} of {activity.max_slots} in use, {activity.num_waiting} images waiting"),
        (
            "served",
            f"{activity.num_requests} requests ({activity.num_cancelled_requests} cancelled), "
            f"{activity.num_images} images, {activity.num_steps} steps",
        ),
    ]
