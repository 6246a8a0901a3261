"""Content safety around a request: its texts before any work, each picture before it leaves.

Pictures are looked at while the rest is still being made, and the events keep their order. A finished picture that is blocked
goes out black and says so; one without a verdict ends the request. A preview that is blocked, has no verdict, or comes while
another picture of its request is still being looked at is left out: there will be a later one, or the picture.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from types import MappingProxyType
from typing import Literal

from mii_serve.errors import ContentBlockedError, DeadlineExceededError, MiiServeError, ModerationFailedError
from mii_serve.metrics import FrontMetrics
from mii_serve.proto.codec import image_format_of
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.safety.moderation import ModerationVerdict, Moderator
from mii_serve.server.router import Call

logger = logging.getLogger(__name__)

MAX_HELD = 64
"""Events of a request that wait for a verdict on one before them; then the replicas keep them."""

Events = AsyncGenerator[pb.GenerateEvent, None]
Stage = Literal["input", "output", "preview"]
_Scan = asyncio.Task[pb.GenerateEvent | None]


class Guard:
    """Lets through what the moderator found harmless."""

    def __init__(self, moderator: Moderator, metrics: FrontMetrics) -> None:
        self._moderator = moderator
        self._metrics = metrics
        for stage in ("input", "output", "preview"):
            for outcome in ("passed", "blocked", "failed"):
                metrics.moderation_checks.labels(stage, outcome)

    async def events(self, call: Call, make: Callable[[Call], Events]) -> Events:
        """The events that `make` gives for the call, every picture in them looked at.

        Raises:
            ContentBlockedError: the texts are refused; nothing was made.
            ModerationFailedError: there is no verdict on a text or a finished picture.
            DeadlineExceededError: the caller's time ran out meanwhile.
        """
        start = time.monotonic()
        async with self._noted("input", call):
            await self._moderator.check_texts(call.params.prompt, call.params.negative_prompt)
        held: asyncio.Queue[pb.GenerateEvent | _Scan | Exception | None] = asyncio.Queue(MAX_HELD)
        checked_s, scans = time.monotonic() - start, set[_Scan]()

        def forget(scan: _Scan) -> None:
            scans.discard(scan)
            _ = scan.cancelled() or scan.exception()  # its reader may have left

        async def read() -> None:
            try:
                async with contextlib.aclosing(make(call)) as events:
                    async for event in events:
                        if event.HasField("preview") and scans:
                            continue
                        if not event.HasField("preview") and not event.HasField("image"):
                            await held.put(event)
                            continue
                        scan = asyncio.create_task(self._looked_at(event, call))
                        scans.add(scan)
                        scan.add_done_callback(forget)
                        await held.put(scan)
                await held.put(None)
            except Exception as error:  # noqa: BLE001 - raised again where the events are read
                await held.put(error)

        reading = asyncio.create_task(read())
        try:
            while (news := await held.get()) is not None:
                if isinstance(news, Exception):
                    raise news
                event = await news if isinstance(news, asyncio.Task) else news
                if event is None:
                    continue
                if event.HasField("done"):
                    event.done.timings.queued_s += checked_s
                    event.done.timings.total_s = time.monotonic() - start
                yield event
        finally:
            tasks = (reading, *scans)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _looked_at(self, event: pb.GenerateEvent, call: Call) -> pb.GenerateEvent | None:
        """The event as it may leave; None for a preview that may not."""
        if event.HasField("preview"):
            with contextlib.suppress(MiiServeError):
                return None if (await self._verdict("preview", event.preview, call)).is_blocked else event
            return None
        image = event.image
        image.moderation_blocked = (await self._verdict("output", image, call)).is_blocked
        if image.moderation_blocked:
            from mii_serve.safety.pictures import black_picture

            image.data = await asyncio.to_thread(black_picture, image_format_of(image.format), image.width, image.height)
        return event

    async def _verdict(
        self, stage: Stage, image: pb.GeneratedImage | pb.GenerateEvent.Preview, call: Call
    ) -> ModerationVerdict:
        from mii_serve.safety.pictures import is_scannable, scannable  # Pillow is for those who moderate

        async with self._noted(stage, call) as outcome:
            file, image_format = image.data, image_format_of(image.format)
            if not is_scannable(file, image_format, image.width, image.height):
                file = await asyncio.to_thread(scannable, file, image_format, image.width, image.height)
            verdict = await self._moderator.check_image(file)
            outcome.is_blocked, outcome.categories = verdict.is_blocked, verdict.categories
            return verdict

    @contextlib.asynccontextmanager
    async def _noted(self, stage: Stage, call: Call) -> AsyncIterator[_Outcome]:
        """Within the caller's deadline, count what comes of it. Whoever leaves meanwhile is not counted."""
        start, outcome, told = time.monotonic(), _Outcome(), "failed"
        try:
            async with asyncio.timeout(call.left_s):
                yield outcome
            told = "blocked" if outcome.is_blocked else "passed"
            if outcome.is_blocked:
                found = " ".join(f"{name}={severity}" for name, severity in outcome.categories.items())
                logger.info("blocked by content safety: %s, %s, request_id=%s", stage, found, call.request_id)
        except ContentBlockedError as error:
            told = "blocked"
            logger.info("%s, request_id=%s", error, call.request_id)
            raise
        except ModerationFailedError as error:
            logger.warning("no verdict: %s, stage=%s, request_id=%s", error, stage, call.request_id)
            raise
        except TimeoutError:
            raise DeadlineExceededError("the time ran out while content safety looked at it") from None
        except asyncio.CancelledError:
            told = ""
            raise
        finally:
            if told:
                self._metrics.moderation_checks.labels(stage, told).inc()
                self._metrics.moderation_duration.labels(stage).observe(time.monotonic() - start)


class _Outcome:
    """What a picture was found to be; texts that are refused raise."""

    is_blocked = False
    categories: Mapping[str, int] = MappingProxyType({})
