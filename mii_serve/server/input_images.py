"""The images that requests start from: decoded a few at a time, in threads, and held within a bound of memory."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator

from mii_serve.errors import DeadlineExceededError, QueueFullError
from mii_serve.server.call import CallContext
from mii_serve.types import Capabilities, GenerationRequest, ResolvedRequest, draw_seed

MAX_DECODING = 2
"""At once; each takes tens of megabytes, and a core."""
MAX_HELD_BYTES = 1024 * 1024 * 1024
"""Of the files and the pixels of all requests that wait or run."""
RETRY_AFTER_S = 2.0
"""In the refusal of those beyond: about as long as a request takes."""


class InputImages:
    """All methods are for the front's loop."""

    def __init__(self) -> None:
        self._decoding = asyncio.Semaphore(MAX_DECODING)
        self._num_held_bytes = 0

    async def resolved(self, capabilities: Capabilities, request: GenerationRequest, call: CallContext) -> ResolvedRequest:
        """What a request with an image means, its image decoded.

        Raises:
            InvalidRequestError: naming the field and the rule.
            DeadlineExceededError: the caller's time ran out.
        """
        from mii_serve.safety.input_image import resolve_with_image  # Pillow is for those who send images

        seed = draw_seed()
        try:
            async with asyncio.timeout(call.left_s), self._decoding:
                params, image = await asyncio.to_thread(resolve_with_image, capabilities, request.params, fallback_seed=seed)
        except TimeoutError:
            raise DeadlineExceededError("the time ran out before the image was read") from None
        return ResolvedRequest(params=params, output=request.output, priority=request.priority, input_image=image)

    @contextlib.contextmanager
    def held(self, images: Iterable[bytes | None]) -> Iterator[None]:
        """Count these images while the block runs.

        Raises:
            QueueFullError: those of others take all the memory that there is for images.
        """
        num_bytes = sum(len(image) for image in images if image is not None)
        if num_bytes and self._num_held_bytes + num_bytes > MAX_HELD_BYTES:
            raise QueueFullError(f"{self._num_held_bytes >> 20} MiB of images wait or are worked on already", RETRY_AFTER_S)
        self._num_held_bytes += num_bytes
        try:
            yield
        finally:
            self._num_held_bytes -= num_bytes


def files_of(request: GenerationRequest | ResolvedRequest) -> tuple[bytes | None, ...]:
    """The files that a request came with."""
    return () if isinstance(request, ResolvedRequest) else (request.params.image, request.params.mask_image)


def pixels_of(request: ResolvedRequest) -> tuple[bytes | None, ...]:
    """What was decoded of them."""
    return () if request.input_image is None else (request.input_image.rgb, request.input_image.mask)
