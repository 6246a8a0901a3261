"""What the server says of itself: `/swagger.json`, an OpenAPI 3 document of all routes, and Azure's `/info`."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import yaml
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mii_serve import __version__
from mii_serve.errors import InvalidRequestError, MiiServeError
from mii_serve.gateway.names import ModelNames
from mii_serve.gateway.problems import NotFoundError, azure_problem, problem_response


def document() -> dict[str, Any]:
    """The OpenAPI document."""
    written: dict[str, Any] = yaml.safe_load((files(__package__) / "openapi.yaml").read_text(encoding="utf-8"))
    written["info"]["version"] = __version__
    return written


class Description:
    """Answers that cost nothing and need no key."""

    def __init__(self, names: ModelNames) -> None:
        self._names = names
        self._document = document()

    async def swagger(self, request: Request) -> Response:
        """Azure's inference server takes the version of the format as `?version=2|3`; here there is 3."""
        version = request.query_params.get("version", "3")
        if version == "3":
            return JSONResponse(self._document)
        if version == "2":
            return _told(NotFoundError("there is no description in Swagger 2 here; ask for version=3"))
        return _told(InvalidRequestError("version", "must be 3", repr(version[:20])))

    async def info(self, request: Request) -> Response:
        try:
            model = (await self._names.info()).model
        except MiiServeError as error:
            return _told(error)
        owner = model.rpartition("/")[0]
        return JSONResponse(
            {"model_type": "stable-diffusion", "model_provider_name": owner or "mii_serve", "model_name": model}
        )


def _told(error: MiiServeError) -> Response:
    return problem_response(azure_problem(error))
