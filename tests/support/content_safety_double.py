"""A double of Azure AI Content Safety, api-version 2023-10-01: what it accepts, answers and refuses, over real HTTP.

It checks every request as the service documents it (https://learn.microsoft.com/rest/api/contentsafety) and can be told to fail
in the ways a service over a network fails. Tests drive it with the real SDK.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import io
import ssl
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from in_a_thread import in_a_thread
from PIL import Image

CATEGORIES = ("Hate", "SelfHarm", "Sexual", "Violence")
FORMATS = {"JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"}
KEY = "double-0123456789abcdef"
API_VERSIONS = {"2023-10-01", "2024-09-01"}

FAILURES = (
    "429",
    "429 with Retry-After",
    "500",
    "503",
    "hang",
    "half an answer",
    "no json",
    "a list",
    "null",
    "empty",
    "one category missing",
    "one severity missing",
    "severity as text",
    "severity null",
    "severity out of range",
    "categories as text",
)


def no_harm(image: Image.Image) -> dict[str, int]:
    return {}


@dataclass
class ContentSafetyDouble:
    """`words` maps a word to what a text with it is; `judge_image` says what a picture is; `blocklists` holds words by name.

    `text_mode` and `image_mode` are "ok" or one of `FAILURES`. A hanging call waits for `released`.
    """

    url: str = ""
    key: str = KEY
    token: str | None = None
    client_id: str = ""
    words: dict[str, tuple[str, int]] = field(default_factory=dict)
    judge_image: Callable[[Image.Image], dict[str, int]] = no_harm
    blocklists: dict[str, list[str]] = field(default_factory=dict)
    text_mode: str = "ok"
    image_mode: str = "ok"
    redirect_to: str | None = None
    texts: list[str] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    num_hanging: int = 0
    num_calls: int = 0
    num_tokens: int = 0
    released: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.num_calls += 1
        if self.redirect_to is not None:
            return web.Response(status=307, headers={"Location": f"{self.redirect_to}{request.path_qs}"})
        is_text = request.path.endswith("/text:analyze")
        try:
            judged = self._text(await self._body(request)) if is_text else self._image(await self._body(request))
        except web.HTTPException as refusal:
            self.refused.append(f"{refusal.status} {refusal.text}")
            raise
        return await self._told(request, self.text_mode if is_text else self.image_mode, judged)

    async def give_token(self, request: web.Request) -> web.Response:
        """A managed identity's endpoint, as App Service and online endpoints of Azure ML have it in IDENTITY_ENDPOINT."""
        wanted = {"resource": "https://cognitiveservices.azure.com", "client_id": self.client_id, "api-version": "2019-08-01"}
        if dict(request.query) != wanted or request.headers.get("X-IDENTITY-HEADER") != self.key:
            raise error(400, "invalid_request", str(dict(request.query)))
        self.num_tokens += 1
        expires = str(int(time.time()) + 86_400)
        return web.json_response({"access_token": self.token, "expires_on": expires, "token_type": "Bearer", **wanted})

    async def give_token_to_compute(self, request: web.Request) -> web.Response:
        """A managed identity's endpoint, as the compute of Azure ML has it in MSI_ENDPOINT."""
        wanted = {"resource": "https://cognitiveservices.azure.com", "clientid": self.client_id, "api-version": "2017-09-01"}
        if dict(request.query) != wanted or request.headers.get("secret") != self.key:
            raise error(400, "invalid_request", str(dict(request.query)))
        self.num_tokens += 1
        expires = int(time.time()) + 86_400
        return web.json_response({"access_token": self.token, "expires_on": expires, "token_type": "Bearer", **wanted})

    async def exchange_token(self, request: web.Request) -> web.Response:
        """Entra's endpoint, where a workload exchanges its OIDC token for one of ours; `key` is the token it must have."""
        wanted = {
            "client_assertion": self.key,
            "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
            "client_id": self.client_id,
            "grant_type": "client_credentials",
            "scope": "https://cognitiveservices.azure.com/.default",
        }
        given = await request.post()
        if {name: given.get(name) for name in wanted} != wanted:
            raise error(400, "invalid_client", str(sorted(given)))
        self.num_tokens += 1
        return web.json_response({"access_token": self.token, "expires_in": 86_400, "token_type": "Bearer"})

    async def _body(self, request: web.Request) -> dict[str, Any]:
        if request.headers.get("Ocp-Apim-Subscription-Key") != self.key and not (
            self.token is not None and request.headers.get("Authorization") == f"Bearer {self.token}"
        ):
            raise error(401, "401", "Access denied due to invalid subscription key or wrong API endpoint.")
        if request.query.get("api-version") not in API_VERSIONS:
            raise error(404, "404", "Resource not found")
        if request.content_type != "application/json":
            raise error(415, "UnsupportedMediaType", "Content-Type must be application/json")
        try:
            body = await request.json()
        except ValueError:
            raise invalid("the body is not JSON") from None
        if not isinstance(body, dict):
            raise invalid("the body is not an object")
        return body

    def _text(self, body: dict[str, Any]) -> dict[str, Any]:
        known = {"text", "categories", "blocklistNames", "haltOnBlocklistHit", "outputType"}
        text = body.get("text")
        if not isinstance(text, str) or not 1 <= len(text) <= 10_000 or not text.strip():
            raise invalid("text: 1 to 10000 code points")
        check_common(body, known)
        matches = []
        for name in body.get("blocklistNames", []):
            if name not in self.blocklists:
                raise error(404, "NotFound", "one of the blocklists does not exist")
            found = [word for word in self.blocklists[name] if word in text]
            matches += [{"blocklistName": name, "blocklistItemId": word, "blocklistItemText": word} for word in found]
        self.texts.append(text)
        severities: dict[str, int] = {}
        for word, (category, severity) in self.words.items():
            if word in text:
                severities[category] = max(severity, severities.get(category, 0))
        return {"blocklistsMatch": matches, **analysis(severities)}

    def _image(self, body: dict[str, Any]) -> dict[str, Any]:
        check_common(body, {"image", "categories", "outputType"})
        image = body.get("image")
        if not isinstance(image, dict) or set(image) != {"content"} or not isinstance(image["content"], str):
            raise invalid("image: content or blobUrl")
        try:
            content = base64.b64decode(image["content"], validate=True)
        except binascii.Error:
            raise invalid("image.content is not base64") from None
        if len(content) > 4 * 1024 * 1024:
            raise invalid("image: at most 4 MB")
        try:
            with Image.open(io.BytesIO(content)) as file:
                file.load()
        except (OSError, SyntaxError):
            raise error(400, "InvalidImageFormat", "the image cannot be read") from None
        if file.format not in FORMATS or not all(50 <= side <= 2048 for side in file.size):
            raise error(400, "InvalidImageSize", f"{file.format} {file.size}")
        self.images.append(content)
        return analysis(self.judge_image(file.convert("RGB")))

    async def _told(self, request: web.Request, mode: str, judged: dict[str, Any]) -> web.StreamResponse:
        entries = judged["categoriesAnalysis"]
        if mode == "hang":
            self.num_hanging += 1
            try:
                await self.released.wait()
            finally:
                self.num_hanging -= 1
        elif mode == "half an answer":
            half = web.StreamResponse(headers={"Content-Length": "1000", "Content-Type": "application/json"})
            await half.prepare(request)
            await half.write(b'{"categoriesAnalysis"')
            assert request.transport is not None
            request.transport.close()
            return half
        elif mode == "no json":
            return web.Response(text="<html>it works</html>", content_type="text/html")
        elif mode in ("a list", "null", "empty"):
            return web.json_response({"a list": [1], "null": None, "empty": {}}[mode])
        elif mode == "one category missing":
            del entries[1]
        elif mode == "one severity missing":
            del entries[3]["severity"]
        elif mode in ("severity as text", "severity null", "severity out of range"):
            entries[0]["severity"] = {"severity as text": "0", "severity null": None, "severity out of range": -1}[mode]
        elif mode == "categories as text":
            judged["categoriesAnalysis"] = "none"
        elif mode.startswith("429"):
            headers = {"Retry-After": "3600"} if mode.endswith("Retry-After") else {}
            raise error(429, "TooManyRequests", "Requests have exceeded the rate limit.", headers)
        elif mode != "ok":
            raise error(int(mode), "InternalServerError", "The server encountered an internal error.")
        return web.json_response(judged)


