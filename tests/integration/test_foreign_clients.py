"""What clients that were written for other servers send, as they send it."""

from __future__ import annotations

import asyncio
import base64
import json
from urllib.parse import unquote

import pytest
from fake_engine import MAX_WORDS
from web import Web, events_of, picture, web

from mii_serve.gateway import protocol
from mii_serve.gateway.app import build_app
from mii_serve.server.keys import KeyRing

PATH = "/v1/images/generations"
KEY = "studio-key-0123456789"
LONG = " ".join(f"word{i}" for i in range(MAX_WORDS)) + " красный хвост"
TAIL = "красный хвост"


@pytest.fixture
async def served(tmp_path):
    async with web(tmp_path) as running:
        yield running


async def raw(served: Web, head: str, body: bytes = b"", *, ends: bool = False) -> bytes:
    """Everything that is answered to these bytes, to the end of the connection; with `ends`, no more will come from us."""
    host, _, port = served.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    lines = head.strip().splitlines()
    writer.write("\r\n".join((lines[0], *(line.strip() for line in lines[1:]), "", "")).encode() + body)
    if ends:
        writer.write_eof()
    async with asyncio.timeout(20):
        answer = await reader.read()
    writer.close()
    return answer


def post(path: str, body: dict, *more: str, version: str = "1.1") -> tuple[str, bytes]:
    content = json.dumps(body).encode()
    lines = (
        f"POST {path} HTTP/{version}",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(content)}",
    )
    return "\n".join((*lines, *more)), content


# ---- links -------------------------------------------------------------------------------------------------------


async def test_who_asks_for_a_url_gets_one_that_works_without_a_key(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"{KEY} name=studio\n")
    file.chmod(0o600)
    async with web(tmp_path, keys=KeyRing(file)) as served:
        body = {"prompt": "a", "n": 2, "response_format": "url", "seed": 4}
        told = (await served.post(PATH, body, api_key=KEY)).json()
        assert [sorted(item) for item in told["data"]] == [["nsfw_content_detected", "seed", "url"]] * 2
        urls = [item["url"] for item in told["data"]]
        assert len(set(urls)) == 2 and all(url.startswith(f"http://{served.address}/v1/images/files/") for url in urls)
        asked = (await served.post(PATH, {**body, "response_format": "b64_json"}, api_key=KEY)).json()
        assert all("url" not in item for item in asked["data"])
        for url, item in zip(urls, asked["data"], strict=True):
            answer = await served.client.get(url)
            assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
            assert answer.content == base64.b64decode(item["b64_json"])
        gone = await served.client.get("/v1/images/files/guessed.png")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "file_not_found")


async def test_who_does_not_say_gets_base64_and_a_url(served):
    [item] = (await served.post(PATH, {"prompt": "a"})).json()["data"]
    assert picture(item["b64_json"]).size == (64, 64)
    assert (await served.client.get(item["url"])).status_code == 200
    for newer in ({"output_format": "webp"}, {"response_format": "png"}):
        [item] = (await served.post(PATH, {"prompt": "a", **newer})).json()["data"]
        assert "url" not in item and item["b64_json"]


async def test_a_link_begins_with_the_configured_address(tmp_path):
    async with web(tmp_path, public_url="https://pictures.example/sd") as served:
        [item] = (await served.post(PATH, {"prompt": "a", "response_format": "url"})).json()["data"]
        assert item["url"].startswith("https://pictures.example/sd/v1/images/files/")


# ---- names -------------------------------------------------------------------------------------------------------


async def test_the_operators_names_are_the_models_names(served):
    import httpx2

    app = build_app(served.server.dispatcher, KeyRing(), None, ("org/sd", "dall-e-3"))
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://x") as client:
        listed = (await client.get("/v1/models")).json()["data"]
        assert [(model["id"], model["owned_by"]) for model in listed] == [("org/sd", "org"), ("dall-e-3", "mii_serve")]
        for name, told in (("dall-e-3", "dall-e-3"), ("SD", "org/sd"), ("org/sd", "org/sd"), ("test", "org/sd")):
            assert (await client.get(f"/v1/models/{name}")).json()["id"] == told
            assert (await client.post(PATH, json={"prompt": "a", "model": name})).status_code == 200
        unknown = await client.post(PATH, json={"prompt": "a", "model": "fake"})
        assert unknown.status_code == 404 and "this server has org/sd, dall-e-3" in unknown.json()["error"]["message"]


