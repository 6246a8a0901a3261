"""What the page asks for and gets, over real HTTP, without a browser; and what others may not do there."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S
from PIL import Image
from servers import RunningServer, running_server

from mii_serve.config import DeployConfig
from mii_serve.errors import UnavailableError
from mii_serve.gateway.app import serve_http
from mii_serve.gateway.page.calls import PageCalls
from mii_serve.gateway.page.files import ASSETS
from mii_serve.server.keys import KeyRing
from mii_serve.types import OWN_STEPS, PARAMETER_NAMES, ServerInfo

KEY = "studio-key-0123456789"
KNOWN = ", ".join(sorted({"loras", "preview_every", "strength", *PARAMETER_NAMES, *(one.name for one in OWN_STEPS)}))
JSON = {"content-type": "application/json"}


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict:
        return json.loads(self.body)["error"]

    @property
    def events(self) -> list[tuple[str, dict]]:
        blocks = [block.split("\n") for block in self.body.decode().split("\n\n") if block]
        return [(lines[0].removeprefix("event: "), json.loads(lines[1].removeprefix("data: "))) for lines in blocks]


@dataclass
class Site:
    server: RunningServer
    address: str

    async def ask(self, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> Answer:
        async with asyncio.timeout(PATIENCE_S), self.line() as (reader, writer):
            await self.say(writer, method, path, body, {"connection": "close", **(headers or {})})
            head, _, rest = (await reader.read()).partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        told = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        if told.get("transfer-encoding") == "chunked":
            rest = _unchunked(rest)
        return Answer(int(status.split()[1]), told, rest)

    @contextlib.asynccontextmanager
    async def line(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        host, port = self.address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port), limit=2**24)
        try:
            yield reader, writer
        finally:
            writer.close()

    async def say(self, writer: asyncio.StreamWriter, method: str, path: str, body: bytes, headers: dict[str, str]) -> None:
        named = {"host": self.address, "content-length": str(len(body)), **headers}
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items()), "", ""]
        writer.write("\r\n".join(lines).encode() + body)
        await writer.drain()

    async def generate(self, headers: dict[str, str] | None = None, **asked) -> Answer:
        body = json.dumps({"prompt": "a red circle", **asked}).encode()
        return await self.ask("POST", "/ui/generate", body, {**JSON, **(headers or {})})


def _unchunked(body: bytes) -> bytes:
    found = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        found, body = found + body[: int(size, 16)], body[int(size, 16) + 2 :]
    return found


@contextlib.asynccontextmanager
async def site_of(folder: Path, keys: KeyRing | None = None) -> AsyncIterator[Site]:
    async with running_server(folder, FakeEngine(max_slots=2)) as server:
        config = DeployConfig.load({"http_port": 0})
        async with serve_http(config, server.dispatcher, keys or KeyRing()) as address:
            yield Site(server, address)


@pytest.fixture
async def site(tmp_path) -> AsyncIterator[Site]:
    async with site_of(tmp_path) as running:
        yield running


async def test_probes_and_browsers_are_told_apart_at_the_root(site):
    for accept in ({}, {"accept": "*/*"}, {"accept": "application/json"}):
        probed = await site.ask("GET", "/", headers=accept)
        assert (probed.status, json.loads(probed.body), probed.headers["vary"]) == (200, "healthy", "accept")
    page = await site.ask("GET", "/", headers={"accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert page.headers["content-type"] == "text/html; charset=utf-8" and "accept" in page.headers["vary"]
    assert page.body.startswith(b"<!doctype html>") and b"{{" not in page.body


async def test_the_policy_allows_nothing_from_elsewhere_and_nothing_in_line(site):
    page = await site.ask("GET", "/", headers={"accept": "text/html"})
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["referrer-policy"] == "no-referrer"
    texts = {path.name: path.read_text() for path in ASSETS.iterdir()}
    for name, text in texts.items():
        addresses = set(re.findall(r"https?://[^\s\"'`)]+", text)) - {"http://www.w3.org/2000/svg"}
        assert not addresses, f"{name} names {addresses}"
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), name
    assert not re.search(r"<style|style=|<script(?![^>]+src=)|\son\w+=", texts["index.html"])


async def test_files_are_kept_for_ever_under_their_digest_and_checked_at_the_root(site):
    page = await site.ask("GET", "/", headers={"accept": "text/html"})
    assert page.headers["cache-control"] == "no-cache"
    same = await site.ask("GET", "/", headers={"accept": "text/html", "if-none-match": page.headers["etag"]})
    assert (same.status, same.body) == (304, b"")
    folder = re.search(r'"(/ui/assets/[0-9a-f]{16})/page.js"', page.body.decode())[1]
    for path in ASSETS.iterdir():
        if path.name == "index.html":
            continue
        file = await site.ask("GET", f"{folder}/{path.name}")
        assert (file.status, file.body) == (200, path.read_bytes())
        assert "immutable" in file.headers["cache-control"]
    zipped = await site.ask("GET", f"{folder}/page.js", headers={"accept-encoding": "gzip"})
    assert gzip.decompress(zipped.body) == (ASSETS / "page.js").read_bytes()
    old = await site.ask("GET", "/ui/assets/0123456789abcdef/page.js")
    assert old.headers["cache-control"] == "no-cache"
    for path in (f"{folder}/nothing.js", f"{folder}/index.html", f"{folder}/..%2f..%2fcalls.py", f"{folder}/../../calls.py"):
        assert (await site.ask("GET", path)).status == 404, path


async def test_events_come_in_order_and_end_with_what_was_done(site):
    answer = await site.generate(seed="18446744073709551615", num_images_per_prompt=2, num_inference_steps=3)
    assert answer.status == 200 and answer.headers["content-type"].startswith("text/event-stream")
    names = [name for name, _ in answer.events]
    assert names[0] == "queued" and names[-1] == "done" and names.count("image") == 2 and "step" in names
    seeds = {told["image_index"]: told["seed"] for name, told in answer.events if name == "image"}
    assert seeds == {0: "18446744073709551615", 1: "0"}
    done = answer.events[-1][1]
    assert done["parameters"]["seed"] == "18446744073709551615" and done["parameters"]["num_inference_steps"] == 3
    labels = {"method": "POST /ui/generate", "code": "OK"}
    value = site.server.dispatcher.metrics.registry.get_sample_value
    await site.server.until(lambda: value("mii_serve_requests_total", labels) == 1)


@pytest.mark.parametrize(
    ("asked", "field", "rule"),
    [
        ({"height": 65}, "height", "must be a multiple of 8 in [64, 1024], got 65"),
        ({"height": "64"}, "height", "must be a whole number, got '64'"),
        ({"num_inference_steps": True}, "num_inference_steps", "must be a whole number, got true"),
        ({"guidance_scale": [7]}, "guidance_scale", "must be a number, got an array"),
        ({"seed": "1e3"}, "seed", "must be a whole number in [0, 2**64 - 1], got '1e3'"),
        ({"seed": "9" * 5000}, "seed", None),
        ({"seed": -2}, "seed", None),
        ({"prompt": None}, "prompt", "must not be empty"),
        ({"prompt": {"a": 1}}, "prompt", None),
        ({"prompt": "\ud800"}, "prompt", None),
        ({"preview_every": "1"}, "preview_every", "must be a whole number, got '1'"),
        ({"preview_every": 0}, "output.preview_every", "must be in [1, 1000], got 0"),
        ({"steps": 3}, "steps", f"is not known here; did you mean num_inference_steps? known are {KNOWN}"),
    ],
)
async def test_a_refusal_names_field_and_rule(site, asked, field, rule):
    answer = await site.generate(**asked)
    assert answer.status == 400 and answer.error["field"] == field and answer.error["code"] == "INVALID_ARGUMENT"
    assert rule is None or answer.error["rule"] == rule
    assert answer.headers["x-request-id"] == answer.error["request_id"]


async def test_what_is_no_request_is_refused(site):
    for body, headers in (
        (b"{", JSON),
        (b"[1]", JSON),
        (b"[" * 100_000, JSON),
        (b"\xff", JSON),
        (b'{"prompt": "x"}', {"content-type": "text/plain"}),  # what another site's form could send
        (b'{"prompt": "x"}', {**JSON, "sec-fetch-site": "cross-site"}),
        (b'{"prompt": "' + b"x" * 5_000_000 + b'"}', JSON),
    ):
        answer = await site.ask("POST", "/ui/generate", body, headers)
        assert 400 <= answer.status < 500, (body[:20], answer.status)
    assert site.server.loop.activity().num_requests == 0
    assert (await site.ask("GET", "/ui/generate")).status == 405


async def test_without_a_replica_it_says_so_at_once(site):
    await site.server.dispatcher.detach()
    for path in ("/ui/info", "/ui/state"):
        assert (await site.ask("GET", path)).status == 503
    answer = await site.generate()
    assert answer.status == 503 or answer.events[-1][0] == "error"


async def test_who_hangs_up_in_line_or_at_work_leaves_no_work(site):
    site.server.engine.gate.clear()
    body = json.dumps({"prompt": "a red circle", "num_images_per_prompt": 2}).encode()
    async with site.line() as (reader, writer), site.line() as (waiting_reader, waiting_writer):
        await site.say(writer, "POST", "/ui/generate", body, JSON)
        await reader.readuntil(b"event: started")
        await site.say(waiting_writer, "POST", "/ui/generate", body, JSON)
        await waiting_reader.readuntil(b"event: queued")
        assert site.server.loop.activity().num_waiting == 2
    await site.server.until(lambda: site.server.loop.activity().num_waiting == 0)
    site.server.engine.gate.set()
    await site.server.until(lambda: site.server.loop.activity().num_running == 0)
    assert site.server.loop.activity().num_cancelled_requests == 2
    assert site.server.loop.activity().num_images == 0


async def test_with_keys_the_files_are_open_and_the_calls_are_not(tmp_path):
    (tmp_path / "keys").write_text(f"{KEY} name=studio max_concurrent_requests=1\n")
    async with site_of(tmp_path, KeyRing(tmp_path / "keys")) as site:
        assert (await site.ask("GET", "/", headers={"accept": "text/html"})).status == 200
        for path in ("/ui/info", "/ui/state"):
            refused = await site.ask("GET", path)
            assert refused.status == 401 and refused.headers["www-authenticate"] == "Bearer"
            assert (await site.ask("GET", path, headers={"authorization": f"Bearer {KEY}"})).status == 200
        assert (await site.generate()).status == 401
        assert (await site.generate({"authorization": f"Bearer {KEY}"})).events[-1][0] == "done"
        site.server.engine.gate.clear()
        async with site.line() as (reader, writer):
            await site.say(writer, "POST", "/ui/generate", b'{"prompt": "x"}', {**JSON, "authorization": f"Bearer {KEY}"})
            await reader.readuntil(b"event: started")
            limited = await site.generate({"authorization": f"Bearer {KEY}"})
            assert limited.status == 429 and limited.headers["retry-after"] == "1" and limited.error["retry_after_s"] == 1


async def test_any_number_of_pages_asks_the_replicas_only_now_and_then(site, monkeypatch):
    asked = []
    ask = site.server.dispatcher.server_info

    async def counted() -> ServerInfo:
        asked.append(None)
        return await ask()

    monkeypatch.setattr(site.server.dispatcher, "server_info", counted)
    calls = PageCalls(site.server.dispatcher)
    answers = await asyncio.gather(*(calls.state(None) for _ in range(50)))
    assert {json.loads(answer.body)["max_slots"] for answer in answers} == {2}
    assert len(asked) == 1


async def test_pages_do_not_queue_up_to_ask_replicas_that_say_nothing(site, monkeypatch):
    asked = []

    async def refused() -> ServerInfo:
        asked.append(None)
        raise UnavailableError("no replica answers")

    monkeypatch.setattr(site.server.dispatcher, "server_info", refused)
    calls = PageCalls(site.server.dispatcher)
    outcomes = await asyncio.gather(*(calls.state(None) for _ in range(50)), return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {UnavailableError}
    assert len(asked) == 1


async def test_a_form_has_the_request_and_its_images(site):
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")

    def form(**parts: bytes) -> bytes:
        made = b"".join(
            b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n'
            % (name.encode(), b'; filename="a.png"' if name.endswith("image") else b"", content)
            for name, content in parts.items()
        )
        return made + b"--x--\r\n"

    kind = {"content-type": "multipart/form-data; boundary=x", "x-mii-page": "1"}
    request = b'{"prompt": "", "strength": 0.5, "num_inference_steps": 4, "seed": "7"}'
    answer = await site.ask("POST", "/ui/generate", form(request=request, image=file.getvalue()), kind)
    assert answer.events[-1][1]["parameters"]["strength"] == 0.5
    for parts, field in (
        ({"request": b"{"}, "body"),
        ({"image": file.getvalue()}, "body"),
        ({"request": request, "image": b"no image"}, "image"),
        ({"request": request, "image": file.getvalue(), "mask_image": b"no image"}, "mask_image"),
        ({"request": b'{"prompt": "a"}', "mask_image": file.getvalue()}, "mask_image"),
        ({"request": request, "other": b""}, "other"),
    ):
        answer = await site.ask("POST", "/ui/generate", form(**parts), kind)
        assert (answer.status, answer.error["field"]) == (400, field), answer.body
    elsewhere = await site.ask("POST", "/ui/generate", form(request=request), {"content-type": kind["content-type"]})
    assert elsewhere.status == 415
