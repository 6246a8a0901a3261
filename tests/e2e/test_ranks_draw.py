"""A replica of four ranks, asked over gRPC for many pictures at once, draws the reference's and leaves no process behind."""

from __future__ import annotations

import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from deployments import deployed, until
from diffusers import UNet2DConditionModel
from drawing import finish, most_different, real_engine, sample
from patience import PATIENCE_S
from PIL import Image
from sharded_ranks import V1, torch

from mii_serve.client import Client
from mii_serve.models.random_init import DEMO_FOLDER
from mii_serve.types import Picture

NUM_RANKS = 4
REQUESTS = [
    {"seed": 1, "num_inference_steps": 9, "guidance_scale": 7.5, "scheduler": "pndm", "prompt": "a red circle"},
    {"seed": 2, "num_inference_steps": 6, "guidance_scale": 1.0, "scheduler": "ddim", "prompt": "a green square"},
    {"seed": 3, "num_inference_steps": 8, "guidance_scale": 4.0, "scheduler": "euler_a", "prompt": "a star"},
    {"seed": 4, "num_inference_steps": 5, "guidance_scale": 3.0, "scheduler": "dpm++_2m", "prompt": "a hill", "width": 96},
    {"seed": 5, "num_inference_steps": 7, "guidance_scale": 0.0, "scheduler": "euler", "prompt": "a blue star"},
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The demo with a UNet that has the levels, heads and groups of Stable Diffusion v1, and random weights."""
    folder = tmp_path_factory.mktemp("models") / "v1"
    shutil.copytree(DEMO_FOLDER, folder)
    shutil.rmtree(folder / "unet")
    torch.manual_seed(0)
    width = UNet2DConditionModel.load_config(str(DEMO_FOLDER / "unet"))["cross_attention_dim"]
    UNet2DConditionModel(**{**V1, "cross_attention_dim": width, "sample_size": 8}).save_pretrained(folder / "unet")
    return str(folder)


def test_requests_that_share_calls_are_drawn_as_the_reference_draws_each(model):
    settings = ("--tensor-parallel", str(NUM_RANKS), "--engine", "native", "--device", "cpu", "--disable-safety-checker")
    with deployed(model, *settings) as deployment, Client(deployment.grpc) as client, ThreadPoolExecutor(5) as callers:
        drawn = list(callers.map(lambda asked: client.generate(**asked, timeout=PATIENCE_S), REQUESTS))
        info = client.server_info()
        [rank_0] = deployment.replica_pids()
        ranks = [psutil.Process(rank_0), *psutil.Process(rank_0).children()]
        assert deployment.stop(signal.SIGTERM) == 0
        until(lambda: not any(rank.is_running() for rank in ranks), "no rank is left")
    assert len(ranks) == NUM_RANKS
    assert (info.num_ranks, info.parallelism, info.device) == (NUM_RANKS, "rows", "cpu")
    [replica] = info.replicas
    assert replica.devices == ("cpu, 1 thread",) * NUM_RANKS
    assert info.activity.num_turns < info.activity.num_steps, "they have shared calls"
    reference = real_engine("reference", model=model)
    for asked, result in zip(REQUESTS, drawn, strict=True):
        alone = sample(reference, **asked)
        expected = finish(reference, alone)[alone.id][-1].picture
        assert most_different(as_picture(result.images[0]), expected) <= 1, asked


def as_picture(image: Image.Image) -> Picture:
    return Picture(rgb=image.tobytes(), width=image.width, height=image.height, nsfw_content_detected=None)
