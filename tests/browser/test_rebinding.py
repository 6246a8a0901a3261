"""A page of another site, in a real browser, whose name has come to mean this machine."""

from __future__ import annotations

import os

import pytest
import pytest_asyncio
from chromium import chromium_path
from fake_engine import FakeEngine
from playwright.async_api import async_playwright
from sites import NO_CHROMIUM, site_of

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
