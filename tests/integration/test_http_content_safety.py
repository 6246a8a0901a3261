"""Under content safety, every answer over HTTP is one that was looked at, or says that it was refused."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from web import Web, events_of, web

from mii_serve import config, errors

double = pytest.importorskip("content_safety_double")
azure = pytest.importorskip("mii_serve.safety.azure")

SCORE = {"input_data": {"columns": ["prompt"], "data": ["a horse"]}}
IMAGES = {"prompt": "a horse"}
STREAM = {**IMAGES, "stream": True, "partial_images": 3, "num_inference_steps": 20}
TASK = {"inputs": "a horse"}
CALLS = {"/score": SCORE, "/v1/images/generations": IMAGES, "/images/generations": STREAM, "/": TASK}
PICTURE = re.compile(rb"iVBORw0K|\x89PNG")


@contextlib.asynccontextmanager
async def guarded(folder: Path, service, **settings) -> AsyncIterator[Web]:
    asked = config.ContentSafetyConfig(endpoint=service.url, key=double.KEY, **settings)
    async with azure.open_moderator(asked) as moderator, web(folder, behind={"moderator": moderator}) as running:
        yield running


@pytest.fixture
async def service():
    async with double.content_safety_double() as running:
        yield running


async def test_what_is_harmless_is_made(tmp_path, service):
    async with guarded(tmp_path, service) as served:
        for path, body in CALLS.items():
            answer = await served.post(path, body)
            assert answer.status_code == 200 and PICTURE.search(answer.content), path
        assert len(service.texts) == len(CALLS) and len(service.images) >= len(CALLS)


async def test_a_blocked_prompt_makes_nothing(tmp_path, service):
    service.words["horse"] = ("Violence", 6)
    async with guarded(tmp_path, service) as served:
        score = await served.post("/score", SCORE)
        assert (score.status_code, score.text, score.headers["x-mii-blocked"]) == (200, "{}", "input")
        assert (score.headers["x-mii-blocked-category"], score.headers["x-mii-blocked-severity"]) == ("Violence", "6")
        for path in ("/v1/images/generations", "/images/generations"):
            told = (await served.post(path, CALLS[path])).json()["error"]
            assert (told["status"], told["code"]) == (400, "moderation_blocked")
            assert told["moderation_details"] == {"moderation_stage": "input", "categories": ["Violence"]}
        task = await served.post("/", TASK)
        assert (task.status_code, task.json()["error_type"]) == (400, "content_filter")
        assert served.server.loop.activity().num_requests == 0


async def test_a_blocked_picture_stays_here(tmp_path, service):
    service.judge_image = lambda image: {"Sexual": 6}
    async with guarded(tmp_path, service) as served:
        score = await served.post("/score", SCORE)
        assert [image["generated_image"] for image in score.json()] == [""] and score.headers["x-mii-blocked"] == "output"
        told = (await served.post("/v1/images/generations", IMAGES)).json()["error"]
        assert (told["code"], told["moderation_details"]["moderation_stage"]) == ("moderation_blocked", "output")
        stream = events_of((await served.post("/images/generations", STREAM)).text)
        assert stream[-1][0] == "error" and stream[-1][1]["error"]["code"] == "moderation_blocked"
        assert (await served.post("/", TASK)).status_code == 400


@pytest.mark.parametrize("mode", ["500", "hang"])
async def test_without_a_verdict_nothing_leaves_and_probes_answer(tmp_path, service, mode):
    async with guarded(tmp_path, service, timeout_s=1.5) as served:
        for stage in ("text_mode", "image_mode"):
            setattr(service, stage, mode)
            calls = [asyncio.create_task(served.post(path, body)) for path, body in CALLS.items()]
            if mode == "hang":
                await served.server.until(lambda: service.num_hanging)
            assert (await served.client.get("/readyz")).status_code == 200
            for answer in await asyncio.gather(*calls):
                assert not PICTURE.search(answer.content)
                if answer.headers["content-type"].startswith("application/json"):
                    assert answer.status_code == errors.ModerationFailedError.http_status
                else:
                    assert events_of(answer.text)[-1][0] == "error"
            service.released.set()
            service.released = asyncio.Event()
            setattr(service, stage, "ok")
