"""What the server says of itself: `/swagger.json`, an OpenAPI 3 document of all routes, and Azure's `/info`."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import yaml
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from mii_serve import __version__
from mii_serve.errors import InvalidRequestError, MiiServeError, NotFoundError
from mii_serve.gateway.dialects.azure_score import SCORE_PARAMETERS
from mii_serve.gateway.dialects.huggingface import TASK_PARAMETERS
from mii_serve.gateway.dialects.openai import IMAGES_PARAMETERS
from mii_serve.gateway.errors import azure_problem, problem_response
from mii_serve.server.model_names import ModelNames
from mii_serve.types import (
    LORAS_HELP,
    MAX_LORA_SCALE,
    MAX_LORAS,
    OWN_STEPS,
    PARAMETER_NAMES,
    PARAMETERS,
    RANDOM_SEED,
    STRENGTH,
    Limits,
    Parameter,
)

JSON_TYPES: dict[type, str] = {str: "string", int: "integer", float: "number"}


def document(*, has_sdapi: bool = False) -> dict[str, Any]:
    """The OpenAPI document: what is written in `openapi.yaml`, and the parameters from their declarations."""
    written: dict[str, Any] = yaml.safe_load((files(__package__) / "openapi.yaml").read_text(encoding="utf-8"))
    if has_sdapi:
        added = yaml.safe_load((files(__package__) / "dialects" / "sdapi" / "openapi.yaml").read_text(encoding="utf-8"))
        written["paths"] |= added["paths"]
        for kind, components in added["components"].items():
            written["components"][kind] |= components
    written["info"]["version"] = __version__
    schemas = written["components"]["schemas"]
    task = schemas["TextToImageRequest"]["properties"]["parameters"]
    for schema, names in (
        (schemas["ScoreParameters"], SCORE_PARAMETERS),
        (schemas["ImagesRequest"], IMAGES_PARAMETERS),
        (task, TASK_PARAMETERS),
    ):
        schema["properties"] |= {name: {"$ref": f"#/components/schemas/{name}"} for name in (*names, "loras")}
    of_images = schemas["ImagesRequest"]["properties"]
    schemas["EditsRequest"]["properties"] |= {
        name: schema for name, schema in of_images.items() if name not in ("stream", "partial_images")
    }
    schemas["VariationsRequest"]["properties"] |= {
        name: schema
        for name, schema in schemas["EditsRequest"]["properties"].items()
        if name not in ("prompt", "mask", "image")
    }
    infer = schemas["InferenceRequest"]["properties"]["parameters"]["properties"]
    infer |= {name: {"$ref": f"#/components/schemas/{name}"} for name in PARAMETER_NAMES}
    schemas["InferenceInput"]["properties"]["name"]["enum"] = list(PARAMETER_NAMES)
    schemas |= {parameter.name: _schema(parameter) for parameter in (*PARAMETERS, STRENGTH, *OWN_STEPS)}
    scale = {"type": "number", "minimum": -MAX_LORA_SCALE, "maximum": MAX_LORA_SCALE}
    schemas["loras"] = {
        "type": "object",
        "description": LORAS_HELP,
        "additionalProperties": scale,
        "maxProperties": MAX_LORAS,
        "nullable": True,
    }
    return written


def _schema(parameter: Parameter) -> dict[str, Any]:
    """Optional parameters may be null."""
    schema: dict[str, Any] = {"type": JSON_TYPES[parameter.kind], "description": parameter.help}
    if parameter.bounds is not None:
        least, most = parameter.bounds(Limits())
        names = ("minLength", "maxLength") if parameter.kind is str else ("minimum", "maximum")
        schema |= zip(names, (least, most), strict=True)
    if parameter.multiple_of is not None:
        schema["multipleOf"] = parameter.multiple_of
    if parameter.lengths is not None:
        fewest, most_numbers = parameter.lengths(Limits())
        description = schema.pop("description")
        schema = {"type": "array", "description": description, "items": schema, "minItems": fewest, "maxItems": most_numbers}
    if parameter.name == "prompt":
        return schema | {"minLength": 1}
    if parameter.name == "seed":
        schema |= {"minimum": RANDOM_SEED, "description": f"{parameter.help}; {RANDOM_SEED} is the same as left out"}
    return schema | {"nullable": True}


class Description:
    """Answers that cost nothing and need no key."""

    def __init__(self, names: ModelNames, *, has_sdapi: bool = False) -> None:
        self._names = names
        self._document = document(has_sdapi=has_sdapi)

    async def swagger(self, request: Request) -> Response:
        """Azure's inference server takes the version of the format as `?version=2|3`; here there is 3."""
        version = request.query_params.get("version", "3")
        if version == "3":
            return JSONResponse(self._document)
        if version == "2":
            return _refusal(NotFoundError("there is no description in Swagger 2 here; ask for version=3"))
        return _refusal(InvalidRequestError("version", "must be 3", repr(version[:20])))

    async def info(self, request: Request) -> Response:
        try:
            info = await self._names.info()
        except MiiServeError as error:
            return _refusal(error)
        owner = info.model.rpartition("/")[0]
        ranks = {"num_ranks": info.num_ranks, "parallelism": info.parallelism} if info.num_ranks > 1 else {}
        names = {"model_type": "stable-diffusion", "model_provider_name": owner or "mii_serve", "model_name": info.model}
        kernels = {"engine_kernels": info.engine_kernels} if info.engine_kernels else {}
        return JSONResponse(names | ranks | kernels)


def _refusal(error: MiiServeError) -> Response:
    return problem_response(azure_problem(error))
