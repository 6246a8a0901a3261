"""HTTP of a deployment: `/metrics`, the probes `/livez` and `/readyz`, `/` as Azure ML's containers answer it, and the calls.

The calls are Azure ML's `/score`, OpenAI's images API, Hugging Face's tasks, the Open Inference Protocol, MII's RESTful gateway
and, where it is on, AUTOMATIC1111's API. `/swagger.json` describes it all. For a person there is the page, at `/` too.
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
from mii_serve.errors import MiiServeError, NotFoundError
from mii_serve.gateway import image_links
from mii_serve.gateway.admin import LoraCalls
from mii_serve.gateway.cors import Cors, Origins
from mii_serve.gateway.dialects.azure_score import AzureDialect, Score
from mii_serve.gateway.dialects.huggingface import HuggingFaceDialect, Tasks, read_task
from mii_serve.gateway.dialects.mii import PATH as MII_PATH
from mii_serve.gateway.dialects.mii import MiiDialect, MiiPictures
from mii_serve.gateway.dialects.open_inference import OpenInferenceRoutes
from mii_serve.gateway.dialects.openai import Images, Models, OpenAiDialect
from mii_serve.gateway.dialects.openai_batches import Batches, routes_without_jobs
from mii_serve.gateway.dialects.openai_edits import Edits, Variations, read_edit
from mii_serve.gateway.dialects.sdapi.dialect import SdapiDialect
from mii_serve.gateway.dialects.sdapi.routes import ROOT as SDAPI_ROOT
from mii_serve.gateway.dialects.sdapi.routes import sdapi_routes
from mii_serve.gateway.errors import MethodNotAllowedError, openai_problem, problem_response
from mii_serve.gateway.hosts import NO_REQUEST_ID, AllowedHosts, HostCheck
from mii_serve.gateway.image_links import ImageStore
from mii_serve.gateway.listener import BoundedListener, ConcurrencyLimit, ConnectionPool
from mii_serve.gateway.middleware import Endpoints
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
from mii_serve.server.model_names import ModelNames
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
    embeddings: Sequence[str] = (),
) -> Starlette:
    """The application that answers HTTP, for requests that name one of the `hosts`, over these connections.

    `served_names` are the operator's names for the model, `embeddings` the words of prompts that stand for embeddings. Without
    `jobs`, files and batches are off.
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
    if settings.enable_sdapi:
        calls += sdapi_routes(dispatcher, endpoints, settings, names, embeddings)
    pool = connections or ConnectionPool(MAX_CONNECTIONS)
    origins = Origins(settings.cors_origins)
    cors = [Middleware(Cors, origins)] if origins.is_on else []
    checks = [Middleware(HostCheck, hosts or AllowedHosts()), *cors, Middleware(ConcurrencyLimit, pool)]
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
    images, models, tasks = Images(dispatcher, settings, names, store), Models(names), Tasks(dispatcher, settings, names)

    async def read(request: Request) -> Any:
        return await read_task(request, settings.max_body_bytes)

    description = Description(names, has_sdapi=settings.enable_sdapi)
    return [
        endpoints.route("/score", Score(dispatcher, settings), azure),
        *(
            endpoints.route(f"{prefix}/images/generations", images, openai)
            for prefix in ("/v1", "", "/openai/deployments/{deployment}")
        ),
        *(
            endpoints.route(f"{prefix}/images/{name}", answer, openai, read=read_edit)
            for name, answer in (("edits", Edits(images)), ("variations", Variations(images)))
            for prefix in ("/v1", "", "/openai/deployments/{deployment}")
        ),
        endpoints.route("/v1/models", models.all, openai, method="GET", is_work=False),
        endpoints.route("/v1/models/{model:path}", models.one, openai, method="GET", is_work=False),
        endpoints.route(MII_PATH + "/{deployment}", MiiPictures(dispatcher, settings, names), MiiDialect()),
        endpoints.route("/", tasks, hugging_face, read=read),
        endpoints.route("/models/{model:path}", tasks, hugging_face, read=read),
        *OpenInferenceRoutes(dispatcher, settings, names).routes(endpoints),
        Route(image_links.PATH + "/{name}", store.answer),
        Route("/info", description.info),
        Route("/swagger.json", description.swagger),
        Route("/openapi.json", description.swagger),
    ]


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    is_sdapi = request.url.path.startswith(SDAPI_ROOT)
    has_sdapi = any(route.path.startswith(SDAPI_ROOT) for route in request.app.routes if isinstance(route, Route))
    hint = "; --enable-sdapi turns AUTOMATIC1111's API on" if is_sdapi and not has_sdapi else ""
    refusal: MiiServeError = NotFoundError(f"there is nothing at {request.url.path[:100]!r}{hint}")
    headers = dict(error.headers or {})
    if error.status_code == MethodNotAllowedError.http_status:
        refusal = MethodNotAllowedError(f"{request.method} is not answered here")
        headers = {"allow": ", ".join(_methods_at(request))}
    if not is_sdapi:
        return problem_response(openai_problem(refusal), headers)
    response = SdapiDialect().refusal(refusal, NO_REQUEST_ID)
    response.headers.update(headers)
    return response


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
    app = build_app(
        dispatcher,
        keys,
        config.http,
        config.served_model_name,
        hosts=hosts,
        connections=connections,
        jobs=jobs,
        embeddings=tuple(config.embedding),
    )
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
