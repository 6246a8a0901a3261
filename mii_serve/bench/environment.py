"""What a reader needs to repeat a measurement: commit, date, machine, versions, command. Unknown values are None."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mii_serve

PACKAGES = ("torch", "diffusers", "transformers", "grpcio", "protobuf", "numpy")
SOURCES = (":/", ":(top,exclude)benchmarks/results", ":(top,exclude)docs", ":(top,exclude)README.md")
"""The files a measurement depends on: a change of figures or of text does not make the commit dirty."""


def circumstances(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """The circumstances of a measurement on this machine, by this process, from this checkout."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": command(),
        "device": device(),
        "versions": {"mii_serve": mii_serve.__version__, "python": platform.python_version(), **versions(packages)},
    }


def command() -> str:
    """The command line, quoted for a shell. It never holds an API key, which comes from the environment."""
    script = Path(sys.argv[0])
    name = script.parent.name if script.name == "__main__.py" else script.name
    return shlex.join([name, *sys.argv[1:]])


def commit() -> str | None:
    """The commit of the checkout that holds this package, with `-dirty` if files differ from it; None outside a checkout."""
    folder = Path(mii_serve.__file__).parent
    known = _git(folder, "ls-files", "--error-unmatch", "__init__.py")
    head = None if known is None else _git(folder, "rev-parse", "HEAD")
    if head is None:
        return None
    return f"{head}-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no", "--", *SOURCES) else head


def device() -> str:
    """The processor's name and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def versions(packages: Sequence[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        ran = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None
