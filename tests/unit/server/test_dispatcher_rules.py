"""The dispatcher over replicas in memory: what it resolves, refuses, counts, drains and stops."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from replica_doubles import CRASHED, call_context, router_of, settle

from mii_serve.errors import ContentBlockedError, InvalidRequestError, MiiServeError, UnavailableError
from mii_serve.safety.moderation import ModerationVerdict
from mii_serve.server.call import CallContext
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.types import (
    Capabilities,
    Done,
    Event,
    GenerationAnswer,
    GenerationDefaults,
    GenerationRequest,
    ImageFormat,
    ImageReady,
    Limits,
    OutputOptions,
    Priority,
    RequestedParams,
    ResolvedRequest,
    Step,
)

CAPABILITIES = Capabilities(
    limits=Limits(),
    defaults=GenerationDefaults(scheduler="pndm", num_inference_steps=4, height=64, width=64),
    schedulers={"pndm": "pndm"},
)


class Harness:
    def __init__(self, num_replicas: int = 1, **options: object) -> None:
        self.router, self.replicas = router_of(num_replicas)
        self.dispatcher = Dispatcher(self.router, **options)
        self.dispatcher._capabilities = CAPABILITIES

    def finish(self) -> None:
        for replica in self.replicas:
            for generation in list(replica.running):
                generation.finish()

    def assert_at_rest(self) -> None:
        assert not self.dispatcher._active and not self.dispatcher._waiting and self.dispatcher._idle.is_set()
        for replica in self.replicas:
            assert not replica.running and (replica.life.work, replica.life.num_running) == (0, 0)


def request(*, output: OutputOptions | None = None, **params: object) -> GenerationRequest:
    asked = RequestedParams(**{"prompt": "a red circle", **params})
    return GenerationRequest(params=asked, output=output or OutputOptions(format=ImageFormat.RAW_RGB))


class Reader:
    """A caller of `events`."""

    def __init__(
        self,
        harness: Harness,
        asked: GenerationRequest | ResolvedRequest | None = None,
        call: CallContext | None = None,
        **options: object,
    ) -> None:
        self.events: list[Event] = []
        self.error: MiiServeError | None = None
        self.call = call or call_context()
        self._stream = harness.dispatcher.events(asked or request(), self.call, **options)
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for event in self._stream:
                self.events.append(event)
        except MiiServeError as error:
            self.error = error
            task = asyncio.current_task()
            assert task is not None and not task.cancelling(), "the task can go on"
        finally:
            await self._stream.aclose()

    @property
    def images(self) -> list[ImageReady]:
        return [event for event in self.events if isinstance(event, ImageReady)]

    async def leave(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@pytest.fixture
async def harness() -> Harness:
    return Harness()


class TestResolving:
    @pytest.fixture
    def resolved_prompts(self, monkeypatch) -> list[str]:
        prompts: list[str] = []
        resolve = Capabilities.resolve

        def counted(self, asked, **options):
            prompts.append(asked.prompt)
            return resolve(self, asked, **options)

        monkeypatch.setattr(Capabilities, "resolve", counted)
        return prompts

    @pytest.mark.parametrize("key", [None, "k"])
    async def test_a_request_is_resolved_once(self, resolved_prompts, key):
        harness = Harness(2, moderator=Harmless())
        reader = Reader(harness, request(num_images_per_prompt=3), call_context(idempotency_key=key))
        await settle()
        harness.replicas[0].lose()
        harness.replicas[0].start()
        await settle()
        harness.finish()
        await reader.task
        assert len(reader.images) == 3 and resolved_prompts == ["a red circle"]

    async def test_one_that_is_resolved_already_is_taken_as_it_is(self, harness, resolved_prompts):
        resolved = harness.dispatcher.resolve(request(seed=3))
        reader = Reader(harness, resolved)
        await settle()
        assert harness.replicas[0].life.orders[0].request == resolved and len(resolved_prompts) == 1
        await reader.leave()

    async def test_what_is_left_out_is_the_models_default_and_a_drawn_seed(self, harness):
        resolved = [harness.dispatcher.resolve(request()) for _ in range(4)]
        assert {one.params.num_inference_steps for one in resolved} == {4}
        assert len({one.params.seed for one in resolved}) > 1

    @pytest.mark.parametrize("params", [{"num_inference_steps": 0}, {"scheduler": "unknown"}, {"height": 63}])
    async def test_one_that_breaks_a_rule_costs_nothing(self, harness, params):
        reader = Reader(harness, request(**params))
        await reader.task
        assert isinstance(reader.error, InvalidRequestError) and reader.error.field in params
        assert not harness.replicas[0].life.orders
        harness.assert_at_rest()

    async def test_before_any_replica_has_described_the_model(self):
        harness = Harness()
        harness.dispatcher._capabilities = None
        reader = Reader(harness)
        await reader.task
        assert isinstance(reader.error, UnavailableError)

    async def test_its_parameters_and_events_are_logged(self, harness):
        reader = Reader(harness, request(seed=3))
        await settle()
        assert (reader.call.log["seed"], reader.call.log["num_inference_steps"]) == (3, 4)
        harness.replicas[0].running[0].start()
        await settle()
        assert reader.call.log["is_started"] is True
        await reader.leave()


class TestSteps:
    @pytest.mark.parametrize(("has_steps", "key", "ordered"), [(True, None, True), (False, None, False), (False, "k", True)])
    async def test_they_are_ordered_for_those_who_want_them_and_those_who_may_join(self, harness, has_steps, key, ordered):
        reader = Reader(harness, call=call_context(idempotency_key=key), has_steps=has_steps)
        await settle()
        assert harness.replicas[0].life.orders[0].has_steps == ordered
        harness.finish()
        await reader.task
        assert any(isinstance(event, Step) for event in reader.events) == has_steps

    async def test_an_answer_at_once_needs_none(self, harness):
        answering = asyncio.create_task(harness.dispatcher.generate(request(seed=3), call_context()))
        await settle()
        assert not harness.replicas[0].life.orders[0].has_steps
        harness.finish()
        answer = await answering
        assert isinstance(answer, GenerationAnswer) and [image.seed for image in answer.images] == [3]
        harness.assert_at_rest()


class TestKeys:
    async def test_the_same_key_is_worked_on_once_whether_the_answer_comes_at_once_or_in_steps(self, harness):
        first = Reader(harness, request(), call_context(idempotency_key="k"))
        await settle()
        second = asyncio.create_task(harness.dispatcher.generate(request(), call_context(idempotency_key="k")))
        await settle()
        harness.finish()
        await first.task
        assert list((await second).images) == first.images and len(harness.replicas[0].life.orders) == 1

    @pytest.mark.parametrize(
        "other", [{"seed": 4}, {"prompt": "a blue circle"}, {"output": OutputOptions(format=ImageFormat.PNG)}], ids=str
    )
    async def test_a_key_is_for_one_request(self, harness, other):
        first = Reader(harness, request(seed=3), call_context(idempotency_key="k"))
        second = Reader(harness, request(**{"seed": 3, **other}), call_context(idempotency_key="k"))
        await second.task
        assert isinstance(second.error, InvalidRequestError)
        await first.leave()

    async def test_it_belongs_to_an_api_key_or_to_all_who_need_none(self, harness):
        calls = [("c", None), ("d", None), ("key a", "a"), ("key b", "b")]
        readers = [
            Reader(harness, call=call_context(idempotency_key="k", client=client, key_name=name)) for client, name in calls
        ]
        await settle()
        assert len(harness.replicas[0].life.orders) == 3, "c and d share one"
        for reader in readers:
            await reader.leave()

    async def test_parts_of_a_call_are_works_of_their_own(self, harness):
        call = call_context(idempotency_key="k")
        readers = [Reader(harness, call=call.for_part(part)) for part in range(2)]
        await settle()
        assert len(harness.replicas[0].life.orders) == 2
        for reader in readers:
            await reader.leave()

    async def test_previews_cannot_go_with_one(self, harness):
        output = OutputOptions(format=ImageFormat.PNG, preview_every=1)
        reader = Reader(harness, request(output=output), call_context(idempotency_key="k"))
        await reader.task
        assert isinstance(reader.error, InvalidRequestError) and reader.error.field == "output.preview_every"
        harness.assert_at_rest()

    async def test_one_that_breaks_the_rule_is_refused(self, harness):
        reader = Reader(harness, call=call_context(idempotency_key="two words"))
        await reader.task
        assert isinstance(reader.error, InvalidRequestError) and not harness.replicas[0].life.orders
        harness.assert_at_rest()

    async def test_who_takes_the_work_of_another_over_gets_images_of_one_seed(self, harness):
        """Neither named a seed. The first one's time runs out after an image, the second one has time."""
        asked = request(num_images_per_prompt=2)
        first = Reader(harness, asked, call_context(idempotency_key="k", timeout_s=5.0))
        second = asyncio.create_task(harness.dispatcher.generate(asked, call_context(idempotency_key="k")))
        await settle()
        harness.replicas[0].running[0].image(0)
        await first.task
        await settle()
        harness.finish()
        answer = await second
        seed = first.images[0].seed
        assert [(image.image_index, image.seed) for image in answer.images] == [(0, seed), (1, seed + 1)]