# ---- members -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {"n": 1.0, "seed": 3.0, "num_inference_steps": 4.0},
        {"model": "", "size": "", "quality": "", "style": "", "user": "", "response_format": "", "scheduler": ""},
        {"size": "64X64"},
        {"size": " 64 × 64 "},
        {"quality": "standard", "style": "vivid", "size": "auto", "background": "auto", "moderation": "low", "n": None},
    ],
)
async def test_habits_of_other_clients_are_understood(served, more):
    answer = await served.post(PATH, {"prompt": "a", **more})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ("100x128", "size: width must be a multiple of 8 in [64, 1024], got 100"),
        ("128x100", "size: height must be a multiple of 8 in [64, 1024], got 100"),
        ("128x99999999", "size: height must be a multiple of 8 in [64, 1024], got 99999999"),
        ("64", "size: must be auto or WIDTHxHEIGHT, such as 512x512, got '64'"),
        (64, "size: must be auto or WIDTHxHEIGHT, such as 512x512, got 64"),
    ],
)
async def test_a_bad_size_is_told_what_is_bad_about_it(served, size, said):
    told = (await served.post(PATH, {"prompt": "a", "size": size})).json()["error"]
    assert (told["message"], told["param"]) == (said, "size")


async def test_a_foreign_name_is_refused_with_ours(served):
    for path, body in (
        (PATH, {"prompt": "a", "steps": 3}),
        ("/score", {"input_data": {"columns": ["prompt"], "data": ["a"], "parameters": {"steps": 3}}}),
        ("/", {"inputs": "a", "parameters": {"steps": 3}}),
        ("/ui/generate", {"prompt": "a", "steps": 3}),
    ):
        answer = await served.post(path, body)
        assert answer.status_code == 400 and "steps: is not known here; did you mean num_inference_steps? " in answer.text, path


async def test_seed_minus_one_is_any_seed(served):
    for seed in (-1, -1.0):
        seeds = set()
        for _ in range(2):
            seeds.add((await served.post(PATH, {"prompt": "a", "seed": seed})).json()["data"][0]["seed"])
            body = {"input_data": {"columns": ["prompt"], "data": ["a"], "parameters": {"seed": seed}}}
            seeds.add(int((await served.post("/score", body)).headers["x-mii-seeds"]))
            task = await served.post("/", {"inputs": "a", "parameters": {"seed": seed}})
            seeds.add(int(task.headers["x-mii-seed"]))
            events = events_of((await served.post("/ui/generate", {"prompt": "a", "seed": seed})).text)
            seeds.add(int(dict(events)["image"]["seed"]))
        assert len(seeds) == 8 and all(0 <= one < 2**32 for one in seeds)


# ---- text that did not fit ---------------------------------------------------------------------------------------


async def test_every_dialect_tells_what_was_not_used(served):
    asked = {"prompt": LONG, "negative_prompt": LONG}
    told = (await served.post(PATH, asked)).json()["parameters"]
    assert (told["dropped_prompt"], told["dropped_negative_prompt"]) == (TAIL, TAIL)
    (_, last) = events_of((await served.post(PATH, {**asked, "stream": True})).text)[-1]
    assert (last["parameters"]["dropped_prompt"], last["parameters"]["dropped_negative_prompt"]) == (TAIL, TAIL)
    answer = await served.post("/score", {"input_data": {"columns": ["prompt"], "data": ["a", LONG]}})
    assert [item.get("dropped_prompt") for item in answer.json()] == [None, TAIL]
    assert [unquote(entry) for entry in answer.headers["x-mii-dropped-prompt"].split(",")] == ["", TAIL]
    task = await served.post("/", {"inputs": LONG, "parameters": {"negative_prompt": LONG}})
    assert unquote(task.headers["x-mii-dropped-prompt"]) == unquote(task.headers["x-mii-dropped-negative-prompt"]) == TAIL
    short = await served.post("/", {"inputs": "a"})
    assert "x-mii-dropped-prompt" not in short.headers
    assert (await served.post(PATH, {"prompt": "a"})).json()["parameters"]["dropped_prompt"] == ""


# ---- addresses, bodies, connections ------------------------------------------------------------------------------


