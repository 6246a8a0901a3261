"""One browser for all tests of the page; a server for each."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from chromium import chromium_path
from fake_engine import FakeEngine
from playwright.async_api import Browser, async_playwright
from sites import NO_CHROMIUM, Site, UnhurriedEngine, site_of


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def browser() -> AsyncIterator[Browser]:
    if (path := chromium_path()) is None:
        pytest.skip(NO_CHROMIUM)
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium's own does not run as root
    async with async_playwright() as playwright:
        launched = await playwright.chromium.launch(executable_path=path, args=sandbox)
        yield launched
        await launched.close()


@pytest_asyncio.fixture(loop_scope="session")
async def site(browser, tmp_path) -> AsyncIterator[Site]:
    async with site_of(browser, tmp_path, FakeEngine(max_slots=2)) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def unhurried_site(browser, tmp_path) -> AsyncIterator[Site]:
    async with site_of(browser, tmp_path, UnhurriedEngine(max_slots=2)) as running:
        yield running
