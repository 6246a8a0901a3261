"""`mii_serve verify` on a GPU, through captured graphs. Not yet run on one."""

from __future__ import annotations

import pytest
import torch

from mii_serve.config import DeployConfig
from mii_serve.verify.runs import verify_once

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def no_tf32():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_native_engine_passes_on_a_gpu(dtype):
    report = verify_once(DeployConfig.load({"model": "demo", "engine": "native", "device": "cuda", "dtype": dtype}))
    assert report.is_passed, "\n".join([*report.lines(), report.verdict])
    assert report.engine.device.startswith("cuda")
    assert "not yet measured on a GPU" in report.limits_measured
