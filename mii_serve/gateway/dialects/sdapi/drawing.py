"""The requests of one call, made side by side, until all are done or the caller interrupts them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from mii_serve.gateway.dialects.sdapi.answer import Drawn
from mii_serve.gateway.dialects.sdapi.tasks import Task
from mii_serve.server.call import CallContext
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.types import Done, GenerationRequest, ImageReady, OutputOptions, RequestedParams


class Drawing:
    """What comes of the requests goes to `drawn`, and how far they are to the `task`."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        context: CallContext,
        task: Task,
        drawn: Drawn,
        asked: RequestedParams,
        output: OutputOptions,
    ) -> None:
        """`asked` and `output` are for the second request of each image, where there is one (hires fix)."""
        self._dispatcher = dispatcher
        self._context = context
        self._task = task
        self._drawn = drawn
        self._asked = asked
        self._output = output

    async def run(self, requests: Sequence[GenerationRequest]) -> None:
        """Draw until all is done, or the task is interrupted; what is finished by then is kept.

        Raises:
            MiiServeError: of the first request that failed; the others are cancelled.
        """
        drawing = asyncio.ensure_future(self._draw_all(requests))
        stopping = asyncio.ensure_future(self._task.interrupted.wait())
        try:
            await asyncio.wait((drawing, stopping), return_when=asyncio.FIRST_COMPLETED)
            if drawing.done():
                drawing.result()
        finally:
            drawing.cancel()
            stopping.cancel()
            await asyncio.gather(drawing, stopping, return_exceptions=True)

    async def _draw_all(self, requests: Sequence[GenerationRequest]) -> None:
        offset, is_one = 0, len(requests) == 1 and self._drawn.hires is None
        try:
            async with asyncio.TaskGroup() as group:
                for part, request in enumerate(requests):
                    context = self._context if is_one else self._context.for_part(part)
                    group.create_task(self._draw(request, context, offset, group))
                    offset += request.params.num_images_per_prompt or 1
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _draw(self, request: GenerationRequest, context: CallContext, offset: int, group: asyncio.TaskGroup) -> None:
        async with contextlib.aclosing(self._dispatcher.events(request, context)) as events:
            async for event in events:
                self._task.add(event, offset)
                if isinstance(event, Done):
                    self._drawn.done = self._drawn.done or event
                if not isinstance(event, ImageReady):
                    continue
                if self._drawn.hires is None or event.nsfw_content_detected or event.moderation_blocked:
                    self._drawn.images[offset + event.image_index] = event  # a flagged image is black, and stays so
                else:
                    group.create_task(self._draw_again(event, offset + event.image_index))

    async def _draw_again(self, first: ImageReady, index: int) -> None:
        assert self._drawn.hires is not None
        request = self._drawn.hires.request(self._asked, first, self._output)
        num_images = self._task.num_images // 2
        context = self._context.for_part(num_images + index)  # requests are no more than images
        async with contextlib.aclosing(self._dispatcher.events(request, context)) as events:
            async for event in events:
                self._task.add(event, num_images + index)
                if isinstance(event, ImageReady):
                    self._drawn.images[index] = event
