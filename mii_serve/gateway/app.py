"""HTTP of a deployment: `/metrics`, the probes `/livez` and `/readyz`, `/` as Azure ML's containers answer it, and the page."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from mii_serve.config import DeployConfig
from mii_serve.gateway.door import Door
from mii_serve.gateway.page.calls import page_routes
from mii_serve.gateway.page.files import PageFiles, wants_page
from mii_serve.metrics import CONTENT_TYPE
from mii_serve.server.desk import Desk
from mii_serve.server.front import bind_tcp, bracketed
from mii_serve.server.keys import KeyRing
from mii_serve.server.tls import Tls

CLOSE_TIMEOUT_S = 2
"""The drain is over when this face closes; who still has a call open, or takes nothing in, does not hold up the end."""


def build_app(desk: Desk, keys: KeyRing) -> Starlette:
    """What is answered over HTTP."""
    files = PageFiles()

    async def livez(request: Request) -> Response:
        return PlainTextResponse("ok")

    async def readyz(request: Request) -> Response:
        return PlainTextResponse("ok") if desk.is_ready else PlainTextResponse("not ready", status_code=503)

    async def root(request: Request) -> Response:
        return files.page(request) if wants_page(request) else JSONResponse("healthy", headers={"vary": "accept"})

    async def metrics(request: Request) -> Response:
        return Response(await desk.metrics_text(), media_type=CONTENT_TYPE)

    answers = {"/livez": livez, "/readyz": readyz, "/metrics": metrics, "/": root}
    routes = [Route(path, answer) for path, answer in answers.items()]
    return Starlette(routes=[*routes, *page_routes(desk, Door(desk, keys), files)])


class _Server(uvicorn.Server):
    """uvicorn inside a loop that is not its own: signals are the deployment's business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _encrypted(tls: Tls) -> dict[str, Any]:
    needs_client = ssl.CERT_NONE if tls.client_ca is None else ssl.CERT_REQUIRED
    return {
        "ssl_certfile": tls.cert,
        "ssl_keyfile": tls.key,
        "ssl_ca_certs": None if tls.client_ca is None else str(tls.client_ca),
        "ssl_cert_reqs": needs_client,
    }


@contextlib.asynccontextmanager
async def serve_http(config: DeployConfig, desk: Desk, keys: KeyRing, tls: Tls | None = None) -> AsyncIterator[str]:
    """Serve while the block runs; gives HOST:PORT. Without `tls` it is plain text.

    Raises:
        ConfigError: the address cannot be bound.
    """
    listener = bind_tcp("http_port", config.host, config.http_port)
    app = build_app(desk, keys)
    listener.listen()  # who connects before the server has started waits for it
    settings = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        **({} if tls is None else _encrypted(tls)),
    )
    settings.load()
    if tls is not None and settings.ssl is not None:
        tls.keep_fresh(settings.ssl)
    server = _Server(settings)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"{bracketed(config.host)}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await asyncio.gather(serving, return_exceptions=True)
        listener.close()
