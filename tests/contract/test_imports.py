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


DEFERRED = """
import sys
from mii_serve.config import DeployConfig
from mii_serve.models.deferred import import_for_drawing
from mii_serve.replica.process import HEAVY_MODULES
from mii_serve.replica.local import open_local
from mii_serve.types import GenerationRequest, RequestedParams

import_for_drawing(*HEAVY_MODULES)
with open_local(DeployConfig.load({"device": "cpu", "max_slots": 1})) as local:
    local.generate(GenerationRequest(params=RequestedParams(prompt="a red circle", num_inference_steps=1)))
packages = ("torch._dynamo", "torch._inductor", "triton", "scipy.stats", "scipy.optimize", "scipy.integrate")
print({".".join(name.split(".")[:2]) for name in sys.modules if name.startswith(tuple(f"{each}." for each in packages))})
print(len([name for name in sys.modules if name.startswith("transformers.models.")]))

import torch
from diffusers import EulerDiscreteScheduler, LMSDiscreteScheduler

EulerDiscreteScheduler(use_beta_sigmas=True).set_timesteps(4)
lms = LMSDiscreteScheduler()
lms.set_timesteps(4)
lms.step(torch.zeros(1), lms.timesteps[0], torch.zeros(1))
import torch._dynamo.config
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from scipy.optimize import linear_sum_assignment
from transformers.models import bert

with TransformGetItemToIndex():
    print(torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)).item())
print(linear_sum_assignment([[0, 1], [1, 0]])[1].tolist(), bert.BertConfig().model_type)
"""


@pytest.mark.slow
def test_what_drawing_does_not_use_a_replica_imports_only_when_something_asks_for_it() -> None:
    ran = subprocess.run([sys.executable, "-c", DEFERRED], capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert ran.returncode == 0, ran.stderr
    extra, num_models, *others = ran.stdout.splitlines()
    assert extra == "{'torch._dynamo'}"  # ._trace_wrapped_higher_order_op, which is deferred as well
    assert int(num_models) < 60
    assert others == ["2.0", "[0, 1] bert"]
