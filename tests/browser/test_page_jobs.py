"""The page's list of batch jobs, as a person uses it."""

from __future__ import annotations

import json

import httpx2
import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S
from playwright.async_api import Page, expect
from sites import DESKTOP, PHONE, Site, site_of, violations

from mii_serve.server.keys import KeyRing

pytestmark = pytest.mark.asyncio(loop_scope="session")
KEY = "studio-key-0123456789"


async def begun(site: Site, name: str, num_rows: int, **headers: str) -> str:
    """A job that was begun by a program; its id."""
    members = [{"prompt": f"a circle, number {n}"} for n in range(num_rows)]
    call = {"method": "POST", "url": "/v1/images/generations"}
    lines = "".join(json.dumps({"custom_id": str(n), **call, "body": body}) + "\n" for n, body in enumerate(members))
    async with httpx2.AsyncClient(base_url=f"{site.url}/v1", timeout=PATIENCE_S, headers=headers) as client:
        file = (await client.post("/files", files={"file": (name, lines)}, data={"purpose": "batch"})).json()
        body = {"input_file_id": file["id"], "endpoint": "/v1/images/generations", "completion_window": "24h"}
        return (await client.post("/batches", json=body)).json()["id"]


def row(page: Page, name: str):
    return page.locator("#jobs > li").filter(has=page.get_by_role("heading", name=name))


@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "dark"), (PHONE, "light")], ids=["desktop", "phone"])
async def test_jobs_are_listed_with_their_progress_can_be_cancelled_and_downloaded(browser, tmp_path, size, scheme):
    engine = FakeEngine(max_slots=2)
    async with site_of(browser, tmp_path, engine, has_jobs=True) as site:
        page = await site.open(size, color_scheme=scheme, reduced_motion="reduce")
        await expect(page.locator("#jobs-empty")).to_be_visible()
        await begun(site, "<b>ready</b>.jsonl", 3)
        engine_gate = engine.gate
        await page.reload()
        done = row(page, "<b>ready</b>.jsonl")
        await expect(done).to_contain_text("completed")
        await expect(done).to_contain_text("3 of 3 rows made")
        engine_gate.clear()
        await begun(site, "long.jsonl", 5)
        await page.reload()
        running = row(page, "long.jsonl")
        await expect(running).to_contain_text("running")
        assert await running.locator("progress").evaluate("bar => [bar.value, bar.max]") == [0, 5]
        assert await page.locator("#jobs > li").count() == 2 and not await violations(page)
        assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
        async with page.expect_download() as downloading:
            await done.get_by_role("link", name="Download pictures").click()
        download = await downloading.value
        text = (await download.path()).read_text()
        assert [json.loads(line)["custom_id"] for line in text.splitlines()] == ["0", "1", "2"]
        await running.get_by_role("button", name="Cancel long.jsonl").click()
        await expect(running).to_contain_text("cancelled")
        await expect(running.get_by_role("button")).to_have_count(0)
        await expect(page.locator("#live")).to_have_text("Batch job long.jsonl: cancelled.")
        engine_gate.set()


async def test_a_key_sees_its_own_jobs_and_is_shown_how_to_download(browser, tmp_path):
    (tmp_path / "keys").write_text(f"{KEY} name=studio\nother-key-0123456789 name=other\n")
    (tmp_path / "keys").chmod(0o600)
    async with site_of(browser, tmp_path, FakeEngine(), KeyRing(tmp_path / "keys"), has_jobs=True) as site:
        await begun(site, "mine.jsonl", 1, authorization=f"Bearer {KEY}")
        await begun(site, "theirs.jsonl", 1, authorization="Bearer other-key-0123456789")
        page = await site.open(wait=False)
        await page.fill("#key", KEY)
        await page.keyboard.press("Enter")
        await expect(row(page, "mine.jsonl")).to_contain_text("completed")
        assert await page.locator("#jobs > li").count() == 1
        await page.get_by_text("Download pictures").click()
        await expect(page.locator(".job-file code")).to_contain_text('Bearer $MII_SERVE_API_KEY" http')
        assert not await violations(page) and KEY not in await page.content()
        site.complaints[:] = [text for text in site.complaints if "status of 401" not in text]


async def test_a_server_without_jobs_shows_none(browser, tmp_path):
    async with site_of(browser, tmp_path, FakeEngine()) as site:
        page = await site.open()
        await expect(page.locator("#jobs-card")).to_be_hidden()
        assert (await page.request.get(f"{site.url}/ui/jobs")).status == 404
