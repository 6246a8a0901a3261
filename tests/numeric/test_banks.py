"""What is kept for the next request: prompts and times."""

from __future__ import annotations

import pytest
import torch

from mii_serve.engine.native.prompts import PromptBank
from mii_serve.engine.native.times import TimeTable
from mii_serve.engine.native.unet import RowUNet


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def unet(demo):
    return RowUNet(demo.pipeline.unet)


@pytest.fixture
def bank(demo, unet):
    return PromptBank(demo.pipeline, unet, max_in_use=4, num_spare_rows=2)


class TestPrompts:
    def test_a_prompt_is_encoded_once_however_often_it_is_said(self, bank):
        first, second, third = bank.acquire(["a circle", "", "a circle"])
        assert first is third and first.row != second.row
        assert bank.num_encoded == 2
        bank.acquire(["", "a circle"])
        assert bank.num_encoded == 2

    def test_it_is_what_the_pipeline_makes_of_it(self, bank, demo, unet):
        [prompt] = bank.acquire(["a circle"])
        embeds, _ = demo.pipeline.encode_prompt(["a circle"], torch.device("cpu"), 1, False)
        torch.testing.assert_close(bank.key_values[prompt.row], unet.project_prompts(embeds)[0], rtol=1e-5, atol=1e-5)

    def test_it_is_the_same_bits_whoever_it_came_with(self, demo, unet):
        seen = []
        for company in ([], ["a star"], ["a", "b", "c"], [f"number {i}" for i in range(9)]):
            for texts in (["a circle", *company], [*company, "a circle"]):
                bank = PromptBank(demo.pipeline, unet, max_in_use=10, num_spare_rows=2)
                row = bank.acquire(texts)[texts.index("a circle")].row
                seen.append(bank.key_values[row].clone())
        assert all(torch.equal(seen[0], other) for other in seen)

    def test_those_in_use_stay_and_the_least_recently_used_goes(self, bank):
        used = bank.acquire(["a", "b"])
        before = bank.key_values[[prompt.row for prompt in used]].clone()
        for text in "cdefghijk":
            bank.release(bank.acquire([text]))
        assert torch.equal(bank.key_values[[prompt.row for prompt in used]], before)
        encoded = bank.num_encoded
        bank.acquire(["k", "a"])
        assert bank.num_encoded == encoded
        bank.acquire(["c"])
        assert bank.num_encoded == encoded + 1

    def test_the_empty_prompt_is_never_forgotten(self, bank):
        bank.release(bank.acquire([""]))
        for text in "abcdefgh":
            bank.release(bank.acquire([text]))
        encoded = bank.num_encoded
        bank.acquire([""])
        assert bank.num_encoded == encoded

    def test_the_most_that_can_be_in_use_fits_even_when_all_of_it_is_new(self, bank):
        bank.release(bank.acquire(["p", "q", "r", "s", "t", ""]))
        prompts = bank.acquire(["a", "b", "c", "d"])
        assert len({prompt.row for prompt in prompts}) == 4
        assert [prompt.text for prompt in prompts] == ["a", "b", "c", "d"]

    def test_the_text_that_does_not_fit_is_named(self, bank):
        short, long = bank.acquire(["a circle", "a circle " * 60 + "zebra"])
        assert short.dropped == ""
        assert long.dropped.endswith("zebra")


class TestTimes:
    def test_each_time_is_projected_once(self, unet):
        table = TimeTable(unet, dtype=torch.float32, device=torch.device("cpu"))
        first, second, third = table.rows([999.0, 0.5, 999.0])
        assert first == third != second
        expected = unet.embed_times(torch.tensor([999.0, 0.5]))
        torch.testing.assert_close(table.projections[[first, second]], expected, rtol=1e-5, atol=1e-5)

    def test_a_full_table_forgets_the_least_recently_used_and_never_one_of_the_same_turn(self, unet):
        table = TimeTable(unet, dtype=torch.float32, device=torch.device("cpu"), num_times=3)
        table.rows([1.0, 2.0, 3.0])
        rows = table.rows([4.0, 1.0, 3.0])
        assert len(set(rows)) == 3
        expected = unet.embed_times(torch.tensor([4.0, 1.0, 3.0]))
        torch.testing.assert_close(table.projections[rows], expected, rtol=1e-5, atol=1e-5)

    def test_a_time_is_the_same_bits_whoever_it_came_with(self, unet):
        seen = []
        for times in ([340.5], [1.0, 340.5, 2.0], [340.5, *range(20)]):
            table = TimeTable(unet, dtype=torch.float32, device=torch.device("cpu"))
            seen.append(table.projections[table.rows(times)[times.index(340.5)]].clone())
        assert all(torch.equal(seen[0], other) for other in seen)