def analysis(severities: dict[str, int]) -> dict[str, Any]:
    return {"categoriesAnalysis": [{"category": name, "severity": severities.get(name, 0)} for name in CATEGORIES]}


def check_common(body: dict[str, Any], known: set[str]) -> None:
    if unknown := set(body) - known:
        raise invalid(f"unknown members {unknown}")
    if not set(body.get("categories", [])) <= set(CATEGORIES):
        raise invalid("categories")
    if body.get("outputType", "FourSeverityLevels") not in ("FourSeverityLevels", "EightSeverityLevels"):
        raise invalid("outputType")


def invalid(message: str) -> web.HTTPException:
    return error(400, "InvalidRequestBody", message)


def error(status: int, code: str, message: str, headers: dict[str, str] | None = None) -> web.HTTPException:
    class _Error(web.HTTPException):
        status_code = status

    text = web.json_response({"error": {"code": code, "message": message}}).text
    return _Error(text=text, content_type="application/json", headers={"x-ms-error-code": code, **(headers or {})})


@contextlib.asynccontextmanager
async def content_safety_double(tls: ssl.SSLContext | None = None) -> AsyncIterator[ContentSafetyDouble]:
    """A double on a port of its own, in this loop."""
    double = ContentSafetyDouble()
    app = web.Application(client_max_size=16 * 1024 * 1024)
    app.router.add_post("/contentsafety/text:analyze", double.answer)
    app.router.add_post("/contentsafety/image:analyze", double.answer)
    app.router.add_get("/msi/token", double.give_token)
    app.router.add_get("/msi/compute", double.give_token_to_compute)
    app.router.add_post("/tenant/oauth2/v2.0/token", double.exchange_token)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
    await site.start()
    host, port = runner.addresses[0][:2]
    double.url = f"{'https' if tls else 'http'}://{host}:{port}"
    try:
        yield double
    finally:
        double.released.set()
        await runner.cleanup()


@contextlib.contextmanager
def double_in_a_thread(tls: ssl.SSLContext | None = None) -> Iterator[ContentSafetyDouble]:
    """A double for a server in another process."""
    with in_a_thread(content_safety_double(tls)) as double:
        yield double
