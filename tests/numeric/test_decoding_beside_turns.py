"""Pictures are decoded beside the turns: in batches of which each turn waits for one at most. Counted in calls, not in time."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from patience import PATIENCE_S

from mii_serve.config import LimitsConfig
from mii_serve.engine.batched import BatchedEngine
from mii_serve.engine.batched.engine import MAX_BEHIND
from mii_serve.engine.kernels.native import NativeKernels
from mii_serve.engine.turns import TurnResult, Turns
from mii_serve.errors import EngineError
from mii_serve.models import LoadedModel, load_model
from mii_serve.scheduler import Scheduler
from mii_serve.types import Request, RequestedParams, Sample, SampleId, SampleProgress, StepPlan

NUM_ENDING = 16


class Watched:
    """An engine whose calls are recorded in their order, with the number of images in each and the thread they ran in."""

    def __init__(self, model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, int]] = []
        self.threads: dict[str, set[int]] = {}
        self.engine = BatchedEngine(model, NativeKernels(model.pipeline.unet), max_slots=NUM_ENDING + 1)
        self.changed = threading.Event()
        self.turns = Turns(self.engine, on_decoded=self.changed.set)
        pipeline = model.pipeline
        self.watch(monkeypatch, pipeline.unet.conv_in, "forward", "unet", lambda *args, **_: len(args[0]))
        self.watch(monkeypatch, pipeline.vae, "decode", "vae", lambda *args, **_: len(args[0]))
        self.watch(monkeypatch, pipeline, "feature_extractor", "preprocess", lambda *args, **_: len(args[0]))
        self.watch(monkeypatch, pipeline.safety_checker, "forward", "check", lambda *_, images, **__: len(images))

    def watch(self, monkeypatch, holder, name: str, call: str, count: Callable[..., int]) -> None:
        original = getattr(holder, name)

        def watched(*arguments, **named):
            self.calls.append((call, count(*arguments, **named)))
            self.threads.setdefault(call, set()).add(threading.get_ident())
            return original(*arguments, **named)

        monkeypatch.setattr(holder, name, watched)

    def params(self, num_inference_steps: int, seed: int = 0):
        asked = RequestedParams(prompt="a red circle", num_inference_steps=num_inference_steps, seed=seed, scheduler="ddim")
        return self.engine.capabilities.resolve(asked, fallback_seed=0)

    def wait(self) -> None:
        assert self.changed.wait(PATIENCE_S)
        self.changed.clear()


@pytest.fixture(scope="module")
def checked() -> LoadedModel:
    model = load_model("demo", revision=None, dtype="fp32", device="cpu", limits=LimitsConfig())
    model.pipeline.safety_checker.concept_embeds_weights.data.fill_(2.0)  # never fires
    return model


@pytest.fixture
def watched(checked, monkeypatch):
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = Watched(checked, monkeypatch)
    yield made
    made.engine.close()
    torch.set_num_threads(num_threads)


def take_in(scheduler: Scheduler, results: list[TurnResult]) -> list[SampleProgress]:
    """What has ended."""
    for result in results:
        if result.is_turn:
            scheduler.advance(result.progress, result.elapsed_s)
        else:
            for progress in result.progress:
                scheduler.end(progress)
    return [progress for result in results for progress in result.progress if progress.is_over]


def test_a_burst_of_endings_delays_no_step_by_more_than_one_batch(watched):
    scheduler = Scheduler(watched.engine.capacity, max_waiting_samples=100, max_waiting_s=1e9)
    scheduler.add(Request(id="goes on", params=watched.params(30), num_calls=30), 0.0)
    for i in range(NUM_ENDING):
        scheduler.add(Request(id=f"ends {i}", params=watched.params(2, seed=i), num_calls=2), 0.0)
    ended: list[SampleProgress] = []
    for _ in range(30):
        plan = scheduler.plan()
        assert SampleId("goes on", 0) in plan.steps, "it is in every turn"
        ended += take_in(scheduler, watched.turns.step(plan))
    while len(ended) <= NUM_ENDING:
        plan = scheduler.plan()
        if plan is None and watched.turns.is_idle:
            watched.wait()
        ended += take_in(scheduler, watched.turns.step(plan))
    assert all(progress.error is None and progress.picture is not None for progress in ended)

    most = watched.engine.capacity.max_decodes
    between: list[str] = []
    for call, num_images in watched.calls:
        if call == "unet":
            between = []
        elif call != "preprocess":
            between.append(call)
            assert num_images <= most
            assert between.count(call) == 1, f"two batches before the next step: {watched.calls}"
    assert sum(num_images for call, num_images in watched.calls if call == "vae") == NUM_ENDING + 1


def test_only_what_does_not_compute_runs_in_another_thread(watched):
    one = Sample(id=SampleId("r", 0), params=watched.params(1))
    [progress] = watched.engine.run(StepPlan(joins=(one,), steps=(one.id,), decodes=(one.id,)))
    assert progress.picture is not None
    own = {threading.get_ident()}
    assert watched.threads["unet"] == watched.threads["vae"] == watched.threads["check"] == own
    assert watched.threads["preprocess"].isdisjoint(own)


def test_a_slot_is_free_once_the_decoder_has_the_latents(watched):
    ids = [SampleId("r", i) for i in range(NUM_ENDING + 1)]
    samples = [Sample(id=sample_id, params=watched.params(1, seed=i)) for i, sample_id in enumerate(ids)]
    expected = {one.id: watched.engine.run(StepPlan(joins=(one,), steps=(one.id,), decodes=(one.id,))) for one in samples[:2]}
    watched.turns.step(StepPlan(joins=tuple(samples), steps=tuple(ids), decodes=tuple(ids[:2])))
    others = [Sample(id=SampleId("other", i), params=watched.params(9, seed=99)) for i in range(2)]
    results = watched.turns.step(StepPlan(joins=tuple(others), steps=tuple(one.id for one in others)))
    pictures = {}
    while len(pictures) < 2:
        pictures |= {made.id: made.picture for result in results for made in result.progress if made.picture is not None}
        if watched.turns.is_idle and len(pictures) < 2:
            watched.wait()
        results = watched.turns.step(None)
    for sample_id, [alone] in expected.items():
        assert max(abs(a - b) for a, b in zip(pictures[sample_id].rgb, alone.picture.rgb, strict=True)) <= 1


def test_what_fails_in_the_other_thread_is_an_error_of_the_engine(watched, checked, monkeypatch):
    def fail(*arguments, **named):
        raise RuntimeError("no such picture")

    monkeypatch.setattr(checked.pipeline, "feature_extractor", fail)
    one = Sample(id=SampleId("r", 0), params=watched.params(1))
    with pytest.raises(EngineError, match="no such picture"):
        watched.turns.step(StepPlan(joins=(one,), steps=(one.id,), decodes=(one.id,)))
        watched.wait()
        watched.turns.step(None)


def test_previews_are_left_out_while_the_decoder_is_behind(watched, checked, monkeypatch):
    may_go_on = threading.Event()
    original = checked.pipeline.feature_extractor

    def held(*arguments, **named):
        assert may_go_on.wait(PATIENCE_S)
        return original(*arguments, **named)

    monkeypatch.setattr(checked.pipeline, "feature_extractor", held)
    one = Sample(id=SampleId("r", 0), params=watched.params(2 * MAX_BEHIND))
    for turn in range(2 * MAX_BEHIND - 1):
        watched.turns.step(StepPlan(joins=() if turn else (one,), steps=(one.id,), previews=(one.id,)))
    assert [call for call, _ in watched.calls].count("vae") == MAX_BEHIND
    may_go_on.set()
    results: list[TurnResult] = []
    while len(results) < MAX_BEHIND:
        watched.wait()
        while not watched.turns.is_idle:
            results += watched.turns.step(None)
    assert all(progress.preview is not None for result in results for progress in result.progress)
    [last] = watched.engine.run(StepPlan(steps=(one.id,), decodes=(one.id,)))
    assert last.picture is not None
