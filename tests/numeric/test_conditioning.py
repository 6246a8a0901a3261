"""Parameters that say how a prompt is read and which steps are made, against diffusers alone."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from drawing import finish
from plain_diffusers import levels, with_text_layers

from mii_serve.client.arguments import build_request
from mii_serve.engine.factory import native_engine
from mii_serve.engine.reference import ReferenceEngine
from mii_serve.engine.text_encoding import has_text_model
from mii_serve.errors import InvalidRequestError
from mii_serve.samplers import sampling
from mii_serve.samplers.build import ModelSchedulers
from mii_serve.types import EMBEDS, Sample, SampleId

PROMPT = "a red circle on a blue background"
LONG = "a (red:1.4) circle, a [blue] square, " * 12 + "and ((one)) \\(yellow\\) star on a (white:0.6) background"
BROKEN = "a (red circle:1.3) BREAK on a blue background"
AYS = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24)
SIGMAS = (14.615, 6.475, 3.861, 1.886, 0.638, 0.0)
REQUESTS: dict[str, dict[str, Any]] = {
    "none": {"scheduler": "pndm", "num_inference_steps": 5},
    "skip1": {"scheduler": "euler", "num_inference_steps": 6, "clip_skip": 1, "negative_prompt": "a star"},
    "skip2": {"scheduler": "pndm", "num_inference_steps": 4, "clip_skip": 2, "guidance_scale": 1.0},
    "eta": {"scheduler": "ddim", "num_inference_steps": 6, "eta": 0.5},
    "eta_tcd": {"scheduler": "tcd", "num_inference_steps": 4, "eta": 0.3, "guidance_scale": 1.0},
    "sigmas": {"scheduler": "euler", "sigmas": SIGMAS},
    "ays": {"scheduler": "euler", "timesteps": AYS, "clip_skip": 1},
    "timesteps": {"scheduler": "dpm++_2m", "timesteps": (990, 700, 400, 200, 50), "num_inference_steps": 5},
    "weights": {"scheduler": "euler", "num_inference_steps": 4, "prompt_syntax": "a1111", "prompt": "a (red:1.4) [circle]"},
    "long": {"scheduler": "ddim", "num_inference_steps": 4, "prompt_syntax": "a1111", "prompt": LONG, "clip_skip": 1},
    "break": {
        "scheduler": "euler_a",
        "num_inference_steps": 5,
        "prompt_syntax": "a1111",
        "prompt": BROKEN,
        "negative_prompt": "a (star:0.5)",
    },
    "long_unguided": {
        "scheduler": "euler",
        "num_inference_steps": 4,
        "prompt_syntax": "a1111",
        "prompt": BROKEN,
        "guidance_scale": 1.0,
    },
    "embeds": {"scheduler": "pndm", "num_inference_steps": 4, "prompt_embeds": 1, "negative_prompt": "a star"},
    "long_embeds": {"scheduler": "euler", "num_inference_steps": 4, "prompt_embeds": 2, "negative_prompt_embeds": 2},
    "negative_embeds": {"scheduler": "ddim", "num_inference_steps": 4, "negative_prompt_embeds": 1, "clip_skip": 1},
    "heun": {"scheduler": "heun", "timesteps": (900, 500, 100)},
}


def embeds_by_the_rule(pipeline, text: str, clip_skip: int | None) -> list[torch.Tensor]:
    """The published rule, written once more."""
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    weights, parts, stack = [1.0], [], []
    for token in re.findall(r"\\.|\(|\[|:[0-9.]+\)|\)|\]|BREAK|[^\\()\[\]:B]+|.", text):
        if token in "([":
            stack.append((token, len(parts)))
        elif token in ")]" or (token[0] == ":" and token[-1] == ")"):
            opened, first = stack.pop()
            factor = float(token[1:-1]) if token[0] == ":" else {"(": 1.1, "[": 1 / 1.1}[opened]
            parts[first:] = [(one, weight * factor) for one, weight in parts[first:]]
        else:
            parts.append((token.removeprefix("\\"), weights[0]))
    assert not stack
    merged = [list(parts[0])]
    for one, weight in parts[1:]:
        if one != "BREAK" and merged[-1][0] != "BREAK" and abs(weight - merged[-1][1]) < 1e-9:
            merged[-1][0] += one
        else:
            merged.append([one, weight])
    chunks = [[]]
    for one, weight in merged:
        if one == "BREAK":
            chunks.append([])
            continue
        for token in tokenizer(one.strip(), add_special_tokens=False).input_ids:
            if len(chunks[-1]) == 75:
                commas = [i for i, (old, _) in enumerate(chunks[-1]) if tokenizer.decode([old]).strip() == ","]
                moved = []
                if commas and 75 - commas[-1] <= 20 and tokenizer.decode([token]).strip() != ",":
                    moved, chunks[-1] = chunks[-1][commas[-1] + 1 :], chunks[-1][: commas[-1] + 1]
                chunks.append(moved)
            chunks[-1].append((token, weight))
    return [encoded_chunk(encoder, tokenizer, chunk, clip_skip) for chunk in chunks]


def encoded_chunk(encoder, tokenizer, chunk, clip_skip: int | None) -> torch.Tensor:
    ids = [tokenizer.bos_token_id, *(token for token, _ in chunk), tokenizer.eos_token_id]
    ids += [tokenizer.pad_token_id] * (77 - len(ids))
    layers = encoder(torch.tensor([ids]), output_hidden_states=True).hidden_states
    z = getattr(encoder, "text_model", encoder).final_layer_norm(layers[-1 - (clip_skip or 0)])
    before = z.mean()
    z = z * torch.tensor([1.0, *(weight for _, weight in chunk), *[1.0] * (76 - len(chunk))])[:, None]
    return z * (before / z.mean())


def by_the_rule(pipeline, prompt: str, negative_prompt: str = "", clip_skip: int | None = None) -> dict[str, torch.Tensor]:
    """Arguments of a plain pipeline: the shorter prompt gets empty chunks."""
    positive, negative = (
        embeds_by_the_rule(pipeline, prompt, clip_skip),
        embeds_by_the_rule(pipeline, negative_prompt or " ", None),
    )
    empty = encoded_chunk(pipeline.text_encoder, pipeline.tokenizer, [], None)
    longest = max(len(positive), len(negative))
    empty_positive = encoded_chunk(pipeline.text_encoder, pipeline.tokenizer, [], clip_skip)
    positive += [empty_positive] * (longest - len(positive))
    negative += [empty] * (longest - len(negative))
    return {"prompt_embeds": torch.cat(positive, 1), "negative_prompt_embeds": torch.cat(negative, 1)}


def some_embeds(name: str, num_chunks: int) -> np.ndarray:
    """Numbers such as a layer norm makes; half precision where they are the prompt's."""
    numbers = np.random.default_rng(len(name)).standard_normal((77 * num_chunks, 96)).astype("f4")
    return numbers.astype("f2") if name == "prompt_embeds" else numbers


