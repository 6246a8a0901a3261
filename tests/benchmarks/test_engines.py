"""`benchmarks/engines.py` in its smallest configuration, and the figures it divides by."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from patience import PATIENCE_S
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def test_the_smoke_run_times_every_row_or_says_why_not(tmp_path):
    out = tmp_path / "engines.json"
    command = [sys.executable, "benchmarks/engines.py", "--model", "demo", "--quick", "--out", str(out)]
    # One thread: two that wait for each other are slow on a machine that is busy with other tests.
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False, env=alone)
    assert ran.returncode == 0, ran.stderr[-2000:]
    written = json.loads(out.read_text())
    rows: dict[str, list[dict]] = {}
    for row in written["rows"]:
        rows.setdefault(row["row"], []).append(row)
    assert set(rows) == {
        "reference", "native", "diffusers_eager", "deepspeed", "native_unfused", "native_without_graphs", "diffusers_compiled",
        "diffusers_deepspeed",
    }  # fmt: skip
    for name in ("reference", "native", "diffusers_eager"):
        assert [row["num_images"] for row in rows[name]] == [1, 2]
        for row in rows[name]:
            assert set(row["stage_s"]) == {"encode", "denoise", "decode", "safety", "encode_image"}
            assert row["max_levels_off"] <= 1  # all in float32: the same pictures
            assert 0 < row["share_of_matmul_peak"] < 2
    for name in ("diffusers_compiled", "native_unfused", "native_without_graphs", "diffusers_deepspeed"):
        assert all(row.get("skipped") or "median_s" in row for row in rows[name])
    assert {"commit", "date", "device", "versions", "command"} <= set(written)
    assert len(list((tmp_path / "truth" / "engines").iterdir())) == 1


def test_a_run_goes_on_where_the_one_before_stopped(tmp_path, monkeypatch):
    import engines

    about = {
        "commit": "a",
        "device": "d",
        "versions": {},
        "model": "m",
        "model_revision": "",
        "dtype": "fp32",
        "is_quick": True,
    }
    done = [
        {"row": name, "sampler": "pndm", "num_inference_steps": 2, "num_images": count, "median_s": 1.0}
        for name, count in (("reference", 1), ("reference", 2), ("native", 1))
    ]
    out = tmp_path / "engines.json"
    out.write_text(json.dumps({**about, "rows": [*done, {"row": "native", "skipped": "no time"}]}))
    before = engines.measured_before(out, about)
    assert before == done and engines.measured_before(out, {**about, "commit": "b"}) == []
    truth = engines.Truth(tmp_path / "truth")
    truth.keep(("pndm", 2), Image.new("RGB", (4, 4), (9, 9, 9)))

    opened: list[str] = []
    measured: list[int] = []

    @contextlib.contextmanager
    def opening(name, place):
        opened.append(name)
        yield SimpleNamespace(dtype="fp32")

    def measure(row, sampler, num_steps, count, repeats):
        measured.append(count)
        figures = {"sampler": sampler, "num_inference_steps": num_steps, "num_images": count, "median_s": 1.0}
        return {**figures, "pictures": [Image.new("RGB", (4, 4), (8, 9, 9))]}

    monkeypatch.setattr(engines, "opened", opening)
    monkeypatch.setattr(engines, "measure", measure)
    arguments = SimpleNamespace(rows=["reference", "native"], quick=True, repeats=1)
    facts = {"calls": {}, "guidance_scale": 7.5, "matmul_peak_tflops": {}, "unet_gflop_per_row": 1.0}
    written: list[list[dict]] = []
    engines.run(None, facts, arguments, engines.Clock(60.0), before, truth, lambda rows: written.append(list(rows)))
    assert (opened, measured) == (["native"], [2])
    assert [(row["row"], row["num_images"]) for row in written[-1]] == [
        ("reference", 1), ("reference", 2), ("native", 1), ("native", 2),
    ]  # fmt: skip
    assert written[-1][-1]["max_levels_off"] == 1, "compared with the picture that was kept"


def test_the_time_a_row_takes_to_load_is_not_the_time_it_has(monkeypatch, tmp_path):
    import engines

    now = [0.0]
    monkeypatch.setattr(engines.time, "monotonic", lambda: now[0])

    @contextlib.contextmanager
    def opening(name, place):
        now[0] += 100.0
        yield SimpleNamespace(dtype="fp16")

    def measure(row, sampler, num_steps, count, repeats):
        now[0] += count
        figures = {"sampler": sampler, "num_inference_steps": num_steps, "num_images": count, "median_s": count / (repeats + 2)}
        return {**figures, "pictures": [Image.new("RGB", (4, 4))]}

    monkeypatch.setattr(engines, "opened", opening)
    monkeypatch.setattr(engines, "measure", measure)
    arguments = SimpleNamespace(rows=list(engines.ROWS), quick=False, repeats=3)
    facts = {"calls": {}, "guidance_scale": 7.5, "matmul_peak_tflops": {}, "unet_gflop_per_row": 1.0}
    written: list[list[dict]] = []
    truth = engines.Truth(tmp_path)
    engines.run(None, facts, arguments, engines.Clock(520.0, 0.0), [], truth, lambda rows: written.append(list(rows)))
    measured = [row["row"] for row in written[-1] if "median_s" in row]
    assert [measured.count(name) for name in ("reference", "native")] == [2, 10], "all there is of what matters most"
    assert measured.count("diffusers_eager") >= 5
    assert len(written) > len(engines.ROWS), "written after each measurement"
    assert written[-1][-1]["skipped"] == "no time left to load it"
    assert now[0] < 600


def test_the_unet_of_v1_4_is_counted_as_published():
    """803 GFLOP a row at 64×64 latent cells, convolutions, linear layers and attention together."""
    import torch
    from diffusers import UNet2DConditionModel
    from engines import unet_flops_per_row

    from mii_serve.models.families import SD_V1_4

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD_V1_4.unet)
    assert unet_flops_per_row(unet, 512, 512) == pytest.approx(803.3e9, rel=0.002)


def test_every_row_finds_the_weights_that_were_made_once(tmp_path, monkeypatch):
    """What is saved for the rows is a model our own engines and diffusers load, and both make the same picture of it."""
    import engines
    from engine_rows import Place, opened
    from tiny_shape import TINY

    from mii_serve.models import random_init
    from mii_serve.types import RequestedParams

    tiny = replace(TINY, text_encoder={**TINY.text_encoder, "vocab_size": 1000})
    monkeypatch.setattr(random_init, "SD_V1_4", tiny)
    monkeypatch.setattr(engines, "matmul_peak", lambda device, dtype: 1e12)
    place, facts = engines.on_weights("random-sd-v1-4", "cpu", "fp32", tmp_path / "model")
    assert place == Place(model=str(tmp_path / "model"), device="cpu", dtype="fp32")
    assert facts["calls"] == {"pndm": 51, "dpm++_2m": 25}
    asked = RequestedParams(prompt="a", scheduler="pndm", num_inference_steps=2, height=64, width=64, seed=1)
    pictures = []
    for name in ("reference", "native", "diffusers_eager"):
        with opened(name, place) as row:
            pictures.append(row.burst(asked, 2))
    for others in pictures[1:]:
        for one, other in zip(pictures[0], others, strict=True):
            assert engines.distance(one, other)[0] <= 1
