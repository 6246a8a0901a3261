"""Content safety around a request: its texts are checked before any work, each image before it leaves.

Images are checked while the rest is still being made, and the events keep their order. A finished image that is blocked goes
out black and says so; one without a verdict ends the request. A preview that is blocked, has no verdict, or comes while another
image of its request is still being checked is left out: there will be a later one, or the image.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Literal

from mii_serve.errors import (
    ContentBlockedError,
    DeadlineExceededError,
    InvalidRequestError,
    MiiServeError,
    ModerationFailedError,
)
from mii_serve.metrics import FrontMetrics
from mii_serve.provenance import Origin, Provenance
from mii_serve.safety.moderation import ModerationVerdict, Moderator
from mii_serve.server.router import Work
from mii_serve.types import EMBEDS, Done, Event, ImageFormat, ImageReady, InputImage, Preview, text_read

logger = logging.getLogger(__name__)

MAX_HELD = 64
"""Events of a request that wait for a verdict on one before them; then the replica's mailbox keeps them."""

Events = AsyncGenerator[Event, None]
CheckedPart = Literal["input", "output", "preview"]
_Check = asyncio.Task[Event | None]


class ModerationFilter:
    """Passes on what the moderator found harmless."""

    def __init__(self, moderator: Moderator, metrics: FrontMetrics, provenance: Provenance | None = None) -> None:
        """`origin` must be set before there is work."""
        self._moderator, self._provenance = moderator, provenance or Provenance()
        self.origin = Origin(model="", model_revision="")
        self._metrics = metrics
        for stage in ("input", "output", "preview"):
            for outcome in ("passed", "blocked", "failed"):
                metrics.moderation_checks.labels(stage, outcome)

    async def events(self, work: Work, run: Callable[[Work], Events]) -> Events:
        """The events that `run` gives for the work, every image in them checked, and that which it starts from.

        Raises:
            InvalidRequestError: the request has embeddings, on which there can be no verdict.
            ContentBlockedError: the texts or the request's image are refused; nothing was made.
            ModerationFailedError: there is no verdict on a text or a finished image.
            ProvenanceError: the black image in a blocked one's place could not be signed.
            DeadlineExceededError: the caller's time ran out meanwhile.
        """
        start, params = time.monotonic(), work.params
        for name in EMBEDS:
            if getattr(params, name) is not None:
                raise InvalidRequestError(name, "is refused here: the server's content safety reads prompts, not embeddings")
        async with self._counted("input", work):
            texts = (text_read(params.prompt_syntax, text) for text in (params.prompt, params.negative_prompt))
            await self._moderator.check_texts(*texts)
        if (image := work.request.input_image) is not None:
            await self._check_input_image(image, work)
        held: asyncio.Queue[Event | _Check | Exception | None] = asyncio.Queue(MAX_HELD)
        checked_s, checks = time.monotonic() - start, set[_Check]()

        def forget(check: _Check) -> None:
            checks.discard(check)
            _ = check.cancelled() or check.exception()  # its reader may have left

        async def read() -> None:
            try:
                async with contextlib.aclosing(run(work)) as events:
                    async for event in events:
                        if isinstance(event, Preview) and checks:
                            continue
                        if not isinstance(event, Preview | ImageReady):
                            await held.put(event)
                            continue
                        check = asyncio.create_task(self._checked(event, work))
                        checks.add(check)
                        check.add_done_callback(forget)
                        await held.put(check)
                await held.put(None)
            except Exception as error:  # noqa: BLE001 - raised again where the events are read
                await held.put(error)

        reading = asyncio.create_task(read())
        try:
            while (entry := await held.get()) is not None:
                if isinstance(entry, Exception):
                    raise entry
                event = await entry if isinstance(entry, asyncio.Task) else entry
                if isinstance(event, Done):
                    event = replace(event, queued_s=event.queued_s + checked_s, total_s=time.monotonic() - start)
                if event is not None:
                    yield event
        finally:
            tasks = (reading, *checks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _check_input_image(self, image: InputImage, work: Work) -> None:
        from mii_serve.safety.pictures import scannable  # Pillow is for those who moderate

        async with self._counted("input", work):
            size = work.params.width, work.params.height
            file = await asyncio.to_thread(scannable, image.rgb, ImageFormat.RAW_RGB, *size)
            verdict = await self._moderator.check_image(file)
            if verdict.is_blocked:
                raise ContentBlockedError("image", verdict.categories)

    async def _checked(self, event: Preview | ImageReady, work: Work) -> Event | None:
        """The event as it may leave; None for a preview that may not."""
        if isinstance(event, Preview):
            with contextlib.suppress(MiiServeError):
                return None if (await self._verdict("preview", event, work)).is_blocked else event
            return None
        if not (await self._verdict("output", event, work)).is_blocked:
            return replace(event, moderation_blocked=False)
        from mii_serve.safety.pictures import black_picture

        size = event.width, event.height
        black = await asyncio.to_thread(black_picture, event.format, *size, self._provenance, self.origin)
        return replace(event, encoded=black, moderation_blocked=True)

    async def _verdict(self, part: CheckedPart, image: Preview | ImageReady, work: Work) -> ModerationVerdict:
        from mii_serve.safety.pictures import is_scannable, scannable  # Pillow is for those who moderate

        async with self._counted(part, work) as outcome:
            file = image.encoded
            if not is_scannable(file, image.format, image.width, image.height):
                file = await asyncio.to_thread(scannable, file, image.format, image.width, image.height)
            verdict = await self._moderator.check_image(file)
            outcome.is_blocked, outcome.categories = verdict.is_blocked, verdict.categories
            return verdict

    @contextlib.asynccontextmanager
    async def _counted(self, part: CheckedPart, work: Work) -> AsyncIterator[_Outcome]:
        """Within the caller's deadline, count what comes of it. A caller who leaves meanwhile is not counted."""
        start, outcome, label = time.monotonic(), _Outcome(), "failed"
        try:
            async with asyncio.timeout(work.call.left_s):
                yield outcome
            label = "blocked" if outcome.is_blocked else "passed"
            if outcome.is_blocked:
                found = " ".join(f"{name}={severity}" for name, severity in outcome.categories.items())
                logger.info("blocked by content safety: %s, %s, request_id=%s", part, found, work.call.request_id)
        except ContentBlockedError as error:
            label = "blocked"
            logger.info("%s, request_id=%s", error, work.call.request_id)
            raise
        except ModerationFailedError as error:
            logger.warning("no verdict: %s, stage=%s, request_id=%s", error, part, work.call.request_id)
            raise
        except TimeoutError:
            raise DeadlineExceededError("the time ran out during the content safety check") from None
        except asyncio.CancelledError:
            label = ""
            raise
        finally:
            if label:
                self._metrics.moderation_checks.labels(part, label).inc()
                self._metrics.moderation_duration.labels(part).observe(time.monotonic() - start)


class _Outcome:
    """What an image was found to be; texts that are refused raise."""

    is_blocked = False
    categories: Mapping[str, int] = MappingProxyType({})
