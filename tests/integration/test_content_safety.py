"""Content safety around everything the server does, with the real SDK and a double of the service."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import random
import time
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from content_safety_double import FAILURES, KEY, ContentSafetyDouble, content_safety_double
from fake_engine import FakeEngine
from grpc_health.v1 import health_pb2, health_pb2_grpc
from patience import PATIENCE_S
from PIL import Image
from servers import RunningServer, Turnstile, running_server

from mii_serve.client import AsyncClient
from mii_serve.config import ContentSafetyConfig, DeployConfig
from mii_serve.errors import ConfigError, ContentBlockedError, DeadlineExceededError, MiiServeError, ModerationFailedError
from mii_serve.gateway.app import serve_http
from mii_serve.proto.metadata import IDEMPOTENCY_KEY
from mii_serve.proto.status import decode_error
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.safety.azure import open_moderator
from mii_serve.server.call import CallContext
from mii_serve.server.keys import KeyRing
from mii_serve.types import GenerationRequest, ImageReady, Limits, RequestedParams

PROMPT = "a red circle, very secret"
PATIENT_S = 60.0  # the most that the setting may say
HASTY_S = 1.5
"""Soon over for who waits in vain, and long enough for a verdict that does come."""
"""For a verdict in tests that wait for nothing to happen; none of them waits so long."""


@pytest.fixture
async def double() -> AsyncIterator[ContentSafetyDouble]:
    async with content_safety_double() as running:
        yield running


@contextlib.asynccontextmanager
async def guarded(
    folder: Path, double: ContentSafetyDouble, engine: FakeEngine | None = None, **settings
) -> AsyncIterator[RunningServer]:
    asked = ContentSafetyConfig(**{"endpoint": double.url, "key": KEY, "timeout_s": PATIENT_S, **settings})
    async with (
        open_moderator(asked) as moderator,
        running_server(folder, engine or FakeEngine(max_slots=2), moderator=moderator) as running,
    ):
        yield running
    assert not double.refused, "the service would not have understood a request"


@pytest.fixture
async def server(tmp_path, double) -> AsyncIterator[RunningServer]:
    async with guarded(tmp_path, double) as running:
        yield running


@pytest.fixture
async def hasty(tmp_path, double) -> AsyncIterator[RunningServer]:
    async with guarded(tmp_path, double, timeout_s=HASTY_S) as running:
        yield running


def request(**fields) -> pb.GenerateRequest:
    return pb.GenerateRequest(**{"prompt": PROMPT, "seed": 5, **fields})


async def error_of(call) -> MiiServeError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return decode_error(caught.value.code(), caught.value.details() or "", caught.value.trailing_metadata())


async def told(call) -> tuple[list[pb.GenerateEvent], MiiServeError | None]:
    """The events of a stream, and what it ended with."""
    events = []
    try:
        async for event in call:
            events.append(event)  # noqa: PERF401 - those before an error count
    except grpc.aio.AioRpcError as error:
        return events, decode_error(error.code(), error.details() or "", error.trailing_metadata())
    return events, None


def seen_in(events: list[pb.GenerateEvent]) -> list[bytes]:
    """The pictures in them, finished or not."""
    kinds = [(event, event.WhichOneof("event")) for event in events]
    return [getattr(event, kind).data for event, kind in kinds if kind in ("image", "preview")]


def colour_of(seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).randbytes(3))


def is_flat(image: Image.Image, colour: tuple[int, ...]) -> bool:
    """Whether the corner has that colour, as nearly as files keep it."""
    return max(abs(a - b) for a, b in zip(image.getpixel((0, 0)), colour, strict=True)) <= 8


class AnySizeEngine(FakeEngine):
    @property
    def capabilities(self):
        return replace(super().capabilities, limits=Limits(min_size_px=8, max_size_px=4096))


def count(server: RunningServer, stage: str, outcome: str) -> float:
    labels = {"stage": stage, "outcome": outcome}
    return server.dispatcher.metrics.registry.get_sample_value("mii_serve_moderation_checks_total", labels) or 0.0


def num_requests(server: RunningServer) -> float:
    return server.dispatcher.metrics.registry.get_sample_value("mii_serve_requests_running") or 0.0


class TestWhatIsHarmless:
    async def test_passes_and_says_so_and_is_what_the_service_saw(self, server, double):
        response = await server.stub.Generate(request(negative_prompt="blurry", num_images_per_prompt=3))
        assert sorted(double.texts) == sorted([PROMPT, "blurry"])
        assert [image.HasField("moderation_blocked") and not image.moderation_blocked for image in response.images] == [
            True
        ] * 3
        assert sorted(double.images) == sorted(image.data for image in response.images)
        assert (count(server, "input", "passed"), count(server, "output", "passed")) == (1, 3)

    async def test_the_service_reads_what_the_text_encoder_reads(self, server, double):
        await server.stub.Generate(request(prompt=r"a (vi)(ol\ent:1.1) \(red\) BREAK circle", prompt_syntax="a1111"))
        assert "a violent (red)\ncircle" in double.texts

    async def test_embeddings_cannot_be_read_and_are_refused(self, server, double):
        embeds = pb.PromptEmbeds(num_tokens=77, width=768, dtype="fp16", data=bytes(2 * 77 * 768))
        for name, fields in (("prompt_embeds", {"prompt": ""}), ("negative_prompt_embeds", {})):
            error = await error_of(server.stub.Generate(request(**fields, **{name: embeds})))
            assert str(error).startswith(f"{name}: is refused here") and error.field == name
        assert not double.texts and not server.engine.plans

    async def test_a_severity_at_the_threshold_is_let_through(self, server, double):
        double.words = {"red": ("Violence", 2)}
        double.judge_image = lambda image: {"Hate": 2}
        response = await server.stub.Generate(request())
        assert not response.images[0].moderation_blocked

    async def test_without_content_safety_the_flag_is_absent(self, tmp_path):
        async with running_server(tmp_path, FakeEngine()) as plain:
            response = await plain.stub.Generate(request())
        assert not response.images[0].HasField("moderation_blocked")

    @pytest.mark.parametrize("size", [(8, 8), (64, 64), (2304, 8)], ids=str)
    @pytest.mark.parametrize("image_format", pb.ImageFormat.values()[1:], ids=pb.ImageFormat.keys()[1:])
    async def test_every_size_and_format_is_looked_at(self, tmp_path, double, size, image_format):
        height, width = size
        async with guarded(tmp_path, double, AnySizeEngine()) as server:
            await server.stub.Generate(request(height=height, width=width, output=pb.OutputOptions(format=image_format)))
        with Image.open(io.BytesIO(double.images[0])) as seen:
            assert is_flat(seen.convert("RGB"), colour_of(5))

    async def test_long_prompts_are_looked_at_whole(self, tmp_path, double):
        double.words = {"🏴 end": ("Hate", 6)}
        async with guarded(tmp_path, double) as server:
            limit = server.engine.capabilities.limits.max_prompt_chars
            prompt = "é" * (limit - 5) + "🏴 end"
            error = await error_of(server.stub.Generate(request(prompt=prompt)))
        assert isinstance(error, ContentBlockedError) and double.texts == [prompt]


class TestImagesToStartFrom:
    async def test_are_looked_at_before_any_work_and_refused_by_their_field(self, server, double):
        file = io.BytesIO()
        Image.new("RGB", (96, 64), (200, 30, 40)).save(file, "PNG")
        asked = request(image=file.getvalue(), strength=0.5)
        await server.stub.Generate(asked)
        with Image.open(io.BytesIO(double.images[0])) as seen:
            assert seen.size == (96, 64) and is_flat(seen.convert("RGB"), (200, 30, 40))
        double.judge_image = lambda image: {"Violence": 6}
        error = await error_of(server.stub.Generate(asked))
        assert isinstance(error, ContentBlockedError) and error.field == "image"
        assert server.loop.activity().num_requests == 1, "nothing was made of it"


class TestRefusedText:
    @pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
    @pytest.mark.parametrize("method", ["Generate", "GenerateStream"])
    async def test_costs_no_turn_and_is_not_repeated(self, server, double, field, method):
        double.words = {"gore": ("Violence", 4)}
        asked = request(**{field: "gore and more"})
        if method == "Generate":
            error = await error_of(server.stub.Generate(asked))
        else:
            events, error = await told(server.stub.GenerateStream(asked))
            assert events == []
        assert isinstance(error, ContentBlockedError)
        assert (error.stage, error.field, error.categories) == ("input", field, {"Violence": 4})
        assert "gore" not in str(error)
        assert server.engine.plans == [] and double.images == []
        assert (count(server, "input", "blocked"), count(server, "output", "passed")) == (1, 0)

    async def test_a_blocklist_is_enough(self, tmp_path, double):
        double.blocklists = {"brands": ["Contoso"], "other": []}
        async with guarded(tmp_path, double, blocklists=("other", "brands")) as server:
            error = await error_of(server.stub.Generate(request(prompt="the Contoso logo")))
            await server.stub.Generate(request())
        assert isinstance(error, ContentBlockedError) and error.on_blocklist and not error.categories

    async def test_it_is_refused_again_under_its_idempotency_key(self, server, double):
        double.words = {"gore": ("Violence", 4)}
        for _ in range(2):
            error = await error_of(server.stub.Generate(request(prompt="gore"), metadata=((IDEMPOTENCY_KEY, "k"),)))
            assert isinstance(error, ContentBlockedError)
        assert server.engine.plans == []


class TestBlockedPictures:
    @pytest.mark.parametrize("image_format", pb.ImageFormat.values()[1:], ids=pb.ImageFormat.keys()[1:])
    async def test_are_black_and_say_so_and_their_neighbours_are_not(self, server, double, image_format):
        double.judge_image = lambda image: {"Sexual": 4 if is_flat(image, colour_of(6)) else 0}
        output = pb.OutputOptions(format=image_format)
        response = await server.stub.Generate(request(num_images_per_prompt=3, height=128, output=output))
        assert [image.moderation_blocked for image in response.images] == [False, True, False]
        for image in response.images:
            assert (image.height, image.width, image.format) == (128, 64, image_format)
            if image_format == pb.IMAGE_FORMAT_RAW_RGB:
                picture = Image.frombytes("RGB", (64, 128), image.data)
            else:
                with Image.open(io.BytesIO(image.data)) as file:
                    assert (file.format, file.size) == (pb.ImageFormat.Name(image_format)[13:], (64, 128))
                    picture = file.convert("RGB")
            assert (picture.getextrema() == ((0, 0),) * 3) == image.moderation_blocked
        assert (count(server, "output", "blocked"), count(server, "output", "passed")) == (1, 2)

    async def test_the_sdk_tells(self, server, double):
        double.judge_image = lambda image: {"Hate": 6}
        async with AsyncClient(server.target) as client:
            result = await client.generate(PROMPT, num_images_per_prompt=2)
            assert result.moderation_blocked == [True, True]
            assert [image.getextrema() for image in result.images] == [((0, 0),) * 3] * 2
            double.words = {"red": ("SelfHarm", 6)}
            with pytest.raises(ContentBlockedError) as caught:
                await client.generate(PROMPT)
            assert caught.value.categories == {"SelfHarm": 6}
            double.text_mode = "500"
            with pytest.raises(ModerationFailedError, match="HTTP 500"):
                await client.generate(PROMPT)

    async def test_their_metadata_goes_with_them(self, server, double):
        double.judge_image = lambda image: {"Hate": 6}
        response = await server.stub.Generate(request(output=pb.OutputOptions(embed_metadata=True)))
        assert PROMPT.encode() in double.images[0] and PROMPT.encode() not in response.images[0].data


class TestNoVerdict:
    @pytest.mark.parametrize("mode", FAILURES)
    async def test_on_the_text_nothing_is_made(self, hasty, double, mode):
        double.text_mode = mode
        error = await error_of(hasty.stub.Generate(request()))
        assert type(error) is ModerationFailedError and PROMPT not in str(error)
        assert hasty.engine.plans == [] and double.num_calls <= 2
        assert count(hasty, "input", "failed") == 1

    @pytest.mark.parametrize("mode", FAILURES)
    async def test_on_a_picture_nothing_leaves(self, hasty, double, mode):
        double.image_mode = mode
        assert type(await error_of(hasty.stub.Generate(request(num_images_per_prompt=2)))) is ModerationFailedError
        output = pb.OutputOptions(preview_every=1)
        events, error = await told(hasty.stub.GenerateStream(request(num_images_per_prompt=2, output=output)))
        assert type(error) is ModerationFailedError
        assert events and seen_in(events) == [] and not any(event.HasField("done") for event in events)
        await hasty.until(lambda: not num_requests(hasty))

    async def test_a_later_try_under_the_same_key_is_made_and_looked_at_anew(self, hasty, double):
        double.image_mode, key = "500", ((IDEMPOTENCY_KEY, "k"),)
        for _ in range(2):
            assert type(await error_of(hasty.stub.Generate(request(), metadata=key))) is ModerationFailedError
        double.image_mode = "ok"
        response = await hasty.stub.Generate(request(), metadata=key)
        assert response.images[0].data == double.images[-1]

    async def test_a_service_that_is_not_there(self, tmp_path, double):
        async with content_safety_double() as gone:
            pass
        async with guarded(tmp_path, gone) as server:
            assert type(await error_of(server.stub.Generate(request()))) is ModerationFailedError
        assert server.engine.plans == []

    async def test_a_wrong_key_is_told_without_the_key(self, tmp_path, double):
        double.key = "another"
        async with guarded(tmp_path, double) as server:
            error = await error_of(server.stub.Generate(request()))
            assert type(error) is ModerationFailedError and "401" in str(error) and KEY not in str(error)
            double.refused.clear()

    async def test_an_identity_without_a_token(self, double, monkeypatch):
        monkeypatch.setenv("IDENTITY_ENDPOINT", f"{double.url}/msi/token")
        monkeypatch.setenv("IDENTITY_HEADER", "wrong")
        asked = ContentSafetyConfig(endpoint="https://127.0.0.1:1", client_id="system", timeout_s=30)
        async with open_moderator(asked) as moderator:
            assert moderator is not None
            with pytest.raises(ModerationFailedError, match="the managed identity has no token that"):
                await moderator.check_texts(PROMPT, "")

    async def test_the_key_does_not_follow_a_redirect(self, tmp_path, double):
        async with content_safety_double() as thief, guarded(tmp_path, double) as server:
            double.redirect_to = thief.url
            assert type(await error_of(server.stub.Generate(request()))) is ModerationFailedError
        assert thief.num_calls == 0

    async def test_the_callers_own_deadline_comes_first(self, server, double):
        double.text_mode = "hang"
        assert isinstance(await error_of(server.stub.Generate(request(), timeout=0.3)), DeadlineExceededError)
        await server.until(lambda: not num_requests(server) and not double.num_hanging)
        assert server.engine.plans == []

    @pytest.mark.parametrize("mode", ["text_mode", "image_mode"])
    async def test_a_deadline_that_no_transport_watches_holds_too(self, server, double, mode):
        setattr(double, mode, "hang")
        call = CallContext(request_id="r", client="c", deadline=time.monotonic() + 0.5)
        with pytest.raises(DeadlineExceededError):
            async for event in server.dispatcher.events(GenerationRequest(params=RequestedParams(prompt="a")), call):
                assert not isinstance(event, ImageReady)


class TestWhileTheServiceHangs:
    async def test_health_answers_and_other_callers_are_told_what_is(self, server, double):
        double.image_mode = "hang"
        calls = [asyncio.create_task(told(server.stub.GenerateStream(request(seed=seed)))) for seed in range(3)]
        await server.until(lambda: double.num_hanging == 3)
        async with serve_http(DeployConfig.load({"http_port": 0}), server.dispatcher, KeyRing()) as address:
            for path in ("readyz", "livez", "metrics"):
                answer = await asyncio.to_thread(urllib.request.urlopen, f"http://{address}/{path}", timeout=PATIENCE_S)
                with answer:
                    assert answer.status == 200
        health = await health_pb2_grpc.HealthStub(server.channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        assert await server.stub.GetServerInfo(pb.GetServerInfoRequest())
        assert double.num_hanging == 3 and not any(call.done() for call in calls), "all that while it hung"
        double.released.set()
        for events, error in await asyncio.gather(*calls):
            assert error is None and len(seen_in(events)) == 1

    async def test_nothing_unseen_leaves_and_the_order_is_kept(self, server, double):
        double.image_mode = "hang"
        events = []

        async def read() -> None:
            output = pb.OutputOptions(preview_every=1)
            async for event in server.stub.GenerateStream(request(num_images_per_prompt=4, output=output)):
                events.append(event)  # noqa: PERF401 - they are looked at meanwhile

        reading = asyncio.create_task(read())
        first, joined = (
            asyncio.ensure_future(server.stub.Generate(request(seed=50), metadata=((IDEMPOTENCY_KEY, "k"),))) for _ in range(2)
        )
        await server.until(lambda: server.loop.activity().num_images == 5 and double.num_hanging >= 5)
        assert events and seen_in(events) == []
        assert not (first.done() or joined.done())
        double.released.set()
        await reading
        kinds = [event.WhichOneof("event") for event in events]
        assert kinds[-1] == "done" and kinds.count("done") == 1 and kinds.count("image") == 4
        assert set(seen_in(events)) <= set(double.images)
        later = await server.stub.Generate(request(seed=50), metadata=((IDEMPOTENCY_KEY, "k"),))
        answers = [await first, await joined, later]
        [picture] = {answer.images[0].data for answer in answers}
        assert double.images.count(picture) == 1, "looked at once for all of them"

    async def test_who_hangs_up_frees_slots_and_calls(self, server, double):
        double.image_mode = "hang"
        call = server.stub.GenerateStream(request(num_images_per_prompt=3, output=pb.OutputOptions(preview_every=1)))
        unary = asyncio.ensure_future(server.stub.Generate(request(num_inference_steps=1)))
        reading = asyncio.create_task(told(call))
        await server.until(lambda: double.num_hanging >= 2)
        call.cancel()
        unary.cancel()
        await asyncio.gather(reading, unary, return_exceptions=True)
        await server.until(lambda: not num_requests(server) and not double.num_hanging)
        await server.until(lambda: not server.loop.activity().num_running and not server.loop.activity().num_waiting)

    async def test_who_hangs_up_over_a_preview_ends_the_work_behind_it(self, server, double):
        double.image_mode, server.engine.gate = "hang", Turnstile()
        output = pb.OutputOptions(preview_every=1)
        call = server.stub.GenerateStream(request(num_inference_steps=1000, output=output))
        reading = asyncio.create_task(told(call))
        server.engine.gate.let(3)
        await server.until(lambda: double.num_hanging == 1 and server.loop.activity().num_running == 1)
        call.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        server.engine.gate.let(3)
        await server.until(lambda: not server.loop.activity().num_running)
        assert server.loop.activity().num_images == 0

    async def test_who_hangs_up_before_the_text_is_judged_leaves_nothing(self, server, double):
        double.text_mode = "hang"
        call = asyncio.ensure_future(server.stub.Generate(request(negative_prompt="blurry")))
        await server.until(lambda: double.num_hanging == 2)
        call.cancel()
        await server.until(lambda: not num_requests(server) and not double.num_hanging)
        assert server.engine.plans == []
        assert count(server, "input", "failed") == count(server, "input", "passed") == 0

    async def test_a_drain_waits_for_verdicts(self, server, double):
        double.image_mode = "hang"
        call = asyncio.ensure_future(server.stub.Generate(request()))
        await server.until(lambda: double.num_hanging == 1)
        drained = asyncio.create_task(server.dispatcher.drain(PATIENT_S))
        await asyncio.sleep(0)
        assert not drained.done()
        double.released.set()
        assert (await call).images and await drained


class TestPreviews:
    async def test_those_that_are_shown_have_been_seen(self, server, double):
        output = pb.OutputOptions(preview_every=1)
        events, error = await told(server.stub.GenerateStream(request(num_inference_steps=20, output=output)))
        assert error is None
        kinds = [event.WhichOneof("event") for event in events]
        assert kinds.count("preview") >= 1
        assert sorted(seen_in(events)) == sorted(double.images)
        assert count(server, "preview", "passed") == kinds.count("preview")

    async def test_those_that_are_blocked_or_without_a_verdict_are_not_shown(self, hasty, double):
        output = pb.OutputOptions(preview_every=1)
        double.judge_image = lambda image: {"Violence": 6}
        events, error = await told(hasty.stub.GenerateStream(request(num_inference_steps=20, output=output)))
        assert error is None and [event.WhichOneof("event") for event in events].count("preview") == 0
        assert count(hasty, "preview", "blocked") >= 1
        assert events[-2].image.moderation_blocked


class TestAtTheStart:
    async def test_the_sdk_is_wanted_only_where_it_is_asked_for(self, monkeypatch):
        for name in ("azure.ai.contentsafety.aio", "azure.identity.aio"):
            monkeypatch.setitem(__import__("sys").modules, name, None)
        async with open_moderator(ContentSafetyConfig()) as moderator:
            assert moderator is None
        with pytest.raises(ConfigError, match=r"content_safety: .* is not installed: install mii_serve with the extra azure"):
            async with open_moderator(ContentSafetyConfig(endpoint="https://x", key="k")):
                pass


async def test_neither_prompt_nor_key_is_in_the_log(tmp_path, double, caplog):
    with caplog.at_level(logging.DEBUG):
        async with guarded(tmp_path, double, timeout_s=HASTY_S) as server:
            assert KEY not in repr(server.dispatcher._moderation._moderator)
            await server.stub.Generate(request())
            double.image_mode = "hang"
            await error_of(server.stub.Generate(request()))
            double.words = {"secret": ("Hate", 6)}
            await error_of(server.stub.Generate(request()))
            double.words, double.image_mode, double.judge_image = {}, "ok", lambda image: {"Sexual": 4}
            await server.stub.Generate(request())
    assert "prompt: refused by content safety: Hate 6, request_id=" in caplog.text
    assert "blocked by content safety: output, Sexual=4, request_id=" in caplog.text
    assert "no verdict: content safety did not answer within 1.5 s" in caplog.text
    assert "very secret" not in caplog.text and KEY not in caplog.text