async def test_addresses_in_every_spelling(served):
    for path in ("/health", "/healthz", "/healthz/", "/readyz/", "//livez", "/v1/models/", "/openapi.json", "/swagger.json/"):
        assert (await served.client.get(path)).status_code == 200, path
    for path in (f"{PATH}/", "/v1//images/generations"):
        assert (await served.post(path, {"prompt": "a"})).status_code == 200, path
    assert (await served.client.get("/openapi.json")).json() == (await served.client.get("/swagger.json")).json()
    answer = await raw(served, "GET http://LOCALHOST:80/v1/models?x=1 HTTP/1.1\nHost: elsewhere\nConnection: close")
    assert answer.startswith(b"HTTP/1.1 200") and b'"object":"list"' in answer
    foreign = await raw(served, "GET http://elsewhere/livez HTTP/1.1\nHost: localhost\nConnection: close")
    assert foreign.startswith(b"HTTP/1.1 421"), "a whole address says which host is meant"
    assert (await served.client.get("/no/such/")).status_code == 404


async def test_health_follows_readiness(served):
    await served.server.dispatcher.drain(1)
    assert {(await served.client.get(path)).status_code for path in ("/health", "/healthz", "/readyz")} == {503}


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json; charset=UTF8",
        'application/json;charset="utf-8"',
        "application/json; CHARSET=Utf_8; x=y",
        "application/json; x=y; charset = utf-8",
    ],
)
async def test_utf8_in_every_spelling_and_with_a_mark(served, content_type):
    body = b"\xef\xbb\xbf" + json.dumps({"prompt": "ü"}, ensure_ascii=False).encode()
    answer = await served.client.post(PATH, content=body, headers={"content-type": content_type})
    assert answer.status_code == 200, answer.text


async def test_another_charset_is_refused(served):
    for charset in ("latin-1", "utf-16", "utf-8; charset=latin-1"):
        headers = {"content-type": f"application/json; charset={charset}"}
        assert (await served.client.post(PATH, content=b"{}", headers=headers)).status_code == 415


async def test_who_says_expect_gets_to_send(served):
    head, content = post(PATH, {"prompt": "a"}, "Expect: 100-continue", "Connection: close")
    answer = await raw(served, head, content)
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")


async def test_who_sends_no_more_gets_the_answer(served):
    for body in ({"prompt": "a"}, {"prompt": "a", "stream": True}):
        head, content = post(PATH, body)
        *interim, last = (await raw(served, head, content, ends=True)).split(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert not any(interim) and len(interim) <= 5
        assert last.startswith(b"HTTP/1.1 200") and b"b64_json" in last
    answer = await raw(served, "GET /livez HTTP/1.1\nHost: localhost", ends=True)
    assert answer.endswith(b"ok")


async def test_who_sends_two_requests_and_no_more_gets_both_answers(served):
    head, content = post(PATH, {"prompt": "a"})
    first = "\r\n".join((*head.splitlines(), "", "")).encode() + content
    answer = await raw(served, "GET /livez HTTP/1.1\nHost: localhost", first, ends=True)
    assert answer.count(b"HTTP/1.1 200") == 2 and b"b64_json" in answer


@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_who_leaves_is_still_noticed(served, version):
    served.server.engine.gate.clear()
    host, _, port = served.address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head, content = post(PATH, {"prompt": "a", "num_inference_steps": 1000}, version=version)
    writer.write("\r\n".join((*head.splitlines(), "", "")).encode() + content)
    await served.server.until(lambda: served.server.loop.activity().num_running)
    if version == "1.1":
        writer.close()
    else:  # HTTP/1.0 has nothing to ask with whether the caller still listens
        writer.write_eof()
    await served.server.until(lambda: not served.server.dispatcher._active)
    writer.close()
    served.server.engine.gate.set()
    await served.until_idle()
    assert served.server.loop.activity().num_images == 0


async def test_an_idle_connection_stays_for_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.05)
    whole = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    async with web(tmp_path, keep_alive_s=2) as served:
        host, _, port = served.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        async with asyncio.timeout(20):
            for _ in range(3):
                writer.write(whole)
                assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
                await asyncio.sleep(0.3)  # six times as long as a head may take
            assert await reader.read() == b"", "and no longer"
        writer.close()
