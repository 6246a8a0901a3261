"""What a job needs of a server: the pictures of one row. A client in another process is one; a server has its own way."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from mii_serve.client import AsyncClient
from mii_serve.types import EffectiveParameters, ImageFormat, RequestedParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """The pictures of one row, by index. A flag is None where the server has no such check."""

    parameters: EffectiveParameters
    files: Sequence[bytes] = field(repr=False)
    seeds: Sequence[int]
    nsfw: Sequence[bool | None]
    blocked: Sequence[bool | None]


Generate = Callable[[RequestedParams, ImageFormat], Awaitable[Made]]
"""Makes the pictures of a row as files of a format, or raises a `MiiServeError`."""


def by_client(client: AsyncClient) -> Generate:
    """Through the SDK, with the priority of batch requests."""

    async def generate(asked: RequestedParams, image_format: ImageFormat) -> Made:
        options: dict[str, Any] = {one.name: getattr(asked, one.name) for one in fields(asked)}
        result = await client.generate(**options, output_format=image_format.value, priority="batch")
        unknown = [None] * len(result.encoded)
        return Made(
            parameters=result.parameters,
            files=result.encoded,
            seeds=result.seeds,
            nsfw=unknown if result.nsfw_content_detected is None else result.nsfw_content_detected,
            blocked=unknown if result.moderation_blocked is None else result.moderation_blocked,
        )

    return generate
