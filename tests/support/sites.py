"""A real headless Chromium before a whole server in this process; only the engine is a fake, which a test can hold still."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from axe_playwright_python.async_playwright import Axe
from fake_engine import FakeEngine
from patience import PATIENCE_S
from playwright.async_api import Browser, ConsoleMessage, Page, expect
from servers import RunningServer, running_server

from mii_serve.config import DeployConfig
from mii_serve.gateway.app import serve_http
from mii_serve.safety.moderation import Moderator
from mii_serve.server.keys import KeyRing
from mii_serve.types import SampleProgress, StepPlan

DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
PATIENCE_MS = 1000 * PATIENCE_S
NO_CHROMIUM = "no Chromium on this machine: tools/install_chromium.sh says what it tried; CHROMIUM=/path names one"


expect.set_options(timeout=PATIENCE_MS)


class UnhurriedEngine(FakeEngine):
    """Slow enough for a person, or a test, to do something meanwhile."""

    def run(self, plan: StepPlan) -> tuple[SampleProgress, ...]:
        time.sleep(0.03)
        return super().run(plan)


@dataclass
class Site:
    """The server, where its page is, and everything the browser was told that it should not have to be told."""

    server: RunningServer
    url: str
    browser: Browser
    complaints: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    pages: list[Page] = field(default_factory=list)

    async def open(self, size: dict[str, int] = DESKTOP, *, wait: bool = True, **options) -> Page:
        page = await self.browser.new_page(viewport=size, **options)
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self._note(request.url))
        self.pages.append(page)
        await page.goto(self.url)
        if wait:
            await page.wait_for_selector("#scheduler option", state="attached")
        return page

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _note(self, url: str) -> None:
        if not url.startswith((self.url, "blob:")):
            self.foreign.append(url)


@contextlib.asynccontextmanager
async def site_of(
    browser: Browser,
    folder,
    engine: FakeEngine,
    keys: KeyRing | None = None,
    moderator: Moderator | None = None,
    *,
    has_jobs: bool = False,
) -> AsyncIterator[Site]:
    config = DeployConfig.load({"http_port": 0, **({"jobs_folder": str(folder / "jobs")} if has_jobs else {})})
    async with running_server(folder, engine, max_waiting_samples=64, moderator=moderator) as server:
        server.dispatcher.grpc_port = int(server.target.rpartition(":")[2])
        async with serve_http(config, server.dispatcher, keys or KeyRing()) as address:
            site = Site(server, f"http://{address}", browser)
            try:
                yield site
            finally:
                engine.gate.set()
                for page in site.pages:
                    await page.close()
            if sys.exc_info()[0] is None:
                assert not site.complaints, site.complaints
                assert not site.foreign, site.foreign


async def violations(page: Page) -> list[str]:
    """What axe objects to."""
    answer = await Axe().run(page)
    assert len(answer.response["passes"]) > 20, "axe has not looked"
    return [
        f"{one['id']} ({one['impact']}): {[node['target'] for node in one['nodes']]}" for one in answer.response["violations"]
    ]
