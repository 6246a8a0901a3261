"""What the base dependencies are enough for, in processes that can import nothing else."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import re
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S
from servers import running_server

ROOT = Path(__file__).resolve().parents[2]
BASE: list[str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
POSIX_MODULES = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")
POSIX_NAMES = {
    "os": ("fork", "getpgid", "getuid", "killpg", "sched_getaffinity", "setsid", "uname"),
    "select": ("epoll", "poll"),
    "signal": ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "pthread_sigmask"),
}
ONLY_BASE = """
import sys

class OnlyBase:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in allowed:
            return next((spec for finder in finders if (spec := finder.find_spec(name, path, target))), None)

allowed = {*sys.argv.pop(1).split(","), *sys.stdlib_module_names}
finders = sys.meta_path.copy()
sys.meta_path[:] = [OnlyBase]
"""
"""Takes the allowed top-level modules from the command line. To this process nothing else is installed."""
NO_POSIX = f"""
import asyncio, builtins, os, select, signal, socket, subprocess, sys, tempfile, threading
import grpc, PIL.Image, rich.console, rich.progress  # these have their own ways on each system

real, modules = builtins.__import__, {POSIX_MODULES}

def portable(name, scope=None, *rest, **more):
    if name.partition(".")[0] in modules and (scope or {{}}).get("__name__", "").startswith("mii_serve"):
        raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
    return real(name, scope, *rest, **more)

builtins.__import__ = portable
for module, names in {POSIX_NAMES}.items():
    for name in names:
        delattr(sys.modules[module], name) if hasattr(sys.modules[module], name) else None
"""
"""As a system has it that is not POSIX: the package finds none of these modules, and these names are not found."""
COMMAND = "\nfrom mii_serve.cli import main\nmain()\n"
LIGHT_MODULES = (
    "mii_serve.client",
    "mii_serve.cli.command_line",
    "mii_serve.cli.bench",
    "mii_serve.cli.deploy",
    "mii_serve.cli.doctor",
    "mii_serve.cli.generate",
    "mii_serve.cli.status",
    "mii_serve.cli.verify",
    "mii_serve.bench.grpc_driver",
    "mii_serve.bench.mii_driver",
    "mii_serve.bench.environment",
)
COMMANDS = (
    "",
    "batch",
    "bench",
    "bench compare",
    "config",
    "config schema",
    "config show",
    "deploy",
    "doctor",
    "evaluate",
    "export-mlflow",
    "generate",
    "status",
    "verify",
)


def base_modules() -> set[str]:
    """The top-level modules of the base dependencies and of what they need in turn."""
    waiting, seen, found = [_name(one) for one in BASE], set[str](), {"mii_serve"}
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        needed = importlib.metadata.requires(name) or ()
        waiting += [_name(one) for one in needed if "extra ==" not in one and "python_version <" not in one]
    for module, distributions in importlib.metadata.packages_distributions().items():
        if seen & {_name(one) for one in distributions}:
            found.add(module)
    return found


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=;~! (]", requirement, maxsplit=1)[0].lower().replace("_", "-")


class Ran:
    def __init__(self, code: int | None, out: bytes, err: bytes) -> None:
        self.code, self.out, self.err = code, out.decode(), err.decode()


async def python(code: str, *arguments: str, folder: Path) -> Ran:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, *arguments),
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(PATIENCE_S):
        out, err = await process.communicate()
    return Ran(process.returncode, out, err)


async def light(arguments: Iterable[str], folder: Path, *, before: str = "") -> Ran:
    """The command, in a process that can import the base dependencies only."""
    code = ONLY_BASE + before + COMMAND
    return await python(code, ",".join(base_modules()), *arguments, folder=folder)


class TestOnTheBaseAlone:
    def test_the_base_has_nothing_heavy(self):
        assert base_modules().isdisjoint(
            {
                "torch",
                "numpy",
                "pydantic",
                "yaml",
                "starlette",
                "uvicorn",
                "h11",
                "httpx2",
                "prometheus_client",
                "opentelemetry",
            }
        )

    async def test_the_sdk_can_be_imported(self, tmp_path):
        ran = await python(ONLY_BASE + "import mii_serve.client", ",".join(base_modules()), folder=tmp_path)
        assert (ran.code, ran.err) == (0, "")

    async def test_every_command_shows_its_help(self, tmp_path):
        code = """
