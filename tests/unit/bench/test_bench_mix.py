"""What a mix may say, and that it is drawn by weight."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest

from mii_serve.bench.arrivals import constant, poisson, read_trace
from mii_serve.bench.mix import parse_mix
from mii_serve.errors import ConfigError


def test_inline_kinds_have_weights_names_and_types():
    mix = parse_mix("3: num_inference_steps=10, height=64, width=32; guidance_scale=1.5, scheduler=euler_a")
    assert [(kind.name, kind.weight) for kind in mix.kinds] == [("10 steps, 32x64", 3.0), ("guidance 1.5, euler_a", 1.0)]
    assert dict(mix.kinds[0].params) == {"num_inference_steps": 10, "height": 64, "width": 32}


def test_nothing_said_is_the_models_own_defaults():
    asked = parse_mix(None).request("0", 0).asked
    assert (asked.num_inference_steps, asked.guidance_scale, asked.height) == (None, None, None)
    assert asked.seed is not None
    assert asked.prompt


def test_a_file_may_have_prompts_and_names(tmp_path):
    file = tmp_path / "mix.yaml"
    file.write_text(
        "prompts: [a red star]\nkinds:\n- {name: short, weight: 2, num_inference_steps: 4}\n- {prompt: a blue star}\n"
    )
    mix = parse_mix(str(file))
    assert [kind.name for kind in mix.kinds] == ["short", "prompt 'a blue star'"]
    prompts = {mix.request("0", index).asked.prompt for index in range(40)}
    assert prompts == {"a red star", "a blue star"}


def test_kinds_come_as_often_as_they_weigh():
    mix = parse_mix("3: num_inference_steps=1; 1: num_inference_steps=2")
    counts = Counter(mix.request("0", index).kind for index in range(4000))
    assert counts["1 steps"] == pytest.approx(3000, abs=120)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("num_inference_step=1", "mix.num_inference_step: no such key; did you mean num_inference_steps?"),
        ("seed=1", "mix.seed: no such key"),
        ("0: num_inference_steps=1", "mix.weight: must be above 0"),
        ("-1: num_inference_steps=1", "mix.weight: must be above 0"),
        ("nan: num_inference_steps=1", "mix.weight: must be a finite number"),
        ("num_inference_steps=1.5", "mix.num_inference_steps: must be a whole number, got '1.5'"),
        ("guidance_scale=inf", "mix.guidance_scale: must be a finite number"),
        ("height=64", "height and width go together"),
        ("num_inference_steps", "must be key=value"),
        ("num_inference_steps=1, num_inference_steps=2", "is there twice"),
        ("num_inference_steps=1; num_inference_steps=1", "mix.name: must be different for each kind"),
        (";", "must have at least one kind"),
        ("/nowhere/mix.yaml", "cannot read /nowhere/mix.yaml"),
    ],
)
def test_a_wrong_mix_is_told_by_key_and_rule(text, complaint):
    with pytest.raises(ConfigError) as raised:
        parse_mix(text)
    assert complaint in str(raised.value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[1]", "must be an object with a list of kinds"),
        ("kinds: [1]", "must be an object"),
        ("kinds: []", "at least one kind"),
        ("kinds: [{}]\nprompt: [a]", "mix.prompt: no such key; did you mean prompts?"),
        ("kinds: [{}]\nprompts: []", "mix.prompts: must be a list of texts"),
        ("kinds: [{num_inference_steps: true}]", "must be a whole number, got True"),
        ("kinds: [{num_inference_steps: 1.5}]", "must be a whole number, got 1.5"),
        ("kinds: [{prompt: 3}]", "mix.prompt: must be a text, got 3"),
        ("kinds: {", "cannot read"),
    ],
)
def test_a_wrong_file_is_told_by_key_and_rule(tmp_path, text, complaint):
    file = tmp_path / "mix.yml"
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        parse_mix(str(file))
    assert complaint in str(raised.value)


# ---- arrivals ------------------------------------------------------------------------------------------------------


def test_constant_arrivals_are_even():
    times = constant(4.0)
    assert [next(times).at_s for _ in range(5)] == [0, 0.25, 0.5, 0.75, 1.0]


def test_poisson_arrivals_have_the_rate_and_the_spread_of_independent_callers():
    arrivals = poisson(10.0, "0")
    times = [next(arrivals).at_s for _ in range(20000)]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(0.1, rel=0.03)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert spread == pytest.approx(mean, rel=0.05)  # an exponential's standard deviation is its mean
    again = poisson(10.0, "0")
    assert times[:100] == [next(again).at_s for _ in range(100)]


def test_a_trace_has_times_and_parameters_and_can_be_played_faster(tmp_path):
    file = tmp_path / "trace.jsonl"
    file.write_text('{"at_s": 0}\n\n{"at_s": 1.5, "num_inference_steps": 7}\n')
    arrivals = read_trace(file, speed=3.0)
    assert [(one.at_s, dict(one.params)) for one in arrivals] == [(0.0, {}), (0.5, {"num_inference_steps": 7})]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["{"], "line 1 of {file} is not JSON"),
        (["[]"], "line 1 of {file} must be an object"),
        (["{}"], "at_s in line 1 of {file} must be seconds, 0 or more, got None"),
        (['{"at_s": -1}'], "must be seconds, 0 or more, got -1"),
        (['{"at_s": NaN}'], "must be seconds, 0 or more, got nan"),
        (['{"at_s": 2}', '{"at_s": 1}'], "at_s in line 2 of {file} is earlier than the line before"),
        (['{"at_s": 1, "steps": 3}'], "line 1 of {file}: mix.steps: no such key"),
        ([], "holds no arrivals"),
    ],
)
def test_a_wrong_trace_is_told_by_its_line(tmp_path, lines, complaint):
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(ConfigError) as raised:
        read_trace(file)
    assert complaint.format(file=file) in str(raised.value)
    assert json.dumps(str(raised.value))
