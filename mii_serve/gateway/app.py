"""HTTP of a deployment: `/metrics`, the probes `/livez` and `/readyz`, `/` as Azure ML's containers answer it, and the calls.

The calls are Azure ML's `/score`, OpenAI's images API and Hugging Face's text-to-image task. `/swagger.json` describes it all.
For a person there is the page, at `/` too.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
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
from mii_serve.gateway import image_links
from mii_serve.gateway.admin import LoraCalls
from mii_serve.gateway.dialects.azure_score import AzureDialect, Score
from mii_serve.gateway.dialects.huggingface import HuggingFaceDialect, TextToImage
from mii_serve.gateway.dialects.openai import Images, Models, OpenAiDialect
from mii_serve.gateway.dialects.openai_batches import Batches, routes_without_jobs
from mii_serve.gateway.dialects.openai_edits import Edits, read_edit
from mii_serve.gateway.errors import MethodNotAllowedError, NotFoundError, openai_problem, problem_response
from mii_serve.gateway.hosts import AllowedHosts, HostCheck
from mii_serve.gateway.image_links import ImageStore
from mii_serve.gateway.listener import BoundedListener, ConcurrencyLimit, ConnectionPool
from mii_serve.gateway.middleware import Endpoints
from mii_serve.gateway.model_names import ModelNames
from mii_serve.gateway.openapi import Description
from mii_serve.gateway.page.calls import page_routes
from mii_serve.gateway.page.files import PageFiles, wants_page
from mii_serve.gateway.paths import NormalizedPaths
from mii_serve.gateway.protocol import HttpProtocol
from mii_serve.metrics import content_type
from mii_serve.server.call import Admission
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.front import bind_tcp, bracketed
from mii_serve.server.jobs import Jobs
from mii_serve.server.keys import KeyRing
from mii_serve.server.open_files import MAX_CONNECTIONS
from mii_serve.server.tls import Tls

GRACE_S = 5
"""When the server stops, callers who send or take in slowly are waited for so long; the images are finished by then."""


def build_app(
    dispatcher: Dispatcher,
    keys: KeyRing,
    settings: HttpConfig | None = None,
    served_names: Sequence[str] = (),
    *,
    hosts: AllowedHosts | None = None,
    connections: ConnectionPool | None = None,
    jobs: Jobs | None = None,
) -> Starlette:
    """The application that answers HTTP, for requests that name one of the `hosts`, over these connections.

    `served_names` are the operator's names for the model. Without `jobs`, files and batches are off.
    """
    settings, files = settings or HttpConfig(), PageFiles()

    async def livez(request: Request) -> Response:
        return PlainTextResponse("ok")

    async def readyz(request: Request) -> Response:
        return PlainTextResponse("ok") if dispatcher.is_ready else PlainTextResponse("not ready", status_code=503)

    async def root(request: Request) -> Response:
        return files.page(request) if wants_page(request) else JSONResponse("healthy", headers={"vary": "accept"})

    async def metrics(request: Request) -> Response:
        accept = request.headers.get("accept", "")
        return Response(await dispatcher.metrics_text(accept), media_type=content_type(accept), headers={"vary": "accept"})

    answers = {"/livez": livez, "/readyz": readyz, "/health": readyz, "/healthz": readyz, "/metrics": metrics, "/": root}
    routes = [Route(path, answer) for path, answer in answers.items()]
    endpoints = Endpoints(Admission(dispatcher.metrics, keys), settings)
    names = ModelNames(dispatcher, served_names)
    openai = OpenAiDialect()
    batches = routes_without_jobs(endpoints, openai) if jobs is None else Batches(jobs).routes(endpoints, openai)
    calls = [*_calls(dispatcher, endpoints, settings, names), *batches, *page_routes(dispatcher, endpoints, files, jobs)]
    calls += LoraCalls(dispatcher, keys).routes(settings, openai)
    pool = connections or ConnectionPool(MAX_CONNECTIONS)
    checks = [Middleware(HostCheck, hosts or AllowedHosts()), Middleware(ConcurrencyLimit, pool)]
    app = Starlette(
        routes=[*routes, *calls],
        exception_handlers={HTTPException: _no_such_route},
        middleware=[Middleware(NormalizedPaths), *checks],
    )
    app.router.redirect_slashes = False
    return app


def _calls(dispatcher: Dispatcher, endpoints: Endpoints, settings: HttpConfig, names: ModelNames) -> list[Route]:
    """The routes of the dialects, and of what describes the server."""
    store = ImageStore()
    azure, openai, hugging_face = AzureDialect(settings), OpenAiDialect(), HuggingFaceDialect()
    images, models, task = Images(dispatcher, settings, names, store), Models(names), TextToImage(dispatcher, settings, names)
    description = Description(names)
    return [
        endpoints.route("/score", Score(dispatcher, settings), azure),
        *(
            endpoints.route(f"{prefix}/images/generations", images, openai)
            for prefix in ("/v1", "", "/openai/deployments/{deployment}")
        ),
        *(
            endpoints.route(f"{prefix}/images/edits", Edits(images), openai, read=read_edit)
            for prefix in ("/v1", "", "/openai/deployments/{deployment}")
        ),
        endpoints.route("/v1/models", models.all, openai, method="GET", is_work=False),
        endpoints.route("/v1/models/{model:path}", models.one, openai, method="GET", is_work=False),
        endpoints.route("/", task, hugging_face),
        endpoints.route("/models/{model:path}", task, hugging_face),
        Route(image_links.PATH + "/{name}", store.answer),
        Route("/info", description.info),
        Route("/swagger.json", description.swagger),
        Route("/openapi.json", description.swagger),
    ]


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal: MiiServeError = NotFoundError(f"there is nothing at {request.url.path[:100]!r}")
    if error.status_code == MethodNotAllowedError.http_status:
        refusal = MethodNotAllowedError(f"{request.method} is not answered here")
        return problem_response(openai_problem(refusal), {"allow": ", ".join(_methods_at(request))})
    return problem_response(openai_problem(refusal), error.headers)


def _methods_at(request: Request) -> list[str]:
    """All methods of the path; one path may have a route for each."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    matching = [route.methods or () for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return sorted({method for methods in matching for method in methods})


