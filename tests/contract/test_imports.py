"""What starts, or is imported, stays small: processes of their own show which libraries came along."""

from __future__ import annotations

import subprocess
import sys

import pytest
from patience import PATIENCE_S


def imported(script: str, *libraries: str) -> list[str]:
    """Which of these libraries a script has imported at its end."""
    code = f"import sys\n{script}\nprint([name for name in {libraries} if name in sys.modules], file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    return ran.stderr.strip().strip("[]").split()


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["--version"],
        ["bench", "--help"],
        ["bench", "compare", "--help"],
        ["deploy", "--help"],
        ["doctor", "-h"],
        ["evaluate", "-h"],
        ["generate", "-h"],
        ["status", "-h"],
        ["verify", "-h"],
    ],
)
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    script = f"""
from mii_serve.cli import main
try:
    main({argv})
except SystemExit as left:
    assert not left.code
"""
    heavy = ("torch", "diffusers", "transformers", "grpc", "pydantic", "PIL", "rich", "asyncio")
    assert imported(script, *heavy) == []


@pytest.mark.parametrize(
    ("module", "libraries"),
    [
        ("mii_serve.models", ("torch", "diffusers", "transformers", "huggingface_hub", "pydantic", "numpy")),
        ("mii_serve.models.check", ("torch",)),
        ("mii_serve.models.source", ("torch",)),
        ("mii_serve.server.deploy", ("azure", "aiohttp", "PIL")),
    ],
)
def test_a_module_leaves_out_what_it_does_not_need(module: str, libraries: tuple[str, ...]) -> None:
    assert imported(f"import {module}", *libraries) == []


def test_the_client_needs_grpc_protobuf_and_pillow_only() -> None:
    code = """
import sys
before = {*sys.modules, *sys.stdlib_module_names}
import mii_serve.client
print(*sorted({name.partition(".")[0] for name in sys.modules} - before))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    # grpc imports its companion packages wherever they are installed, and is written in Cython.
    others = [name for name in ran.stdout.split() if not name.startswith(("grpc", "cython", "_cython"))]
    assert set(others) <= {"mii_serve", "google", "PIL", "typing_extensions"}
