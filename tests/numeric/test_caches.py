"""What is kept for the next request: prompts and timesteps."""

from __future__ import annotations

import pytest
import torch

from mii_serve.engine.batched.prompt_cache import Prompt, PromptCache, PromptKey
from mii_serve.engine.batched.timestep_cache import TimestepCache
from mii_serve.engine.kernels.native import NativeKernels


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def kernels(demo):
    return NativeKernels(demo.pipeline.unet)


@pytest.fixture
def cache(demo, kernels):
    return PromptCache(demo.pipeline, kernels, max_in_use=4, num_spare_rows=2)


def acquired(cache: PromptCache, texts: list[str]) -> list[Prompt]:
    return cache.acquire([PromptKey(text) for text in texts])


class TestPrompts:
    def test_a_prompt_is_encoded_once_however_often_it_is_said(self, cache):
        first, second, third = acquired(cache, ["a circle", "", "a circle"])
        assert first is third and first.row != second.row
        assert cache.num_encoded == 2
        acquired(cache, ["", "a circle"])
        assert cache.num_encoded == 2

    def test_it_is_what_the_pipeline_makes_of_it(self, cache, demo, kernels):
        [prompt] = acquired(cache, ["a circle"])
        embeds, _ = demo.pipeline.encode_prompt(["a circle"], torch.device("cpu"), 1, False)
        torch.testing.assert_close(cache.projected[prompt.row], kernels.project_prompts(embeds)[0], rtol=1e-5, atol=1e-5)

    def test_its_clip_skip_takes_an_earlier_layer_through_the_final_norm(self, cache, demo, kernels):
        encoder, tokenizer = demo.pipeline.text_encoder, demo.pipeline.tokenizer
        tokens = tokenizer(["a circle"], padding="max_length", return_tensors="pt").input_ids
        layers = encoder(tokens, output_hidden_states=True).hidden_states
        prompts = cache.acquire([PromptKey("a circle"), PromptKey("a circle", 1), PromptKey("a circle", 2)])
        for prompt, layer in zip(prompts, (layers[-1], layers[-2], layers[-3]), strict=True):
            embeds = getattr(encoder, "text_model", encoder).final_layer_norm(layer)
            torch.testing.assert_close(cache.projected[prompt.row], kernels.project_prompts(embeds)[0], rtol=1e-5, atol=1e-5)

    def test_it_is_the_same_bits_whatever_else_is_in_its_batch(self, demo, kernels):
        seen = []
        for others in ([], ["a star"], ["a", "b", "c"], [f"number {i}" for i in range(9)]):
            for texts in (["a circle", *others], [*others, "a circle"]):
                cache = PromptCache(demo.pipeline, kernels, max_in_use=10, num_spare_rows=2)
                row = acquired(cache, texts)[texts.index("a circle")].row
                seen.append(cache.projected[row].clone())
        assert all(torch.equal(seen[0], other) for other in seen)

    def test_those_in_use_stay_and_the_least_recently_used_goes(self, cache):
        used = acquired(cache, ["a", "b"])
        before = cache.projected[[prompt.row for prompt in used]].clone()
        for text in "cdefghijk":
            cache.release(acquired(cache, [text]))
        assert torch.equal(cache.projected[[prompt.row for prompt in used]], before)
        encoded = cache.num_encoded
        acquired(cache, ["k", "a"])
        assert cache.num_encoded == encoded
        acquired(cache, ["c"])
        assert cache.num_encoded == encoded + 1

    def test_the_empty_prompt_is_never_forgotten(self, cache):
        cache.release(acquired(cache, [""]))
        for text in "abcdefgh":
            cache.release(acquired(cache, [text]))
        encoded = cache.num_encoded
        acquired(cache, [""])
        assert cache.num_encoded == encoded

    def test_the_most_that_can_be_in_use_fits_even_when_all_of_it_is_new(self, cache):
        cache.release(acquired(cache, ["p", "q", "r", "s", "t", ""]))
        prompts = acquired(cache, ["a", "b", "c", "d"])
        assert len({prompt.row for prompt in prompts}) == 4
        assert [prompt.key.text for prompt in prompts] == ["a", "b", "c", "d"]

    def test_the_text_that_does_not_fit_is_named(self, cache):
        short, long = acquired(cache, ["a circle", "a circle " * 60 + "zebra"])
        assert short.dropped == ""
        assert long.dropped.endswith("zebra")


class TestTimesteps:
    def test_each_timestep_is_projected_once(self, kernels):
        cache = TimestepCache(kernels, dtype=torch.float32, device=torch.device("cpu"))
        first, second, third = cache.rows([999.0, 0.5, 999.0])
        assert first == third != second
        expected = kernels.embed_timesteps(torch.tensor([999.0, 0.5]))
        torch.testing.assert_close(cache.embeds[[first, second]], expected, rtol=1e-5, atol=1e-5)

    def test_a_full_table_forgets_the_least_recently_used_and_never_one_of_the_same_turn(self, kernels):
        cache = TimestepCache(kernels, dtype=torch.float32, device=torch.device("cpu"), num_timesteps=3)
        cache.rows([1.0, 2.0, 3.0])
        rows = cache.rows([4.0, 1.0, 3.0])
        assert len(set(rows)) == 3
        expected = kernels.embed_timesteps(torch.tensor([4.0, 1.0, 3.0]))
        torch.testing.assert_close(cache.embeds[rows], expected, rtol=1e-5, atol=1e-5)

    def test_a_timestep_is_the_same_bits_whatever_else_is_in_its_batch(self, kernels):
        seen = []
        for times in ([340.5], [1.0, 340.5, 2.0], [340.5, *range(20)]):
            cache = TimestepCache(kernels, dtype=torch.float32, device=torch.device("cpu"))
            seen.append(cache.embeds[cache.rows(times)[times.index(340.5)]].clone())
        assert all(torch.equal(seen[0], other) for other in seen)
