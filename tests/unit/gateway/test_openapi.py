"""The description names every route and every parameter that the code has, and no other."""

from __future__ import annotations

import re

import pytest
from starlette.routing import Route

from mii_serve.config import HttpConfig
from mii_serve.gateway.app import build_app
from mii_serve.gateway.dialects import azure_score, huggingface, openai
from mii_serve.gateway.dialects.sdapi.body import ImageBody, TextBody
from mii_serve.gateway.openapi import document
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.keys import KeyRing


def properties(name: str) -> set[str]:
    return set(document()["components"]["schemas"][name]["properties"])


@pytest.mark.parametrize("has_sdapi", [False, True])
async def test_every_route_is_described(has_sdapi):
    app = build_app(Dispatcher(), KeyRing(), HttpConfig(enable_sdapi=has_sdapi))
    served = {
        (re.sub(r":\w+}", "}", route.path), method.lower())
        for route in app.routes
        if isinstance(route, Route) and not route.path.startswith("/ui")  # the page's own calls are nobody else's
        for method in route.methods or ()
        if method != "HEAD"
    }
    described = {(path, method) for path, operations in document(has_sdapi=has_sdapi)["paths"].items() for method in operations}
    assert served == described


def test_every_parameter_is_described():
    assert properties("ScoreParameters") == set(azure_score.ScoreParameters.model_fields)
    assert properties("ScoreRow") == set(azure_score.COLUMNS)
    assert properties("ImagesRequest") == set(openai.ImagesBody.model_fields)
    described = document(has_sdapi=True)["components"]["schemas"]
    for name, body in (("SdapiText", TextBody), ("SdapiImage", ImageBody)):
        assert set(described[name]["properties"]) == set(body.model_fields)
    edits = set(openai.EditsBody.model_fields) - {"stream", "partial_images"}
    assert properties("EditsRequest") == {"image", "mask", *edits}
    assert properties("VariationsRequest") == {"image", *edits} - {"prompt"}
    task = document()["components"]["schemas"]["TextToImageRequest"]["properties"]
    assert set(task["parameters"]["properties"]) == set(huggingface.TaskParameters.model_fields)
    assert set(task["options"]["properties"]) == set(huggingface.TaskOptions.model_fields)


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("*/*", "image/png"),
        ("image/jpeg;q=0.9, image/webp", "image/webp"),
        ("IMAGE/JPEG", "image/jpeg"),
        ("text/html, image/*;q=0.2", "image/png"),
        ("image/png;q=zero, image/jpeg;q=0.1", "image/jpeg"),
    ],
)
def test_the_best_accepted_kind_wins(accept, media_type):
    assert huggingface.accepted(accept) == media_type
