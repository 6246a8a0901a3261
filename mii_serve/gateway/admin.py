"""The operator's calls: `/admin/loras` lists, loads and removes LoRAs while the server runs.

They want a key of the file that the setting `admin_key_file` names; a caller's API key is not enough. Without that file they
are refused.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from pydantic import Field
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mii_serve.config import HttpConfig
from mii_serve.errors import PermissionDeniedError
from mii_serve.gateway.json_body import JsonObject, validated
from mii_serve.gateway.middleware import Dialect, Endpoints, HttpCall
from mii_serve.gateway.multipart import read_nothing
from mii_serve.server.call import Admission
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.keys import KeyRing

LORAS = "/admin/loras"


class _LoraBody(JsonObject):
    name: Annotated[str, Field(min_length=1)]
    path: Annotated[str, Field(min_length=1)]


class LoraCalls:
    """The calls. Errors are in the words of a dialect."""

    def __init__(self, dispatcher: Dispatcher, keys: KeyRing) -> None:
        """`keys` are the callers'. They tell who is refused where there are no keys of admins."""
        self._dispatcher = dispatcher
        self._keys = keys

    def routes(self, settings: HttpConfig, dialect: Dialect) -> list[Route]:
        keys = self._dispatcher.admin_keys
        endpoints = Endpoints(Admission(self._dispatcher.metrics, keys or self._keys), settings)
        routes = (
            ("GET", LORAS, self.all),
            ("POST", LORAS, self.load),
            ("DELETE", f"{LORAS}/{{name}}", self.remove),
        )
        return [
            endpoints.route(
                path,
                handler if keys is not None else _refuse,
                dialect,
                method=method,
                is_work=False,
                read=read_nothing if keys is None else None,
            )
            for method, path, handler in routes
        ]

    async def all(self, call: HttpCall) -> Response:
        return JSONResponse({"loras": [asdict(lora) for lora in self._dispatcher.loras.known.values()]})

    async def load(self, call: HttpCall) -> Response:
        body = validated(_LoraBody, call.body)
        return JSONResponse(asdict(await self._dispatcher.loras.load(body.name, Path(body.path))), 201)

    async def remove(self, call: HttpCall) -> Response:
        await self._dispatcher.loras.remove(call.request.path_params["name"])
        return Response(status_code=204)


async def _refuse(call: HttpCall) -> Response:
    raise PermissionDeniedError("what this server serves cannot be changed; the operator can allow it with admin_key_file")
