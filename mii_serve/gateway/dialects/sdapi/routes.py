"""The routes of AUTOMATIC1111's API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.routing import Route

from mii_serve.config import HttpConfig
from mii_serve.gateway.dialects.sdapi.describe import Descriptions
from mii_serve.gateway.dialects.sdapi.dialect import SdapiDialect, key_of
from mii_serve.gateway.dialects.sdapi.generate import Generations
from mii_serve.gateway.dialects.sdapi.tasks import Tasks
from mii_serve.gateway.json_body import read_json
from mii_serve.gateway.middleware import Endpoints, Handler, ReadBody
from mii_serve.gateway.multipart import read_nothing
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.model_names import ModelNames
from mii_serve.types import MAX_IMAGE_BYTES

ROOT = "/sdapi/v1"
MAX_FILE_BYTES = MAX_IMAGE_BYTES * 4 // 3 + 64 * 1024
"""Of a body with images in base64."""


def sdapi_routes(
    dispatcher: Dispatcher, endpoints: Endpoints, settings: HttpConfig, names: ModelNames, embeddings: Sequence[str] = ()
) -> list[Route]:
    """All that is served of it."""
    tasks, dialect = Tasks(), SdapiDialect()
    draws = Generations(dispatcher, settings, names, tasks)
    describes = Descriptions(dispatcher, names, tasks, embeddings)

    async def read_files(request: Request) -> Any:
        return await read_json(request, settings.max_body_bytes, MAX_FILE_BYTES)

    def post(name: str, handler: Handler, *, is_work: bool = False, read: ReadBody | None = None) -> Route:
        return endpoints.route(f"{ROOT}/{name}", handler, dialect, is_work=is_work, read=read, read_key=key_of)

    def get(name: str, handler: Handler) -> Route:
        return endpoints.route(f"{ROOT}/{name}", handler, dialect, method="GET", is_work=False, read_key=key_of)

    return [
        post("txt2img", draws.text_to_image, is_work=True),
        post("img2img", draws.image_to_image, is_work=True, read=read_files),
        post("options", describes.set_options),
        post("png-info", describes.png_info, read=read_files),
        *(post(name, describes.interrupt, read=read_nothing) for name in ("interrupt", "skip")),
        *(post(f"refresh-{what}", describes.refresh, read=read_nothing) for what in ("checkpoints", "vae", "loras")),
        *(get(name, handler) for name, handler in describes.readers().items()),
    ]
