"""The promise of in-flight batching: a picture from a batch is the picture the FP32 reference makes of the request alone."""

from __future__ import annotations

import pytest
from drawing import finish, most_different, real_engine, sample
from samplers import USUAL

from mii_serve.config import LimitsConfig
from mii_serve.engine.batched.buckets import declare_buckets
from mii_serve.engine.factory import native_engine
from mii_serve.models import load_model

pytestmark = pytest.mark.slow

TOLERANCE = 1
"""Levels of 255, in any pixel, in FP32."""

REQUESTS = [
    {
        "scheduler": scheduler,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "seed": 100 + i,
        "prompt": prompt,
        **more,
    }
    for i, (scheduler, steps, guidance, prompt, more) in enumerate(
        [
            ("pndm", 25, 7.5, "a red circle on a blue background", {}),
            ("ddim", 4, 1.0, "a green square", {}),
            ("ddpm", 20, 3.0, "a yellow star on a black background", {"negative_prompt": "circle"}),
            ("euler", 10, 0.0, "two blue circles", {}),
            ("euler_karras", 12, 3.0, "a red circle", {}),
            ("euler_a", 15, 3.0, "a white cross", {}),
            ("heun", 8, 5.0, "a red circle on a blue background", {"negative_prompt": "blue"}),
            ("kdpm2", 7, 3.0, "a purple triangle", {}),
            ("kdpm2_a", 9, 3.0, "an orange ring", {}),
            ("lms", 20, 2.0, "a red circle", {}),
            ("dpm++_2m", 20, 3.0, "three green squares", {}),
            ("dpm++_2m_karras", 25, 7.5, "a blue star", {}),
            ("dpm++_3m", 17, 3.0, "a red triangle", {}),
            ("dpm++_2m_sde", 20, 3.0, "a red circle", {}),
            ("dpm++_2m_sde_karras", 11, 1.0, "a cyan circle on a red background", {}),
            ("dpm++_2s", 10, 3.0, "a black square on a white background", {}),
            ("unipc", 10, 3.0, "a green circle", {"negative_prompt": "square, star"}),
            ("deis", 14, 4.0, "a yellow circle", {}),
            ("lcm", 4, 1.5, "a blue square", {}),
            ("tcd", 6, 1.0, "a red star", {}),
            ("default", 9, 3.0, "a red circle", {}),
            ("sa_solver", 9, 3.0, "a green circle", {}),
            ("EDMEulerScheduler", 9, 3.0, "a green circle", {}),
            ("dpm++_2m", 20, 3.0, "a red circle", {"height": 96, "width": 64}),
            ("euler_a", 12, 3.0, "a red circle", {"height": 96, "width": 64}),
        ]
    )
]


@pytest.fixture(scope="module")
def references():
    """Each request's picture, made alone."""
    engine = real_engine("reference")
    alone = [sample(engine, **asked) for asked in REQUESTS]
    yield [finish(engine, one)[one.id][-1].picture for one in alone]
    engine.close()


@pytest.fixture(scope="module", params=["as they come", "padded"])
def pictures_of_batch(request):
    """All of `REQUESTS` in one engine, more at once than a deployment would hold, each two rounds after the one before.

    Padded, as turns are for CUDA graphs: to the sizes a GPU would have captured, the smaller half of which is too small here.
    """
    model = load_model("demo", revision=None, dtype="fp32", device="cpu", limits=LimitsConfig(), enable_safety_checker=False)
    buckets = declare_buckets(len(REQUESTS), 8, 8) if request.param == "padded" else ()
    engine = native_engine(model, max_slots=len(REQUESTS), buckets=buckets)
    engine.warmup()
    samples = [sample(engine, f"r{i}", **asked) for i, asked in enumerate(REQUESTS)]
    together = finish(engine, *samples, late=2)
    assert (engine.num_graph_misses > 0) == bool(buckets), "the two samples of another size run without"
    yield [together[one.id][-1].picture for one in samples]
    engine.close()


def test_the_batch_has_every_sampler():
    assert {asked["scheduler"] for asked in REQUESTS} >= set(USUAL)


@pytest.mark.parametrize(
    "index", range(len(REQUESTS)), ids=lambda i: f"{REQUESTS[i]['scheduler']}-{REQUESTS[i]['num_inference_steps']}"
)
def test_a_picture_from_a_batch_is_the_references_picture(references, pictures_of_batch, index):
    true = references[index]
    assert len(set(true.rgb)) > 8, "a picture with nothing on it would prove nothing"
    assert most_different(pictures_of_batch[index], true) <= TOLERANCE