import subprocess
from mii_serve.cli.command_line import main
for argv in sys.argv[1:]:
    try:
        main([*argv.split(), "--help"])
    except SystemExit as left:
        assert not left.code, argv
"""
        ran = await python(ONLY_BASE + code, ",".join(base_modules()), *COMMANDS, folder=tmp_path)
        assert (ran.code, ran.err) == (0, "") and ran.out.count("exit codes:") == len(COMMANDS)

    @pytest.mark.slow
    @pytest.mark.parametrize("before", ["", NO_POSIX], ids=["here", "without what only POSIX has"])
    async def test_a_server_is_looked_at_asked_and_loaded(self, tmp_path, before):
        async with running_server(tmp_path, FakeEngine()) as server:
            target = ("--target", server.target)
            status = await light(("status", "--json", *target), tmp_path, before=before)
            assert (status.code, status.err) == (0, "") and json.loads(status.out)["health"] == "SERVING"
            status = await light(("status", *target), tmp_path, before=before)
            assert (status.code, status.err) == (0, "") and "SERVING" in status.out

            asked = await light(("generate", "a circle", "-o", "circle.png", *target), tmp_path, before=before)
            assert (asked.code, asked.out) == (0, "circle.png\n") and (tmp_path / "circle.png").is_file()

            few = ("--requests", "12", "--concurrency", "3", "--warmup", "1", "-o", "run.json")
            loaded = await light(("bench", *few, *target), tmp_path, before=before)
            assert loaded.code == 0, loaded.err
            run = json.loads((tmp_path / "run.json").read_text())
            assert run["summary"]["num_ok"] == 12
            assert run["check"]["is_ok"] is None
            loaded = await light(("bench", "--protocol", "mii", *few, *target), tmp_path, before=before)
            assert loaded.code == 0, loaded.err

    @pytest.mark.parametrize(
        ("command", "extra"),
        [
            ("deploy demo", "server"),
            ("generate circle", "server"),
            ("verify", "server"),
            ("evaluate in.csv -o out --guidance 1", "server"),
            ("config show", "server"),
            ("config schema", "server"),
            ("export-mlflow demo exported", "mlflow"),
        ],
    )
    async def test_every_other_command_names_the_extra_it_needs(self, tmp_path, command, extra):
        ran = await light(command.split(), tmp_path)
        assert (ran.code, ran.out) == (6, ""), ran.err
        assert re.fullmatch(rf"error: \w+ is not installed: install mii_serve with the extra {extra}: .*\n", ran.err)

    @pytest.mark.parametrize("flags", ["--protocol http", "--metrics 127.0.0.1:1", "--mix mix.yaml", "--html run.html"])
    async def test_a_load_that_needs_more_names_its_extra_before_it_starts(self, tmp_path, flags):
        (tmp_path / "mix.yaml").write_text("kinds: [{weight: 1}]\n")
        ran = await light(("bench", *flags.split()), tmp_path)
        assert (ran.code, ran.out) == (6, ""), ran.err
        assert re.fullmatch(r"error: \w+ is not installed: install mii_serve with the extra bench: .*\n", ran.err)

    async def test_the_doctor_names_it_too(self, tmp_path):
        ran = await light(("doctor",), tmp_path)
        assert (ran.code, ran.err) == (1, "") and "install mii_serve with the extra server" in ran.out


async def test_nothing_on_the_way_to_a_server_is_for_one_system_only(tmp_path):
    imports = "".join(f"import {module}\n" for module in LIGHT_MODULES)
    ran = await python(NO_POSIX + imports, folder=tmp_path)
    assert (ran.code, ran.err) == (0, "")
