"""A page of another site, in a real browser, whose name has come to mean this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from chromium import chromium_path
from fake_engine import FakeEngine
from playwright.async_api import async_playwright
from sites import NO_CHROMIUM, site_of
from web import web

pytestmark = pytest.mark.asyncio(loop_scope="session")
FOREIGN = "evil.example"

ASK = """async ([path, body, type]) => {
    const options = body === null ? {} : {method: "POST", body, headers: type ? {"content-type": type} : {}};
    try { const answer = await fetch(path, options); return [answer.status, await answer.text()]; }
    catch (error) { return [0, String(error)]; }
}"""
BODIES = {
    "/": '{"inputs": "a"}',
    "/v1/images/generations": '{"prompt": "a"}',
    "/ui/generate": '{"prompt": "a"}',
    "/score": "{}",
}


@pytest_asyncio.fixture(loop_scope="session")
async def misled(browser):
    """A browser for which the other site's name is this machine: what a rebinding name server brings about."""
    sandbox = [] if os.geteuid() else ["--no-sandbox"]
    if (path := chromium_path()) is None:
        pytest.skip(NO_CHROMIUM)
    async with async_playwright() as playwright:
        rule = f"--host-resolver-rules=MAP {FOREIGN} 127.0.0.1"
        launched = await playwright.chromium.launch(executable_path=path, args=[*sandbox, rule])
        yield launched
        await launched.close()


async def test_a_rebound_name_reaches_nothing(misled, tmp_path):
    async with site_of(misled, tmp_path, FakeEngine()) as site:
        port = site.url.rpartition(":")[2]
        page = await misled.new_page()
        site.pages.append(page)
        answer = await page.goto(f"http://{FOREIGN}:{port}/livez")
        assert answer is not None and answer.status == 421
        for path in ("/", "/ui/state", "/v1/models", "/metrics"):
            assert (await page.evaluate(ASK, [path, None, None]))[0] == 421
        for path, body in BODIES.items():
            status, text = await page.evaluate(ASK, [path, body, "application/json"])
            assert status == 421 and "host" in text
        assert site.server.loop.activity().num_requests == 0
        own = await site.open()
        assert (await own.evaluate(ASK, ["/ui/state", None, None]))[0] == 200


async def test_another_sites_page_cannot_ask_by_address_either(misled, tmp_path):
    async with site_of(misled, tmp_path, FakeEngine()) as site:
        page = await misled.new_page()
        site.pages.append(page)
        await page.goto("data:text/html,<title>other</title>")
        for path, body in BODIES.items():
            for kind in ("application/json", "text/plain", None):
                assert (await page.evaluate(ASK, [site.url + path, body, kind]))[0] == 0, "the browser shows it nothing"
        assert site.server.loop.activity().num_requests == 0, "and nothing was done"


ASK_ACROSS = """async ([url, body]) => {
    const options = {method: "POST", body, headers: {"content-type": "application/json", "api-key": "any"}};
    try {
        const answer = await fetch(url, options);
        const [seed, id] = ["x-mii-seed", "x-request-id"].map((name) => answer.headers.get(name));
        return [answer.status, seed, id, (await answer.blob()).type];
    } catch (error) { return [0, String(error)]; }
}"""


@contextlib.asynccontextmanager
async def other_site() -> AsyncIterator[int]:
    """The port of another server on this machine, whose pages are empty."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def test_a_page_of_an_origin_that_the_operator_names_can_ask_and_read(misled, tmp_path):
    async with other_site() as port, web(tmp_path, cors_origins=[f"http://{FOREIGN}:{port}"]) as served:
        page = await misled.new_page()
        await page.goto(f"http://{FOREIGN}:{port}/")
        body = '{"inputs": "a", "parameters": {"seed": 7}}'
        status, seed, request_id, kind = await page.evaluate(ASK_ACROSS, [f"http://{served.address}/", body])
        assert (status, seed, kind) == (200, "7", "image/png") and request_id
        assert (await page.evaluate(ASK_ACROSS, [f"http://{served.address}/", "{}"]))[0] == 400, "refusals are read, too"
        rebound = f"http://{FOREIGN}:{served.address.rpartition(':')[2]}/"
        assert (await page.evaluate(ASK_ACROSS, [rebound, body]))[0] == 0, "its own name is no name of this server"
        await page.goto(f"http://localhost:{port}/")
        assert (await page.evaluate(ASK_ACROSS, [f"http://{served.address}/", body]))[0] == 0, "another origin"
        await page.close()
        assert served.server.loop.activity().num_requests == 1
