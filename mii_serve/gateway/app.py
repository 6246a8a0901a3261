"""HTTP of a deployment: `/metrics`, the probes `/livez` and `/readyz`, `/` as Azure ML's containers answer it, and the calls.

The calls are Azure ML's `/score`, OpenAI's images API and Hugging Face's text-to-image task. `/swagger.json` describes it all.
For a person there is the page, at `/` too.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Match, Route

from mii_serve.config import DeployConfig, HttpConfig
from mii_serve.errors import MiiServeError
from mii_serve.gateway.door import Door
from mii_serve.gateway.hangups import ListeningConnection
from mii_serve.gateway.huggingface import HuggingFaceDialect, TextToImage
from mii_serve.gateway.links import PLACE, KeptPictures
from mii_serve.gateway.names import ModelNames
from mii_serve.gateway.openai import Images, Models, OpenAiDialect
from mii_serve.gateway.openapi import Description
from mii_serve.gateway.page.calls import page_routes
from mii_serve.gateway.page.files import PageFiles, wants_page
from mii_serve.gateway.paths import PlainPaths
from mii_serve.gateway.problems import MethodNotAllowedError, NotFoundError, openai_problem, problem_response
from mii_serve.gateway.score import AzureDialect, Score
from mii_serve.metrics import CONTENT_TYPE
from mii_serve.server.desk import Desk
from mii_serve.server.front import bind_tcp, bracketed
from mii_serve.server.keys import KeyRing
from mii_serve.server.tls import Tls

GRACE_S = 5
"""At the end, callers who send or take in slowly are waited for so long; the pictures are made by then."""


def build_app(desk: Desk, keys: KeyRing, settings: HttpConfig | None = None, served: Sequence[str] = ()) -> Starlette:
    """What is answered over HTTP. `served` are the operator's names for the model."""
    settings, files = settings or HttpConfig(), PageFiles()

    async def livez(request: Request) -> Response:
        return PlainTextResponse("ok")

    async def readyz(request: Request) -> Response:
        return PlainTextResponse("ok") if desk.is_ready else PlainTextResponse("not ready", status_code=503)

    async def root(request: Request) -> Response:
        return files.page(request) if wants_page(request) else JSONResponse("healthy", headers={"vary": "accept"})

    async def metrics(request: Request) -> Response:
        return Response(await desk.metrics_text(), media_type=CONTENT_TYPE)

    answers = {"/livez": livez, "/readyz": readyz, "/health": readyz, "/healthz": readyz, "/metrics": metrics, "/": root}
    routes = [Route(path, answer) for path, answer in answers.items()]
    door = Door(desk, keys, settings)
    calls = [*_calls(desk, door, settings, ModelNames(desk, served)), *page_routes(desk, door, files)]
    app = Starlette(
        routes=[*routes, *calls],
        exception_handlers={HTTPException: _no_such_route},
        middleware=[Middleware(PlainPaths)],
    )
    app.router.redirect_slashes = False
    return app


def _calls(desk: Desk, door: Door, settings: HttpConfig, names: ModelNames) -> list[Route]:
    """The routes of those who want pictures, or to know about the model."""
    kept = KeptPictures()
    azure, openai, hugging_face = AzureDialect(settings), OpenAiDialect(), HuggingFaceDialect()
    images, models, task = Images(desk, settings, names, kept), Models(names), TextToImage(desk, settings, names)
    description = Description(names)
    return [
        door.route("/score", Score(desk, settings), azure),
        *(
            door.route(f"{prefix}/images/generations", images, openai)
            for prefix in ("/v1", "", "/openai/deployments/{deployment}")
        ),
        door.route("/v1/models", models.all, openai, method="GET", is_work=False),
        door.route("/v1/models/{model:path}", models.one, openai, method="GET", is_work=False),
        door.route("/", task, hugging_face),
        door.route("/models/{model:path}", task, hugging_face),
        Route(PLACE + "/{name}", kept.answer),
        Route("/info", description.info),
        Route("/swagger.json", description.swagger),
        Route("/openapi.json", description.swagger),
    ]


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told: MiiServeError = NotFoundError(f"there is nothing at {request.url.path[:100]!r}")
    if error.status_code == MethodNotAllowedError.http_status:
        told = MethodNotAllowedError(f"{request.method} is not answered here")
        return problem_response(openai_problem(told), {"allow": ", ".join(_methods_at(request))})
    return problem_response(openai_problem(told), error.headers)


def _methods_at(request: Request) -> list[str]:
    """All methods of the path; one path may have a route for each."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    matching = [route.methods or () for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for methods in matching for method in methods})


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
    app = build_app(desk, keys, config.http, config.served_model_name)
    listener.listen()  # who connects before the server has started waits for it
    settings = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        http=ListeningConnection,
        timeout_keep_alive=config.http.keep_alive_s,  # type: ignore[arg-type]  # it is handed to the loop, which takes any number
        timeout_graceful_shutdown=GRACE_S,
        lifespan="off",
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
