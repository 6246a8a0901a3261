"""HTTP probes of a deployment: `/livez`, `/readyz`, and `/` as Azure ML's containers answer it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from mii_serve.config import DeployConfig
from mii_serve.server.front import bind_tcp, bracketed
from mii_serve.server.service import FrontService


def build_app(is_ready: Callable[[], bool]) -> Starlette:
    """`is_ready` tells whether a picture could be made now."""

    async def livez(request: Request) -> Response:
        return PlainTextResponse("ok")

    async def readyz(request: Request) -> Response:
        return PlainTextResponse("ok") if is_ready() else PlainTextResponse("not ready", status_code=503)

    async def root(request: Request) -> Response:
        return JSONResponse("healthy")

    return Starlette(routes=[Route("/livez", livez), Route("/readyz", readyz), Route("/", root)])


class _Server(uvicorn.Server):
    """uvicorn inside a loop that is not its own: signals are the deployment's business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serve_http(config: DeployConfig, service: FrontService) -> AsyncIterator[str]:
    """Serve while the block runs; gives HOST:PORT.

    Raises:
        ConfigError: the address cannot be bound.
    """
    listener = bind_tcp("http_port", config.host, config.http_port)
    app = build_app(lambda: service.is_ready)
    server = _Server(uvicorn.Config(app, log_config=None, log_level="warning", access_log=False, lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"{bracketed(config.host)}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await asyncio.gather(serving, return_exceptions=True)
        listener.close()
