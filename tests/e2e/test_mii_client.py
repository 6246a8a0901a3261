"""The MIIClient of deepspeed-mii 0.3.3, unmodified and in an environment of its own, against a deployment."""

from __future__ import annotations

import base64
import json

import pytest
from deployments import Deployment
from drawing import largest_difference
from outside import ROOT, run_client
from patience import PATIENCE_S

from mii_serve.client import Client

FEW = {"num_inference_steps": 3}


@pytest.fixture(scope="module")
def told(deployment: Deployment) -> dict:
    host, _, port = deployment.grpc.rpartition(":")
    told = json.loads(run_client("mii", "mii_pictures.py", host, port, str(ROOT)).splitlines()[-1])
    for answer in told.values():
        if isinstance(answer, dict) and "pixels" in answer:
            answer["pixels"] = [base64.b64decode(pixels) for pixels in answer["pixels"]]
    return told


@pytest.fixture(scope="module")
def client(deployment: Deployment):
    with Client(deployment.grpc) as client:
        yield client


def drawn(client: Client, prompt: str, **settings) -> list[bytes]:
    return [image.tobytes() for image in client.generate(prompt, timeout=PATIENCE_S, **settings).images]


def test_mii_and_our_copy_of_its_messages_live_in_one_process_and_agree(told):
    assert told["same"]


def test_one_prompt_gives_the_picture_of_our_sdk(told, client):
    assert told["single"]["pixels"] == drawn(client, "a red circle", seed=5, **FEW)
    assert told["again"] == told["single"] == told["after"]


def test_without_a_seed_pictures_differ(told):
    first, second = told["unseeded"]
    assert first["pixels"] != second["pixels"]


def test_several_prompts_come_in_order_each_from_its_seed(told, client):
    expected = drawn(client, "a red circle", seed=7, num_images_per_prompt=2, **FEW)
    expected += drawn(client, "a blue square", seed=9, num_images_per_prompt=2, **FEW)
    # Those four shared their UNet calls; of these, two did.
    differences = [largest_difference(*pair) for pair in zip(told["several"]["pixels"], expected, strict=True)]
    assert max(differences) <= 1, differences


def test_a_negative_prompt_is_heard(told, client):
    with_it = drawn(client, "a red circle", negative_prompt="blue", seed=9, **FEW)
    assert told["negative"]["pixels"] == with_it != drawn(client, "a red circle", seed=9, **FEW)


def test_numbers_mean_what_the_caller_wrote(told, client):
    settings = {"height": 32, "width": 48, "guidance_scale": 7.3, "scheduler": "ddim"}
    assert told["numbers"]["pixels"] == drawn(client, "a green triangle", seed=2, **settings, **FEW)
    assert told["numbers"]["sizes"] == [[48, 32]]


def test_the_safety_checker_is_on_here_too(told):
    assert told["single"]["nsfw"] == [False]
    assert told["flagged"]["nsfw"] == [True]
    width, height = told["flagged"]["sizes"][0]
    assert told["flagged"]["pixels"] == [bytes(width * height * 3)]


@pytest.mark.parametrize(
    ("call", "code", "text"),
    [
        ("unknown", "INVALID_ARGUMENT", "'stepps'"),
        ("invalid", "INVALID_ARGUMENT", "num_inference_steps: must be in [1, 1000], got -5"),
        ("refused", "INVALID_ARGUMENT", "'output_type'"),
        ("terminate", "PERMISSION_DENIED", "enable_mii_terminate"),
        ("other", "UNIMPLEMENTED", "ClassificationReply is not served here"),
    ],
)
def test_what_is_refused_is_named(told, call, code, text):
    assert told[call]["code"] == code
    assert text in told[call]["details"]