class _Server(uvicorn.Server):
    """uvicorn inside a loop that is not its own: the deployment handles signals."""

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
async def serve_http(
    config: DeployConfig, dispatcher: Dispatcher, keys: KeyRing, tls: Tls | None = None, max_connections: int = MAX_CONNECTIONS
) -> AsyncIterator[str]:
    """Serve while the block runs; gives HOST:PORT. Without `tls` it is plain text.

    Raises:
        ConfigError: the address cannot be bound.
    """
    connections = ConnectionPool(max_connections)
    listener = BoundedListener.of(bind_tcp("http_port", config.host, config.http_port), connections)
    hosts = AllowedHosts.of(config)
    jobs = None if config.jobs_folder is None else Jobs(config.jobs_folder, dispatcher, config.served_model_name, keys)
    app = build_app(dispatcher, keys, config.http, config.served_model_name, hosts=hosts, connections=connections, jobs=jobs)
    listener.listen()  # callers who connect before the server has started wait for it
    settings = uvicorn.Config(
        app,
        log_config=None,
        log_level="error",  # strangers decide how often there is a warning: it is about what is no request
        ws="none",
        access_log=False,
        server_header=False,
        proxy_headers=False,  # who may be believed about other addresses is not ours to guess, and addresses have shares
        http=functools.partial(HttpProtocol, connections),  # type: ignore[arg-type]  # called like a class
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
    if jobs is not None:
        jobs.resume()
    try:
        yield f"{bracketed(config.host)}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await asyncio.gather(serving, return_exceptions=True)
        if jobs is not None:
            await jobs.close()
        listener.close()
