"""Content safety around a request's events, with a moderator in memory whose verdicts come when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from replica_doubles import done_of, image_of, settle, work_of

from mii_serve.errors import ContentBlockedError, DeadlineExceededError, MiiServeError, ModerationFailedError, QueueFullError
from mii_serve.metrics import FrontMetrics
from mii_serve.safety.moderation import ModerationVerdict
from mii_serve.server import moderation
from mii_serve.server.moderation import ModerationFilter
from mii_serve.server.router import Work
from mii_serve.types import Done, Event, ImageFormat, ImageReady, Preview, Queued, Started, Step

HARMLESS = ModerationVerdict()
BLOCKED = ModerationVerdict(categories={"Violence": 4})
FAILED = ModerationFailedError("HTTP 500")

Verdict = ModerationVerdict | Exception


class FakeModerator:
    """Asked for a verdict on a picture, it waits until the test gives one."""

    def __init__(self) -> None:
        self.texts: list[tuple[str, str]] = []
        self.text_error: Exception | None = None
        self.may_read = asyncio.Event()
        self.may_read.set()
        self.asked: dict[bytes, asyncio.Future[Verdict]] = {}

    async def check_texts(self, prompt: str, negative_prompt: str) -> None:
        self.texts.append((prompt, negative_prompt))
        await self.may_read.wait()
        if self.text_error is not None:
            raise self.text_error

    async def check_image(self, image: bytes) -> ModerationVerdict:
        verdict = await self.asked.setdefault(image, asyncio.get_running_loop().create_future())
        if isinstance(verdict, Exception):
            raise verdict
        return verdict

    async def close(self) -> None: ...


class Filtered:
    """A request's events behind the filter; the test says what the replica gives."""

    def __init__(self, **options: object) -> None:
        self.moderator = FakeModerator()
        self.metrics = FrontMetrics()
        self.work = work_of(**options)
        self.given: asyncio.Queue[Event | Exception | None] = asyncio.Queue()
        self.num_runs = 0
        self.is_closed = False
        self.events: list[Event] = []
        self.error: MiiServeError | None = None
        self.task: asyncio.Task[None] | None = None

    async def _run(self, work: Work) -> AsyncGenerator[Event, None]:
        self.num_runs += 1
        try:
            while (event := await self.given.get()) is not None:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.is_closed = True

    async def start(self) -> None:
        self._stream = ModerationFilter(self.moderator, self.metrics).events(self.work, self._run)
        self.task = asyncio.create_task(self._read())
        await settle()

    async def _read(self) -> None:
        try:
            async for event in self._stream:
                self.events.append(event)
        except MiiServeError as error:
            self.error = error
        finally:
            await self._stream.aclose()

    async def put(self, *events: Event | Exception | None) -> None:
        for event in events:
            self.given.put_nowait(event)
        await settle()

    async def judge(self, picture: ImageReady | Preview, verdict: Verdict) -> None:
        self.moderator.asked[picture.encoded].set_result(verdict)
        await settle()

    def count(self, stage: str, outcome: str) -> float:
        labels = {"stage": stage, "outcome": outcome}
        return self.metrics.registry.get_sample_value("mii_serve_moderation_checks_total", labels) or 0.0

    def assert_over(self) -> None:
        """No task is left, and the work has been ended."""
        assert self.task is not None and self.task.done()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert self.is_closed or not self.num_runs


