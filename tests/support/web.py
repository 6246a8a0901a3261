"""The HTTP side of an in-process server, on a real socket, and a client for it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from fake_engine import FakeEngine
from patience import PATIENCE_S
from PIL import Image
from servers import RunningServer, running_server

from mii_serve.config import DeployConfig
from mii_serve.gateway.app import serve_http
from mii_serve.server.keys import KeyRing


@dataclass
class Web:
    """`server` is everything behind HTTP; `client` asks it; `address` is HOST:PORT."""

    server: RunningServer
    client: httpx2.AsyncClient
    address: str

    async def post(self, path: str, body: Any, **headers: str) -> httpx2.Response:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post(path, json=body, headers=given)

    async def start(self, path: str, body: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a request over a connection of its own, and leave the answer to the caller."""
        host, _, port = self.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        raw = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        )
        writer.write(head.encode() + raw)
        await writer.drain()
        return reader, writer

    async def until_idle(self) -> None:
        """Wait, within a bound, until no request and no slot is left."""
        await self.server.until(lambda: await_free(self.server))


def client_from(served: Web, address: str) -> httpx2.AsyncClient:
    """A client that calls from this address of the machine."""
    transport = httpx2.AsyncHTTPTransport(local_address=address)
    return httpx2.AsyncClient(base_url=f"http://{served.address}", transport=transport, timeout=PATIENCE_S)


def await_free(server: RunningServer) -> bool:
    activity = server.loop.activity()
    return not activity.num_running and not activity.num_waiting and not server.dispatcher._active


@contextlib.asynccontextmanager
async def web(
    folder: Path,
    engine: FakeEngine | None = None,
    *,
    keys: KeyRing | None = None,
    max_waiting_samples: int = 256,
    behind: dict[str, Any] | None = None,
    **http: Any,
) -> AsyncIterator[Web]:
    """`behind` goes to `running_server`; `http` are settings of that group. What escapes the application fails the test."""
    config = DeployConfig.load({"http_port": 0, "http": http})
    engine = engine or FakeEngine(max_slots=4)
    async with (
        running_server(folder, engine, max_waiting_samples=max_waiting_samples, **(behind or {})) as server,
        serve_http(config, server.dispatcher, keys or KeyRing()) as address,
        httpx2.AsyncClient(base_url=f"http://{address}", timeout=PATIENCE_S) as client,
    ):
        with nothing_escapes():
            yield Web(server, client, address)


@contextlib.contextmanager
def nothing_escapes() -> Iterator[None]:
    """uvicorn logs an exception that an application lets out, after whatever it has answered."""
    escaped: list[str] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: escaped.append(logging.Formatter().format(record))  # type: ignore[method-assign]
    logger = logging.getLogger("uvicorn.error")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    assert not (exceptions := [text for text in escaped if "Traceback" in text]), exceptions[0]


def picture(text: str) -> Image.Image:
    """The picture that base64 text is of."""
    return Image.open(io.BytesIO(base64.b64decode(text, validate=True)))


def counted(text: str, name: str, **labels: str) -> float:
    """The sum of the samples of this name with these labels in a Prometheus text."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    lines = [line for line in text.splitlines() if line.startswith(name) and all(label in line for label in wanted)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def events_of(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Names and values of a `text/event-stream`; comments are left out."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found
