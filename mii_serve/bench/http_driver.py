"""Sends requests over HTTP: `POST /v1/images/generations`, as OpenAI's clients do.

Parameters that OpenAI's API does not have are extra members of the JSON object. With `preview_every` the driver asks for
server-sent events with partial images; such a request is for one image.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx2

from mii_serve.bench.http_client import AnswerTooLargeError, open_client, read_body
from mii_serve.bench.values import (
    BAD_ANSWER,
    DEADLINE_EXCEEDED,
    OK,
    PARAMETER_TYPES,
    UNREACHABLE,
    Answer,
    PlannedRequest,
    ReceivedPicture,
)

PATH = "/v1/images/generations"
NUM_PARTIAL_IMAGES = 3
_OTHERWISE = ("prompt", "num_images_per_prompt", "height", "width")
"""Parameters that OpenAI's API has, under names of its own."""


class HttpDriver:
    """Implements `load.Driver`."""

    def __init__(self, address: str, *, tls: ssl.SSLContext | None = None, headers: Mapping[str, str] | None = None) -> None:
        """`address`: what `http_address` returns. `headers` are sent with every request."""
        self._client = open_client(address, tls=tls, headers={"content-type": "application/json", **(headers or {})})

    async def ask(self, request: PlannedRequest, timeout_s: float) -> Answer:
        body = json.dumps(encoded(request)).encode()
        try:
            async with asyncio.timeout(timeout_s), self._client.stream("POST", PATH, content=body) as response:
                if response.status_code != 200:
                    return Answer(code=f"HTTP_{response.status_code}", text=_reason(await read_body(response)))
                if "text/event-stream" in response.headers.get("content-type", ""):
                    return await _read_events(response)
                return _read_body(await read_body(response))
        except TimeoutError:
            return Answer(code=DEADLINE_EXCEEDED, text=f"no answer within {timeout_s:.1f} s")
        except (httpx2.HTTPError, AnswerTooLargeError) as error:
            return Answer(code=UNREACHABLE, text=f"{type(error).__name__}: {error}")

    async def close(self) -> None:
        await self._client.aclose()


def encoded(request: PlannedRequest) -> dict[str, Any]:
    """The request as a JSON object; parameters that the request leaves out are absent."""
    asked = request.asked
    members: dict[str, Any] = {"prompt": asked.prompt, "n": request.num_images, "response_format": "b64_json"}
    others = (name for name in PARAMETER_TYPES if name not in _OTHERWISE)
    members |= {name: value for name in others if (value := getattr(asked, name)) is not None}
    if asked.width is not None:
        members["size"] = f"{asked.width}x{asked.height}"
    if request.preview_every is not None:
        members |= {"stream": True, "partial_images": NUM_PARTIAL_IMAGES}
    return members


def _read_body(body: bytes) -> Answer:
    try:
        items = json.loads(body)["data"]
        return Answer(code=OK, pictures=tuple(_picture(item["b64_json"]) for item in items))
    except (ValueError, KeyError, TypeError) as error:
        return Answer(code=BAD_ANSWER, text=f"not the answer of an images API: {type(error).__name__}: {error}")


async def _read_events(response: httpx2.Response) -> Answer:
    clock = asyncio.get_running_loop().time
    first_preview_at = None
    async for written in _events(response.aiter_bytes()):
        try:
            event = json.loads(written)
            kind = event.get("type", "")
            if "error" in event:
                return Answer(code=str(event["error"].get("code") or "ERROR"), text=str(event["error"].get("message")))
            if kind.endswith("partial_image"):
                first_preview_at = first_preview_at or clock()
            elif kind.endswith("completed"):
                return Answer(code=OK, pictures=(_picture(event["b64_json"]),), first_preview_at=first_preview_at)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return Answer(code=BAD_ANSWER, text=f"an event cannot be read: {type(error).__name__}: {error}")
    return Answer(code="CANCELLED", text="the stream ended before the request was done")


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """The data of each server-sent event, but not of the closing `[DONE]`."""
    buffer, data = b"", []
    async for chunk in chunks:
        buffer += chunk
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].strip())
            elif not line and data:
                if data != [b"[DONE]"]:
                    yield b"\n".join(data).decode()
                data = []


def _picture(text: str) -> ReceivedPicture:
    try:
        return ReceivedPicture(encoded=base64.b64decode(text, validate=True))
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from None


def _reason(body: bytes) -> str:
    """The message of an error body, or its start."""
    try:
        loaded = json.loads(body)
        error = loaded.get("error", loaded)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:500]
    except (ValueError, AttributeError):
        return body[:500].decode(errors="replace")
