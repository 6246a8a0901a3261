"""`mii_serve doctor`: what this machine has, what each engine needs, and the command that installs what is missing."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from mii_serve.cli.exits import ExitCode
from mii_serve.engine.engine_times import newest_times
from mii_serve.engine.kernel_choices import kept_choices
from mii_serve.engine.machine import PACKAGES, Machine, inspect_machine
from mii_serve.engine.requirements import first_missing, preferred, requirements
from mii_serve.extras import how_to_get
from mii_serve.types import ENGINES, EngineChoice

GIB = 1 << 30

EXTRAS = {
    "http": (("starlette", "uvicorn"), how_to_get("http")),
    "otel": (("opentelemetry-sdk",), how_to_get("otel")),
    "mii": (
        ("deepspeed-mii",),
        "pip install --no-deps deepspeed-mii==0.3.3 && pip install ujson pyzmq Flask-RESTful",
    ),
}
"""What is missing only to those who want it: the HTTP port, traces, MII's own configuration classes."""


def run(engine: EngineChoice, *, is_json: bool) -> int:
    """Print the verdict; the exit code is about `engine`."""
    machine = inspect_machine()
    chosen = preferred(machine, newest_times()) if engine == "auto" else engine
    if is_json:
        print(json.dumps(as_json(machine), indent=1))
    else:
        _show(machine)
    return ExitCode.OK if first_missing(chosen, machine) is None else ExitCode.FAILED


def as_json(machine: Machine) -> dict[str, Any]:
    """Everything the table says, with names that stay."""
    found = asdict(machine)
    if machine.extensions is not None:
        found["extensions"]["names"] = sorted(machine.extensions.names)
    return {
        "machine": found,
        "engines": {
            engine: {
                "is_usable": first_missing(engine, machine) is None,
                "requirements": [asdict(one) for one in requirements(engine, machine)],
            }
            for engine in ENGINES
        },
        "extras": {
            extra: {"is_installed": not _missing(machine, packages), "remedy": remedy if _missing(machine, packages) else ""}
            for extra, (packages, remedy) in EXTRAS.items()
        },
        "fused_kernels": [{"device": one.device, "chosen": one.summary()} for one in kept_choices()],
        "auto": preferred(machine, newest_times()),
        "max_gpu_ranks": _max_gpu_ranks(machine),
    }


def _max_gpu_ranks(machine: Machine) -> int:
    """Of all replicas together; several need Linux."""
    return len(machine.gpus) if machine.system.startswith("Linux") else min(1, len(machine.gpus))


def _missing(machine: Machine, packages: tuple[str, ...]) -> bool:
    return any(name not in machine.packages for name in packages)


def _show(machine: Machine) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    for name, value in _facts(machine):
        table.add_row(name, Text(value))
    console.print(table)
    for engine in ENGINES:
        missing = first_missing(engine, machine)
        console.print(f"\n{engine}: " + ("can run" if missing is None else "cannot run"), style="bold")
        for one in requirements(engine, machine):
            _show_line(console, one.is_met, f"{one.what}: {one.found}", one.remedy)
    console.print("\nextras", style="bold")
    for extra, (packages, remedy) in EXTRAS.items():
        is_missing = _missing(machine, packages)
        _show_line(console, not is_missing, f"{extra}: {'not installed' if is_missing else 'installed'}", remedy)
    if kept := kept_choices():
        console.print("\nfused kernels, as measured by the native engine", style="bold")
        for choice in kept:
            console.print(Text(f"  {choice.device}: {choice.summary()}"))
    times = newest_times()
    console.print(f"\nauto takes: {preferred(machine, times)}", style="bold")
    if times is not None:
        console.print(Text(f"  {times.device}: {times.summary()}"))


def _show_line(console: Any, is_met: bool, text: str, remedy: str) -> None:
    from rich.text import Text

    mark, style = ("ok     ", "green") if is_met else ("missing", "red")
    console.print(Text(f"  {mark} ", style=style) + Text(text, style=""))
    if not is_met:
        console.print(Text(f"          {remedy}"))


def _facts(machine: Machine) -> list[tuple[str, str]]:
    gpus = [
        f"{gpu.name}, {gpu.memory_bytes / GIB:.0f} GiB, compute capability {'.'.join(map(str, gpu.compute_capability))}"
        for gpu in machine.gpus
    ]
    return [
        ("system", f"{machine.system}, {machine.num_cores} cores"),
        ("python", machine.python),
        *((name, machine.packages[name]) for name in PACKAGES if name in machine.packages),
        ("nvcc", machine.nvcc or "none"),
        *(("gpu", gpu) for gpu in gpus or ["none"]),
        ("ranks", f"{_max_gpu_ranks(machine)} on GPUs, over all replicas; --tensor-parallel N takes N for each"),
    ]