@torch.no_grad()
def drawn_by_diffusers(model, seed: int, *, scheduler: str, **arguments: Any) -> np.ndarray:
    from diffusers import StableDiffusionPipeline

    own = copy.deepcopy(ModelSchedulers(model.pipeline.scheduler)._template(scheduler))
    pipeline = StableDiffusionPipeline(**{**model.pipeline.components, "scheduler": own}, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    for name in ("timesteps", "sigmas"):
        if name in arguments:
            arguments = {**arguments, "num_inference_steps": 50, name: list(arguments[name])}  # diffusers leaves the number out
    arguments = {"prompt": PROMPT, "height": 64, "width": 64, **arguments}
    for name in EMBEDS:
        if name in arguments:
            arguments[name] = torch.from_numpy(some_embeds(name, arguments[name]).astype("f4"))[None]
            if name == "prompt_embeds":
                del arguments["prompt"]
    if arguments.pop("prompt_syntax", "plain") == "a1111":
        names = [name for name in ("prompt", "negative_prompt", "clip_skip") if name in arguments]
        arguments |= by_the_rule(pipeline, **{name: arguments.pop(name) for name in names})
    with has_text_model(pipeline.text_encoder):
        image = pipeline(generator=torch.Generator().manual_seed(seed), **arguments).images[0]
    return np.asarray(image).astype(int)


def sample_of(engine, name: str, seed: int, **asked: Any) -> Sample:
    asked = {"prompt": PROMPT, "height": 64, "width": 64, "seed": seed, "guidance_scale": 7.5, **asked}
    embeds = {name: some_embeds(name, asked.pop(name)) for name in EMBEDS if name in asked}
    prompt = None if "prompt_embeds" in embeds else asked.pop("prompt")
    asked.pop("prompt", None)
    requested = build_request(prompt, asked | embeds).params
    return Sample(id=SampleId(name, 0), params=engine.capabilities.resolve(requested, fallback_seed=0))


@pytest.fixture(scope="module")
def model(demo):
    return with_text_layers(demo, 4)


@pytest.fixture(scope="module")
def expected(model) -> dict[str, np.ndarray]:
    return {name: drawn_by_diffusers(model, seed, **asked) for seed, (name, asked) in enumerate(REQUESTS.items())}


@pytest.fixture(scope="module")
def native(model):
    engine = native_engine(model, max_slots=len(REQUESTS))
    yield engine
    engine.close()


def test_in_one_batch_each_is_what_diffusers_makes_of_it_alone(native, expected):
    samples = [sample_of(native, name, seed, **asked) for seed, (name, asked) in enumerate(REQUESTS.items())]
    together = finish(native, *samples, late=1)
    for one in samples:
        off = np.abs(levels(together[one.id][-1].picture) - expected[one.id.request_id]).max()
        assert off <= 1, (one.id.request_id, off)
    assert np.abs(expected["skip1"] - expected["ays"]).max() > 1, "each of them changes the picture"


def test_the_reference_makes_it_too(model, expected):
    engine = ReferenceEngine(model)
    for seed, (name, asked) in enumerate(REQUESTS.items()):
        if name in ("skip2", "eta", "sigmas", "break", "embeds"):
            one = sample_of(engine, name, seed, **asked)
            off = np.abs(levels(finish(engine, one)[one.id][-1].picture) - expected[name]).max()
            assert off <= (name == "break"), name  # of weights, the sums are made in another order


def test_objects_step_where_no_table_is_kept(native, expected, monkeypatch):
    compiled, compile_table = [], sampling.compile_table
    monkeypatch.setattr(
        sampling, "compile_table", lambda *given, **more: compiled.append(given) or compile_table(*given, **more)
    )
    monkeypatch.setattr(sampling.Samplings, "_known", lambda *_: None)
    for name in ("eta", "heun"):
        one = sample_of(native, name, list(REQUESTS).index(name), **REQUESTS[name])
        assert not native.describe_scheduler(one.params).is_compiled
        assert np.abs(levels(finish(native, one)[one.id][-1].picture) - expected[name]).max() <= 1, name
        assert len(compiled) == 1, "when it is checked, and not in the thread that steps"
        compiled.clear()


def test_tables_that_callers_can_name_any_number_of_are_few_and_short(native, monkeypatch):
    monkeypatch.setattr(sampling, "MAX_CACHED_OF_MANY", 3)
    usual = len(native._samplings._cache)
    for first in range(900, 907):
        native.check(sample_of(native, "a", 0, scheduler="euler", timesteps=(first, 300)).params)
    assert (len(native._samplings._cache_of_many), len(native._samplings._cache)) == (3, usual)
    long = sample_of(native, "a", 0, scheduler="euler", timesteps=tuple(range(998, 0, -6))).params
    assert native.check(long) == 167
    assert not native.describe_scheduler(long).is_compiled


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"scheduler": "euler", "eta": 0.5}, "eta: must be 0 with the scheduler euler: EulerDiscreteScheduler takes none"),
        ({"scheduler": "ddim", "sigmas": SIGMAS}, r"sigmas: .*DDIMScheduler.set_timesteps takes no sigmas"),
        ({"scheduler": "euler_a", "timesteps": AYS}, r"timesteps: .*set_timesteps takes no timesteps"),
        ({"scheduler": "euler_karras", "timesteps": AYS}, r"timesteps: .*use_karras_sigmas"),
        ({"scheduler": "ddpm", "timesteps": (10, 500)}, r"timesteps: .*descending order"),
        ({"scheduler": "unipc_flow", "sigmas": SIGMAS}, r"sigmas: must be sigmas that the scheduler unipc_flow can make"),
        ({"scheduler": "dpm++_2m", "timesteps": (500, 500, 500)}, r"timesteps: "),
    ],
)
def test_what_a_scheduler_does_not_take_is_refused_by_name(model, native, asked, text):
    for engine in (native, ReferenceEngine(model)):
        with pytest.raises(InvalidRequestError, match=text):
            engine.check(sample_of(engine, "a", 0, **asked).params)