class Harmless:
    """A moderator that finds everything harmless but one prompt."""

    async def check_texts(self, prompt: str, negative_prompt: str) -> None:
        if prompt == "gore":
            raise ContentBlockedError("prompt", {"Violence": 4}, stage="input")

    async def check_image(self, image: bytes) -> ModerationVerdict:
        return ModerationVerdict()

    async def close(self) -> None: ...


class TestModeration:
    async def test_every_image_has_been_checked(self):
        harness = Harness(moderator=Harmless())
        reader = Reader(harness)
        await settle()
        harness.finish()
        await reader.task
        assert [image.moderation_blocked for image in reader.images] == [False] and isinstance(reader.events[-1], Done)
        harness.assert_at_rest()

    async def test_a_refused_text_costs_no_replica(self):
        harness = Harness(moderator=Harmless())
        reader = Reader(harness, request(prompt="gore"))
        await reader.task
        assert isinstance(reader.error, ContentBlockedError) and not harness.replicas[0].life.orders
        harness.assert_at_rest()


@pytest.fixture(autouse=True)
def pictures_as_they_are(monkeypatch):
    monkeypatch.setattr("mii_serve.safety.pictures.is_scannable", lambda *_: True)


class TestDraining:
    async def test_what_runs_is_waited_for_and_what_comes_is_refused(self, harness):
        running = Reader(harness)
        await settle()
        draining = asyncio.create_task(harness.dispatcher.drain(100.0))
        await settle()
        assert not harness.dispatcher.is_ready
        refused = Reader(harness)
        await refused.task
        assert isinstance(refused.error, UnavailableError) and "draining" in str(refused.error)
        harness.finish()
        await running.task
        assert await draining and running.images
        harness.assert_at_rest()

    async def test_batch_requests_are_not_waited_for(self, harness):
        """Who sends them sends them again; a job may have thousands."""
        running, batch = Reader(harness), Reader(harness, replace(request(), priority=Priority.BATCH))
        await settle()
        draining = asyncio.create_task(harness.dispatcher.drain(100.0))
        await settle()
        assert isinstance(batch.error, UnavailableError) and running.error is None
        harness.finish()
        await running.task
        assert await draining and running.images
        harness.assert_at_rest()

    async def test_it_has_a_bound(self, harness):
        running = Reader(harness)
        await settle()
        assert not await harness.dispatcher.drain(5.0)
        assert asyncio.get_running_loop().time() == pytest.approx(5.0)
        await running.leave()
        harness.assert_at_rest()


