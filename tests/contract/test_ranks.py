"""Several ranks together draw what one draws, and each of them holds the same bits."""

from __future__ import annotations

import psutil
import pytest
from drawing import draw_ahead, finish, most_different, ranked_engine, real_engine, sample
from fake_engine import FakeEngine

from mii_serve.config import DeployConfig
from mii_serve.engine.kernels.shares import shares
from mii_serve.engine.ranks.leader import lead
from mii_serve.errors import ModelError
from mii_serve.types import LATENT_SCALE, StepPlan

pytestmark = pytest.mark.slow

REQUESTS = [
    {"seed": 1, "num_inference_steps": 8, "guidance_scale": 7.5, "scheduler": "pndm"},
    {"seed": 2, "num_inference_steps": 5, "guidance_scale": 1.0, "scheduler": "ddim", "prompt": "a green square"},
    {"seed": 3, "num_inference_steps": 7, "guidance_scale": 4.0, "scheduler": "euler_a", "negative_prompt": "circle"},
    {"seed": 4, "num_inference_steps": 6, "guidance_scale": 3.0, "scheduler": "EDMEulerScheduler"},
    {"seed": 5, "num_inference_steps": 9, "guidance_scale": 7.5, "scheduler": "dpm++_2m", "height": 96, "width": 64},
    {"seed": 6, "num_inference_steps": 4, "guidance_scale": 0.0, "scheduler": "euler", "prompt": "a blue star"},
]


@pytest.fixture(scope="module", params=[(3, "rows")], ids=str)  # test_engine has those of two
def ranked(request):
    engine = ranked_engine(*request.param)
    engine.warmup()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def references():
    engine = real_engine("reference")
    alone = [sample(engine, f"r{i}", **asked) for i, asked in enumerate(REQUESTS)]
    yield [finish(engine, one)[one.id][-1].picture for one in alone]
    engine.close()


def test_pictures_of_a_mixed_batch_are_the_references(ranked, references):
    samples = [sample(ranked, f"r{i}", **asked) for i, asked in enumerate(REQUESTS)]
    together = finish(ranked, *samples, late=1)
    assert max(most_different(together[one.id][-1].picture, true) for one, true in zip(samples, references, strict=True)) <= 1


def test_launched_turns_make_the_references_pictures(ranked, references):
    pictures = draw_ahead(ranked, REQUESTS)
    assert max(most_different(made, true) for made, true in zip(pictures, references, strict=True)) <= 1
    assert len(set(ranked.digests())) == 1


def test_all_ranks_hold_the_same_bits_in_every_turn(ranked):
    samples = tuple(sample(ranked, f"r{i}", **asked) for i, asked in enumerate(REQUESTS) if "height" not in asked)
    ids = tuple(one.id for one in samples)
    seen = set()
    for turn in range(4):
        ranked.run(StepPlan(joins=() if turn else samples, steps=ids))
        digests = ranked.digests()
        assert len(digests) == ranked.group.size
        assert len(set(digests)) == 1
        seen.add(digests[0])
    ranked.run(StepPlan(leaves=ids))
    assert len(seen) == 4, "the digest is of something that moves"


@pytest.mark.parametrize(("num_guided", "num_unguided"), [(1, 0), (0, 1), (4, 0), (2, 3)])
def test_a_call_is_one_all_gather_of_the_largest_share(ranked, num_guided, num_unguided):
    if ranked.description.parallelism != "rows":
        pytest.skip("tests/numeric/test_sharded_ranks.py counts its sums")
    guidance = [7.5] * num_guided + [1.0] * num_unguided
    samples = tuple(sample(ranked, f"r{i}", guidance_scale=scale) for i, scale in enumerate(guidance))
    ids = tuple(one.id for one in samples)
    ranked.run(StepPlan(joins=samples))
    num_before, bytes_before = ranked.group.num_collectives, ranked.group.num_sent_bytes
    ranked.run(StepPlan(steps=ids))
    num_rows = 2 * num_guided + num_unguided
    largest = max(len(share.rows) for share in shares(len(samples), num_rows, ranked.group.size))
    params = samples[0].params
    row_bytes = 4 * (params.height // LATENT_SCALE) * (params.width // LATENT_SCALE) * 4  # channels, height, width, fp32
    assert ranked.group.num_collectives - num_before == 1
    assert ranked.group.num_sent_bytes - bytes_before == largest * row_bytes
    assert largest == -(-num_rows // ranked.group.size)
    ranked.run(StepPlan(leaves=ids))


def test_a_preview_is_the_same_as_of_one_rank(ranked):
    one = real_engine("native")
    shown = []
    for engine in (ranked, one):
        samples = tuple(sample(engine, f"r{i}", seed=i, num_inference_steps=6) for i in range(3))
        ids = tuple(each.id for each in samples)
        engine.run(StepPlan(joins=samples, steps=ids))
        shown.append([progress.preview for progress in engine.run(StepPlan(steps=ids, previews=ids))])
        engine.run(StepPlan(leaves=ids))
    assert all(most_different(a, b) <= 1 for a, b in zip(*shown, strict=True))
    one.close()


def test_what_a_follower_cannot_load_is_the_error_of_the_start():
    """Rank 0 would find it out for itself; here it is slower than the follower."""
    with pytest.raises(ModelError, match="no-such-model"):
        lead(group_of("./no-such-model"), lambda group: FakeEngine())


def test_when_rank_0_does_not_start_its_followers_end():
    def fail(group):
        raise ModelError("not on this rank")

    before = set(psutil.Process().children())
    with pytest.raises(ModelError, match="not on this rank"):
        lead(group_of("demo"), fail)
    assert set(psutil.Process().children()) <= before


def group_of(model: str) -> DeployConfig:
    return DeployConfig.load({"model": model, "engine": "native", "device": "cpu", "tensor_parallel": 2})
