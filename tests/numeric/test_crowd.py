"""Requests of every kind, crowded on few slots of one engine: each image is that of its request alone on the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from drawing import finish
from image_requests import levels, some_image, some_mask
from lora_truth import write_loras
from plain_diffusers import with_text_layers

from mii_serve.engine import Engine
from mii_serve.engine.factory import native_engine
from mii_serve.engine.reference import ReferenceEngine
from mii_serve.models.loras import load_loras
from mii_serve.scheduler import Scheduler
from mii_serve.types import InputImage, PromptEmbeds, Request, RequestedParams, Sample, SampleId

NUM_SLOTS = 6
IMAGE, MASK = b"its file", b"the mask's"
LONG = "a (red:1.4) circle BREAK on a [blue] background"
EMBEDS = np.random.default_rng(5).standard_normal((77, 96)).astype("f4")
CROWD: list[dict[str, Any]] = [
    {"scheduler": "pndm", "num_inference_steps": 5},
    {"scheduler": "euler", "image": IMAGE, "strength": 0.6, "num_inference_steps": 8},
    {"scheduler": "ddim", "image": IMAGE, "mask_image": MASK, "strength": 0.8, "num_inference_steps": 5},
    {"scheduler": "dpm++_2m_karras", "loras": {"plain": 1.0}, "num_inference_steps": 6},
    {"scheduler": "euler_a", "loras": {"text": 0.8}, "clip_skip": 1, "num_inference_steps": 4},
    {"scheduler": "euler", "loras": {"wide": 1.0, "plain": -0.5}, "guidance_scale": 1.0, "num_inference_steps": 7},
    {"scheduler": "pndm", "clip_skip": 2, "num_inference_steps": 4},
    {"scheduler": "euler", "image": IMAGE, "loras": {"plain": 0.7}, "strength": 0.5, "num_inference_steps": 8},
    {"scheduler": "dpm++_2m_karras", "image": IMAGE, "mask_image": MASK, "loras": {"text": 1.0}, "num_inference_steps": 5},
    {"scheduler": "ddim", "loras": {"text": 1.0}, "prompt": LONG, "prompt_syntax": "a1111", "num_inference_steps": 4},
    {
        "scheduler": "euler",
        "loras": {"wide": 1.0},
        "prompt": "",
        "prompt_embeds": PromptEmbeds(num_tokens=77, width=96, dtype="fp32", data=EMBEDS.tobytes()),
        "num_inference_steps": 5,
    },
    {"scheduler": "pndm", "loras": {"conv": 0.8}, "num_inference_steps": 4},
    {"scheduler": "ddim", "eta": 0.5, "prompt": LONG, "prompt_syntax": "a1111", "clip_skip": 1, "num_inference_steps": 4},
]


def request_of(engine: Engine, index: int) -> Request:
    asked = RequestedParams(
        **{"prompt": "a red circle on a blue background", "height": 64, "width": 64, "guidance_scale": 3.0} | CROWD[index],
        seed=40 + index,
    )
    params = engine.capabilities.resolve(asked, fallback_seed=0)
    image = None
    if asked.image is not None:
        image = InputImage(rgb=some_image().tobytes(), mask=some_mask().tobytes() if asked.mask_image else None)
    return Request(id=str(index), params=params, num_calls=engine.check(params), input_image=image)


@pytest.fixture(scope="module")
def model(demo, tmp_path_factory: pytest.TempPathFactory):
    model = with_text_layers(demo, 4)
    return replace(model, loras=load_loras(write_loras(tmp_path_factory.mktemp("loras"), model.pipeline), model.pipeline))


@pytest.fixture(scope="module")
def expected(model) -> list[np.ndarray]:
    reference = ReferenceEngine(model)
    pictures = []
    for index in range(len(CROWD)):
        request = request_of(reference, index)
        sample = Sample(id=SampleId(request.id, 0), params=request.params, input_image=request.input_image)
        pictures.append(levels(finish(reference, sample)[sample.id][-1].picture))
    return pictures


def test_whatever_shares_the_batch_an_image_is_that_of_its_request_alone(model, expected):
    engine = native_engine(model, max_slots=NUM_SLOTS)
    scheduler = Scheduler(engine.capacity, max_waiting_samples=1000, max_waiting_s=1e9)
    for index in range(len(CROWD)):
        scheduler.add(request_of(engine, index), 0.0)
    drawn, most = {}, 0
    while len(drawn) < len(CROWD):
        plan = scheduler.plan()
        assert plan is not None
        most = max(most, len(plan.steps))
        progress = engine.run(plan)
        scheduler.advance(progress, 1.0)
        for one in progress:
            assert one.error is None, one.error
            if one.picture is not None:
                drawn[int(one.id.request_id)] = levels(one.picture)
                scheduler.end(one)
    assert most > NUM_SLOTS // 2  # they did share calls
    farthest = {index: int(np.abs(drawn[index] - expected[index]).max()) for index in drawn}
    assert max(farthest.values()) <= 1, farthest