class TestStopping:
    async def assert_stopped(self, harness: Harness, *readers: Reader) -> None:
        harness.dispatcher.stop()
        await asyncio.gather(*(reader.task for reader in readers))
        for reader in readers:
            assert isinstance(reader.error, UnavailableError) and str(reader.error) == "the server is stopping"

    @pytest.mark.parametrize("num_images", [1, 4])
    async def test_what_runs_ends_and_frees_its_replicas(self, num_images):
        harness = Harness(2)
        readers = [Reader(harness, request(num_images_per_prompt=num_images)) for _ in range(3)]
        await settle()
        await self.assert_stopped(harness, *readers)
        harness.assert_at_rest()

    async def test_what_waits_for_a_replica_ends(self, harness):
        harness.replicas[0].lose()
        reader = Reader(harness)
        await settle()
        await self.assert_stopped(harness, reader)
        assert not harness.router._waiting

    async def test_all_who_wait_for_one_work_end(self, harness):
        readers = [Reader(harness, call=call_context(idempotency_key="k")) for _ in range(3)]
        await settle()
        await self.assert_stopped(harness, *readers)
        assert not harness.dispatcher._active

    async def test_what_waits_to_know_why_a_replica_was_lost_ends(self, harness):
        reader = Reader(harness)
        await settle()
        harness.replicas[0].life.break_stream()
        await settle()
        await self.assert_stopped(harness, reader)

    async def test_who_reads_slowly_is_told_at_the_next_event(self, harness):
        stream = harness.dispatcher.events(request(), call_context())
        first = asyncio.create_task(anext(stream))
        await settle()
        harness.finish()
        await first
        harness.dispatcher.stop()
        with pytest.raises(UnavailableError, match="the server is stopping"):
            await anext(stream)
        harness.assert_at_rest()

    async def test_a_caller_who_leaves_has_left(self, harness):
        reader = Reader(harness)
        await settle()
        await reader.leave()
        assert reader.task.cancelled() and reader.error is None
        harness.assert_at_rest()


class TestActivity:
    async def test_running_requests_and_ready_replicas_are_counted(self):
        harness = Harness(3)
        value = harness.dispatcher.metrics.registry.get_sample_value
        readers = [Reader(harness) for _ in range(2)]
        await settle()
        harness.replicas[2].lose(CRASHED)
        assert (value("mii_serve_requests_running"), value("mii_serve_replicas_ready")) == (2, 2)
        for reader in readers:
            await reader.leave()
        assert value("mii_serve_requests_running") == 0