@pytest.fixture(autouse=True)
def plain_pictures(monkeypatch):
    """Pictures go to the moderator as they are, and threads do their work at once."""
    monkeypatch.setattr("mii_serve.safety.pictures.is_scannable", lambda *_: True)

    async def at_once(function, *arguments):
        return function(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", at_once)


@pytest.fixture
async def filtered() -> Filtered:
    opened = Filtered(num_images_per_prompt=3)
    await opened.start()
    return opened


def image(index: int) -> ImageReady:
    return image_of(work_of().params, index)


def preview(index: int, step: int) -> Preview:
    name = f"preview {index} {step}".encode()
    return Preview(image_index=index, step=step, encoded=name, format=ImageFormat.RAW_RGB, height=64, width=64)


def step(index: int, made: int) -> Step:
    return Step(image_index=index, step=made, num_steps=4)


def done() -> Done:
    return done_of(work_of().params)


class TestTexts:
    async def test_both_are_checked_before_any_work(self):
        filtered = Filtered(negative_prompt="blurry")
        filtered.moderator.may_read.clear()
        await filtered.start()
        assert filtered.moderator.texts == [("a red circle", "blurry")] and not filtered.num_runs
        filtered.moderator.may_read.set()
        await settle()
        assert filtered.num_runs == 1 and filtered.count("input", "passed") == 1
        await filtered.put(done(), None)
        filtered.assert_over()

    @pytest.mark.parametrize(
        ("error", "outcome"), [(ContentBlockedError("prompt", {"Hate": 4}, stage="input"), "blocked"), (FAILED, "failed")]
    )
    async def test_what_is_refused_costs_no_work(self, error, outcome):
        filtered = Filtered()
        filtered.moderator.text_error = error
        await filtered.start()
        assert filtered.error is error and not filtered.num_runs and filtered.count("input", outcome) == 1
        filtered.assert_over()

    async def test_the_callers_deadline_holds(self):
        filtered = Filtered(timeout_s=2.0)
        filtered.moderator.may_read.clear()
        await filtered.start()
        await filtered.task
        assert isinstance(filtered.error, DeadlineExceededError)
        assert asyncio.get_running_loop().time() == pytest.approx(2.0) and filtered.count("input", "failed") == 1

    async def test_their_time_is_waiting_time(self):
        filtered = Filtered()
        filtered.moderator.may_read.clear()
        await filtered.start()
        await asyncio.sleep(3.0)
        filtered.moderator.may_read.set()
        await settle()
        await filtered.put(done(), None)
        assert (filtered.events[-1].queued_s, filtered.events[-1].total_s) == (3.0, 3.0)


class TestPictures:
    async def test_nothing_leaves_before_its_verdict_and_the_order_is_kept(self, filtered):
        await filtered.put(Queued(num_samples_ahead=0), Started(image_index=0), image(0), step(1, 1), image(1), done(), None)
        assert [type(event) for event in filtered.events] == [Queued, Started]
        assert len(filtered.moderator.asked) == 2, "they are checked at once"
        await filtered.judge(image(1), HARMLESS)
        assert len(filtered.events) == 2
        await filtered.judge(image(0), HARMLESS)
        await filtered.task
        assert [type(event) for event in filtered.events] == [Queued, Started, ImageReady, Step, ImageReady, Done]
        images = [event for event in filtered.events if isinstance(event, ImageReady)]
        assert [(one.encoded, one.moderation_blocked) for one in images] == [(image(i).encoded, False) for i in range(2)]
        assert filtered.count("output", "passed") == 2
        filtered.assert_over()

    async def test_one_that_is_blocked_goes_out_black_and_says_so(self, filtered):
        await filtered.put(image(0), image(1), done(), None)
        await filtered.judge(image(0), BLOCKED)
        await filtered.judge(image(1), HARMLESS)
        await filtered.task
        black, passed, _ = filtered.events
        assert (black.encoded, black.moderation_blocked) == (bytes(64 * 64 * 3), True)
        assert (black.image_index, black.seed) == (0, 5) and not passed.moderation_blocked
        assert (filtered.count("output", "blocked"), filtered.count("output", "passed")) == (1, 1)

    @pytest.mark.parametrize("error", [FAILED, MiiServeError("a defect of the moderator")])
    async def test_one_without_a_verdict_ends_the_request_and_the_work(self, filtered, error):
        await filtered.put(image(0), image(1))
        await filtered.judge(image(0), error)
        await filtered.task
        assert filtered.error is error and not filtered.events and filtered.count("output", "failed") == 1
        filtered.assert_over()

    async def test_the_callers_deadline_holds(self):
        filtered = Filtered(timeout_s=2.0)
        await filtered.start()
        await filtered.put(image(0))
        await filtered.task
        assert isinstance(filtered.error, DeadlineExceededError) and not filtered.events
        filtered.assert_over()

    async def test_what_the_work_ends_with_comes_after_what_it_gave(self, filtered):
        await filtered.put(image(0), QueueFullError("full", 1.0))
        assert filtered.error is None
        await filtered.judge(image(0), HARMLESS)
        await filtered.task
        assert len(filtered.events) == 1 and isinstance(filtered.error, QueueFullError)
        filtered.assert_over()

    async def test_a_defect_in_the_work_is_raised(self, filtered):
        await filtered.put(KeyError("a defect"))
        with pytest.raises(KeyError, match="a defect"):
            await filtered.task
        filtered.assert_over()

    @pytest.mark.parametrize("num_pictures", [0, 1, 3])
    async def test_a_caller_who_leaves_leaves_no_task_and_counts_no_verdict(self, filtered, num_pictures):
        await filtered.put(*(image(index) for index in range(num_pictures)))
        filtered.task.cancel()
        await asyncio.gather(filtered.task, return_exceptions=True)
        assert not any(filtered.count("output", outcome) for outcome in ("passed", "blocked", "failed"))
        filtered.assert_over()

    async def test_behind_a_picture_without_a_verdict_only_so_many_events_wait(self, filtered):
        num_events = 3 * moderation.MAX_HELD
        await filtered.put(image(0), *(step(1, made) for made in range(num_events)), None)
        assert filtered.given.qsize() >= num_events - moderation.MAX_HELD - 2
        await filtered.judge(image(0), HARMLESS)
        for _ in range(10):
            await settle()
        assert len(filtered.events) == num_events + 1
        filtered.assert_over()


class TestPreviews:
    async def test_one_that_is_harmless_passes_as_it_is(self, filtered):
        await filtered.put(preview(0, 1))
        await filtered.judge(preview(0, 1), HARMLESS)
        assert filtered.events == [preview(0, 1)] and filtered.count("preview", "passed") == 1
        await filtered.put(None)

    @pytest.mark.parametrize(("verdict", "outcome"), [(BLOCKED, "blocked"), (FAILED, "failed")])
    async def test_one_that_is_blocked_or_without_a_verdict_is_left_out(self, filtered, verdict, outcome):
        await filtered.put(preview(0, 1), step(0, 2))
        await filtered.judge(preview(0, 1), verdict)
        assert filtered.events == [step(0, 2)] and filtered.count("preview", outcome) == 1
        await filtered.put(None)
        assert filtered.error is None

    async def test_one_that_comes_while_another_picture_is_checked_is_not_checked(self, filtered):
        await filtered.put(preview(0, 1), preview(0, 2), preview(1, 1), image(2))
        assert set(filtered.moderator.asked) == {preview(0, 1).encoded, image(2).encoded}
        await filtered.judge(image(2), HARMLESS)
        await filtered.judge(preview(0, 1), HARMLESS)
        await filtered.put(preview(0, 3))
        await filtered.judge(preview(0, 3), HARMLESS)
        pictures = [event for event in filtered.events if isinstance(event, Preview)]
        assert pictures == [preview(0, 1), preview(0, 3)]
        await filtered.put(None)
        filtered.assert_over()
