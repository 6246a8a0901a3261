"""The model that MLflow loads, without MLflow: rows share the batch, and content safety lets nothing pass without a verdict."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from content_safety_double import KEY, double_in_a_thread
from fake_engine import FakeEngine
from PIL import Image

from mii_serve.errors import InvalidRequestError, ModerationFailedError
from mii_serve.replica import pyfunc
from mii_serve.replica.pyfunc import TextToImage

SMALL = {"num_inference_steps": 2, "height": 64, "width": 64}


@pytest.fixture
def engine(monkeypatch) -> FakeEngine:
    engine = FakeEngine(max_slots=4)
    monkeypatch.setattr(pyfunc, "build_warm_engine", lambda config: engine)
    return engine


@pytest.fixture
def double(monkeypatch):
    with double_in_a_thread() as double:
        monkeypatch.setenv("CONTENT_SAFETY_ENDPOINT", double.url)
        monkeypatch.setenv("CONTENT_SAFETY_KEY", KEY)
        monkeypatch.setenv("MII_SERVE_CONTENT_SAFETY__TIMEOUT_S", "1")
        yield double


@pytest.fixture
def model(engine, tmp_path) -> Iterator[TextToImage]:
    model = TextToImage(tmp_path)
    yield model
    model.close()


def test_rows_share_the_batch_and_keep_their_order(model, engine):
    prompts = [f"number {n}" for n in range(8)] + ["a skull"]
    rows = model.predict(prompts, {**SMALL, "seed": 1, "num_images_per_prompt": 2})
    assert [prompt for prompt, _, _ in rows] == [prompt for prompt in prompts for _ in range(2)]
    assert [nsfw for _, _, nsfw in rows] == [False] * 16 + [True] * 2
    assert max(len(plan.steps) for plan in engine.plans) == 4
    with Image.open(io.BytesIO(base64.b64decode(rows[0][1]))) as image:
        assert image.size == (64, 64)
    assert b"trainedAlgorithmicMedia" in base64.b64decode(rows[0][1]), "marked as the server marks its images"


def test_threads_share_it_too_and_an_error_is_the_callers_own(model, engine):
    engine.gate.clear()
    with ThreadPoolExecutor(4) as callers:
        asked = [callers.submit(model.predict, [f"caller {n}"], SMALL) for n in range(4)]
        with pytest.raises(InvalidRequestError, match="num_inference_steps"):
            model.predict(["a"], {"num_inference_steps": 0})
        threading.Timer(0.05, engine.gate.set).start()
        assert [call.result()[0][0] for call in asked] == [f"caller {n}" for n in range(4)]
    with pytest.raises(InvalidRequestError, match="prompt"):
        model.predict(["fine", ""], SMALL)


def test_content_safety_blocks_texts_and_pictures(double, model, engine, monkeypatch, tmp_path):
    double.words = {"gore": ("Violence", 6)}
    ((_, encoded, nsfw), (_, other, _)) = model.predict(["gore", "a circle"], SMALL)
    assert (encoded, nsfw) == ("", None) and base64.b64decode(other) == double.images[-1] and len(double.images) == 1
    double.judge_image = lambda image: {"Sexual": 4}
    assert model.predict(["a circle"], SMALL) == [("a circle", "", False)]
    monkeypatch.setattr(model, "_output", tmp_path / "pictures")
    assert model.predict(["a circle"], SMALL) == [("a circle", "Blocked By Azure AI Content Safety", False)]
    assert not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("stage", ["text", "image"])
def test_no_verdict_no_picture(double, model, monkeypatch, tmp_path, stage):
    monkeypatch.setattr(model, "_output", tmp_path / "pictures")
    for mode in ("no json", "one severity missing"):  # the moderator's own tests have the others
        setattr(double, f"{stage}_mode", mode)
        with pytest.raises(ModerationFailedError):
            model.predict(["a circle"], SMALL)
    assert not (tmp_path / "pictures").exists()
