"""The page as a person uses it."""

from __future__ import annotations

import ast
import asyncio
import json
import re
import shlex
import sys
from dataclasses import replace

import pytest
from fake_engine import MAX_WORDS, FakeEngine
from outside import ROOT
from patience import PATIENCE_S
from PIL import Image
from playwright.async_api import Page, expect
from servers import Turnstile
from sites import DESKTOP, PHONE, Site, UnhurriedEngine, site_of, violations

from mii_serve.gateway.page import messages
from mii_serve.safety.moderation import ModerationVerdict
from mii_serve.server.keys import KeyRing
from mii_serve.types import PARAMETERS, Parameter

pytestmark = pytest.mark.asyncio(loop_scope="session")
HOSTILE = """<img src=x onerror="document.title='owned'"> it's "quoted" \\ ${1} $(2) `3` \u2028 ☃ 😀"""
SIZES = pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])


async def draw(page: Page, prompt: str, **fields: str) -> None:
    await page.fill("#prompt", prompt)
    for name, value in fields.items():
        if name == "scheduler":
            await page.select_option("#scheduler", value)
        else:
            await page.fill(f"#{name}", value)
    await page.click("#generate")


async def draw_to_the_end(page: Page, prompt: str, **fields: str) -> None:
    num_before = await page.locator("#gallery img").count()
    await draw(page, prompt, **fields)
    await expect(page.locator("#gallery img")).to_have_count(num_before + int(fields.get("num_images_per_prompt", "1")))
    await expect(page.locator("#inspector")).to_be_visible()


async def pixels(page: Page, selector: str) -> Image.Image:
    """What an image element shows."""
    script = """(image) => {
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        const context = canvas.getContext("2d");
        context.drawImage(image, 0, 0);
        return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
    }"""
    element = page.locator(selector)
    size = await element.evaluate("async (image) => (await image.decode(), [image.naturalWidth, image.naturalHeight])")
    return Image.frombytes("RGBA", tuple(size), bytes(await element.evaluate(script))).convert("RGB")


async def table(page: Page) -> dict[str, str]:
    rows = await page.locator("#parameters > div").all_inner_texts()
    return dict(row.split("\n", 1) for row in rows)


@SIZES
async def test_a_picture_hangs_with_what_it_was_made_with(site: Site, size):
    page = await site.open(size)
    await draw_to_the_end(page, "a red circle", negative_prompt="blur", seed="7", num_inference_steps="6", guidance_scale="2.5")
    told = await table(page)
    assert told["Steps"] == "6" and told["Guidance"] == "2.5" and told["Scheduler"] == "pndm" and told["Seed"] == "7"
    assert told["Negative prompt"] == "blur" and told["Size"] == "64 × 64" and told["Safety checker"] == "passed"
    assert told["Made by"] == "fake fp32 on cpu"
    assert await page.locator("#frames img").get_attribute("alt") == "a red circle"
    assert (await pixels(page, "#frames img")).size == (64, 64)
    async with page.expect_download() as downloading:
        await page.click("#download")
    download = await downloading.value
    assert download.suggested_filename == "a-red-circle-7.png"
    with Image.open(await download.path()) as image:
        assert json.loads(image.info["mii_serve"])["seed"] == 7
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"


async def test_a_declared_parameter_without_a_control_gets_a_plain_one(site: Site):
    page = await site.open()
    await page.click("#more summary")
    rescale = page.locator("#guidance_rescale")
    await expect(rescale).to_have_value("0")
    assert (await rescale.get_attribute("min"), await rescale.get_attribute("max")) == ("0", "1")
    await draw_to_the_end(page, "a red circle", guidance_rescale="0.5")
    [sample] = (sample for plan in site.server.engine.plans for sample in plan.joins)
    assert sample.params.guidance_rescale == 0.5


async def test_one_that_the_server_does_not_know_is_refused_at_its_place(site: Site, monkeypatch):
    new = Parameter(name="style_count", kind=int, bounds=lambda limits: (0, 11), default=0, help="of no server")
    monkeypatch.setattr(messages, "PARAMETERS", (*PARAMETERS, new))
    page = await site.open()
    await page.click("#more summary")
    await draw(page, "a red circle", style_count="3")
    await expect(page.locator("#style_count-error")).to_have_text(re.compile("^Style count is not known here"))
    site.complaints[:] = [text for text in site.complaints if "status of 400" not in text]


async def test_what_is_left_open_is_the_servers_default_and_told(site: Site):
    page = await site.open()
    await draw_to_the_end(page, "a red circle", num_inference_steps="", guidance_scale="", width="", height="")
    told = await table(page)
    assert told["Steps"] == "4" and told["Guidance"] == "7.5" and told["Size"] == "64 × 64" and told["Seed"].isdigit()


async def test_progress_is_told_and_the_film_shows_how_it_went(unhurried_site: Site):
    site, engine = unhurried_site, unhurried_site.server.engine
    page = await site.open()
    engine.gate = turns = Turnstile()
    await draw(page, "a red circle", num_inference_steps="12")
    await expect(page.locator("#running")).to_be_visible()
    await expect(page.locator("#slots-text")).to_have_text("1 of 2")
    await expect(page.locator("#slots i.on")).to_have_count(1)
    await expect(page.locator("#count-step")).to_have_text("0")
    assert await page.locator("#frames canvas").count() == 1, "before the first preview there is noise"
    turns.let(3)
    await expect(page.locator("#frames img")).to_have_attribute("alt", re.compile(r"^a red circle \(unfinished, step \d+\)$"))
    turns.set()
    await expect(page.locator("#inspector")).to_be_visible()
    assert await page.locator("#progress").evaluate("element => element.value") == 1
    await expect(page.locator("#live")).to_have_text(re.compile(r"^Finished: 1 picture in "))
    shots = page.locator("#film-pictures img")
    assert 2 <= await shots.count() <= 13  # a busy server shows fewer previews than were asked for
    await page.focus("#film-step")
    await page.keyboard.press("Home")
    told = await page.locator("#film-step").get_attribute("aria-valuetext")
    step = re.fullmatch(r"step (\d+) of 12", told)[1]
    assert int(step) < 12
    assert await page.locator("#frames img").get_attribute("alt") == f"a red circle (unfinished, step {step})"
    await page.keyboard.press("End")
    assert await page.locator("#frames img").get_attribute("alt") == "a red circle"


async def test_the_line_is_told_with_how_many_are_ahead(browser, tmp_path):
    async with site_of(browser, tmp_path, FakeEngine(max_slots=1)) as site:
        first, second = await site.open(), await site.open()
        site.server.engine.gate.clear()
        await draw(first, "a red circle", num_images_per_prompt="3")
        await site.server.until(lambda: site.server.loop.activity().num_waiting == 2)
        await draw(second, "a blue circle")
        await expect(second.locator("#where")).to_have_text(re.compile("[123] pictures? ahead"))
        await expect(second.locator("#waiting-text")).to_have_text("3")
        site.server.engine.gate.set()
        await expect(second.locator("#inspector")).to_be_visible()
        await expect(first.locator("#gallery img")).to_have_count(3)


@pytest.mark.parametrize("way", ["button", "escape", "tab"])
async def test_who_leaves_frees_the_slot(unhurried_site: Site, way):
    site = unhurried_site
    page = await site.open()
    await draw(page, "a red circle", num_inference_steps="1000")
    await expect(page.locator("#count-step")).not_to_have_text("0")
    if way == "button":
        await page.click("#cancel")
    elif way == "escape":
        await page.keyboard.press("Escape")
    else:
        await page.close()
    await site.server.until(lambda: site.server.loop.activity().num_running == 0)
    assert site.server.loop.activity().num_cancelled_requests == 1
    if way != "tab":
        await expect(page.locator("#live")).to_have_text("Cancelled.")
        await expect(page.locator("#frames .tag")).to_have_text("cancelled")
        await draw_to_the_end(page, "a red circle", num_inference_steps="4")


@SIZES
async def test_an_error_stands_at_the_field_it_names(site: Site, size):
    page = await site.open(size)
    for name, value, text in (
        ("prompt", " ", "Prompt must not be empty"),
        ("width", "65", "Width must be a multiple of 8 in [64, 1024], got 65"),
        ("height", "8", "Height must be a multiple of 8 in [64, 1024], got 8"),
        ("num_inference_steps", "1001", "Steps must be in [1, 1000], got 1001"),
        ("num_inference_steps", "2.5", "Steps must be a whole number, got 2.5"),
        ("guidance_scale", "-1", "Guidance must be a finite number in [0, 50], got -1"),
        ("seed", "soup", "Seed must be a whole number in [0, 2**64 - 1], got 'soup'"),
        ("seed", "18446744073709551616", "Seed must be at most 18446744073709551615"),
        ("num_images_per_prompt", "17", "Pictures must be in [1, 16], got 17"),
    ):
        before = await page.input_value(f"#{name}")
        await draw(page, "a red circle", **({name: value} if name != "prompt" else {}))
        if name == "prompt":
            await site.server.until(lambda: site.server.loop.activity().num_running == 0)
            await expect(page.locator("#inspector")).to_be_visible()
            await draw(page, value)
        await expect(page.locator(f"#{name}-error")).to_contain_text(text)
        assert await page.locator(f"#{name}").get_attribute("aria-invalid") == "true"
        assert await page.evaluate("document.activeElement.id") == name
        await page.fill(f"#{name}", before)
        await expect(page.locator(f"#{name}-error")).to_be_empty()
    site.complaints[:] = [text for text in site.complaints if "status of 400" not in text]  # Chromium tells of every refusal


async def test_hostile_text_is_text(site: Site):
    page = await site.open()
    await draw_to_the_end(page, HOSTILE, seed="18446744073709551615", negative_prompt=HOSTILE)
    await expect(page.locator("#said")).to_have_text(HOSTILE, use_inner_text=False)
    assert await page.locator("#frames img").get_attribute("alt") == HOSTILE
    assert (await table(page))["Seed"] == "18446744073709551615"
    assert await page.title() == "mii_serve"
    assert await page.locator("main img").evaluate_all("all => all.every((one) => one.src.startsWith('blob:'))")


async def test_the_code_makes_the_same_picture(site: Site, tmp_path):
    """With the hostile prompt, so that every quoting has to hold."""
    page = await site.open()
    fields = {"negative_prompt": HOSTILE, "seed": "18446744073709551615", "num_inference_steps": "3", "scheduler": "lcm"}
    await draw_to_the_end(page, HOSTILE, **fields, num_images_per_prompt="2")
    await page.locator("#frames button").nth(1).click()  # its seed is the next one, which is 0
    expected = {
        "negative_prompt": HOSTILE,
        "height": 64,
        "width": 64,
        "num_inference_steps": 3,
        "guidance_scale": 7.5,
        "guidance_rescale": 0,
        "scheduler": "lcm",
        "seed": 0,
        "eta": 0,
        "prompt_syntax": "plain",
    }
    codes = {}
    for name in ("python", "curl", "openai"):
        await page.click(f"#tab-{name}")
        codes[name] = await page.locator("#code").text_content()

    hung = (await pixels(page, "#frames .chosen img")).tobytes()
    openai = ROOT / ".clients" / "openai" / "bin" / "python"
    assert openai.exists(), "run `make clients`"
    commands = ((sys.executable, "-c", codes["python"]), ("sh", "-c", codes["curl"]), (str(openai), "-c", codes["openai"]))
    for command in commands:
        (tmp_path / "picture.png").unlink(missing_ok=True)
        ran = await asyncio.create_subprocess_exec(*command, cwd=tmp_path, stderr=asyncio.subprocess.PIPE)
        _, said = await asyncio.wait_for(ran.communicate(), PATIENCE_S)
        assert ran.returncode == 0, said.decode()
        with Image.open(tmp_path / "picture.png") as made:
            assert made.convert("RGB").tobytes() == hung

    words = shlex.split(codes["curl"].replace("\\\n", " "))
    assert words[:3] == ["curl", "--fail-with-body", f"{site.url}/"]
    assert json.loads(words[words.index("-d") + 1]) == {"inputs": HOSTILE, "parameters": expected}

    asked = next(
        node
        for node in ast.walk(ast.parse(codes["openai"]))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "client.images.generate"
    )
    keywords = {keyword.arg: ast.literal_eval(keyword.value) for keyword in asked.keywords}
    assert keywords["prompt"] == HOSTILE and keywords["size"] == "64x64" and keywords["model"] == "fake"
    assert keywords["extra_body"] == {name: value for name, value in expected.items() if name not in ("height", "width")}
    assert f'base_url="{site.url}/v1"' in codes["openai"]


async def test_copy_copies(browser, tmp_path):
    async with site_of(browser, tmp_path, FakeEngine()) as site:
        page = await site.open()
        await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        await draw_to_the_end(page, "a red circle")
        await page.click("#tab-curl")
        await page.click("#copy")
        await expect(page.locator("#copy")).to_have_text("Copied")
        assert await page.evaluate("navigator.clipboard.readText()") == await page.locator("#code").text_content()


async def test_a_flagged_picture_is_explained(site: Site):
    page = await site.open()
    await draw_to_the_end(page, "a skull")
    await expect(page.locator("#flagged")).to_contain_text("The safety checker flagged this picture")
    await expect(page.locator("#frames .tag")).to_have_text("flagged")
    await expect(page.locator("#gallery span")).to_have_text("flagged")
    assert (await table(page))["Safety checker"] == "flagged"
    assert (await pixels(page, "#frames img")).getextrema() == ((0, 0), (0, 0), (0, 0))
    await draw_to_the_end(page, "a heart")
    await expect(page.locator("#flagged")).to_be_hidden()


class Strict:
    """A moderator that blocks finished pictures and lets previews pass; it knows them by their number."""

    def __init__(self, num_previews: int) -> None:
        self._num_left = num_previews

    async def check_texts(self, prompt: str, negative_prompt: str) -> None: ...

    async def close(self) -> None: ...

    async def check_image(self, file: bytes) -> ModerationVerdict:
        self._num_left -= 1
        return ModerationVerdict(categories={"Violence": 6} if self._num_left < 0 else {})


@SIZES
async def test_a_picture_that_content_safety_blocked_says_so(browser, tmp_path, size):
    async with site_of(browser, tmp_path, FakeEngine(max_slots=2), moderator=Strict(0)) as site:
        page = await site.open(size)
        await draw_to_the_end(page, "a heart")
        await expect(page.locator("#flagged")).to_contain_text("Content safety blocked this picture")
        await expect(page.locator("#frames .tag")).to_have_text("blocked")
        await expect(page.locator("#gallery span")).to_have_text("blocked")
        await expect(page.locator("#live")).to_contain_text("1 picture blocked by content safety")
        told = await table(page)
        assert told["Content safety"] == "blocked" and "passed" not in told.values()
        assert (await pixels(page, "#frames img")).getextrema() == ((0, 0), (0, 0), (0, 0))
        assert not await violations(page)


async def test_a_picture_that_everybody_let_pass_says_so(browser, tmp_path):
    async with site_of(browser, tmp_path, FakeEngine(max_slots=2), moderator=Strict(1000)) as site:
        page = await site.open()
        await draw_to_the_end(page, "a heart")
        told = await table(page)
        assert (told["Content safety"], told["Safety checker"]) == ("passed", "passed")
        await expect(page.locator("#flagged")).to_be_hidden()


class FlaggingEngine(UnhurriedEngine):
    """Its unfinished pictures are flagged, its finished ones are not."""

    def run(self, plan):
        return tuple(self._flagged(one) for one in super().run(plan))

    def _flagged(self, progress):
        if progress.preview is None:
            return progress
        black = replace(progress.preview, rgb=bytes(len(progress.preview.rgb)), nsfw_content_detected=True)
        return replace(progress, preview=black)


@SIZES
async def test_a_flagged_preview_says_so(browser, tmp_path, size):
    async with site_of(browser, tmp_path, FlaggingEngine(max_slots=2)) as site:
        page = await site.open(size)
        await draw(page, "a heart", num_inference_steps="60")
        await expect(page.locator("#frames .tag")).to_have_text("preview flagged")
        await expect(page.locator("#frames img")).to_have_attribute("alt", re.compile("black: flagged by the safety checker"))
        await expect(page.locator("#where")).to_contain_text("The safety checker flagged this preview")
        assert not await violations(page)
        await expect(page.locator("#inspector")).to_be_visible()
        assert (await table(page))["Safety checker"] == "passed"
        await expect(page.locator("#frames .tag")).to_have_text("")
        await page.focus("#film-step")
        await page.keyboard.press("ArrowLeft")
        await expect(page.locator("#frames .tag")).to_have_text("preview flagged")
        await expect(page.locator("#film-step")).to_have_attribute("aria-valuetext", re.compile("flagged"))
        await page.keyboard.press("ArrowRight")
        await expect(page.locator("#frames .tag")).to_have_text("")


async def test_words_that_did_not_fit_are_told(site: Site):
    page = await site.open()
    await draw_to_the_end(page, " ".join(["word"] * MAX_WORDS + ["and", "a", "tail"]))
    await expect(page.locator("#dropped")).to_contain_text("were not used: and a tail")


async def test_settings_and_seed_come_back_from_the_gallery(site: Site):
    page = await site.open()
    await draw_to_the_end(page, "one", seed="41", num_inference_steps="3", width="128", negative_prompt="blur")
    await page.click("#seed-random")
    await draw_to_the_end(page, "two", num_inference_steps="5", width="64", negative_prompt="", scheduler="lcm")
    drawn = (await table(page))["Seed"]
    await page.click("#seed-reuse")
    assert await page.input_value("#seed") == drawn != "41"
    await page.locator("#gallery button").nth(1).click()
    await expect(page.locator("#said")).to_have_text("one")
    await expect(page.locator("#film")).to_be_hidden()  # films are kept of the last request only
    assert await page.locator("#gallery button").nth(1).get_attribute("aria-pressed") == "true"
    await page.click("#reuse-all")
    names = ("prompt", "seed", "num_inference_steps", "width", "height", "negative_prompt", "scheduler")
    assert [await page.input_value(f"#{name}") for name in names] == ["one", "41", "3", "128", "64", "blur", "pndm"]
    before = (await pixels(page, "#frames img")).tobytes()
    await draw_to_the_end(page, "one")
    assert (await pixels(page, "#frames img")).tobytes() == before


async def test_the_keyboard_is_enough(site: Site):
    page = await site.open()
    await page.keyboard.press("Tab")
    assert await page.evaluate("document.activeElement.className") == "skip"
    await page.keyboard.press("Enter")
    await page.keyboard.press("Tab")
    if await page.evaluate("document.activeElement.id") != "prompt":  # the link has moved the focus to it already
        await page.keyboard.press("Shift+Tab")
    await page.keyboard.type("a red circle")
    await page.keyboard.press("Control+Enter")
    await expect(page.locator("#inspector")).to_be_visible()
    seen = []
    for _ in range(60):
        await page.keyboard.press("Tab")
        seen.append(await page.evaluate("document.activeElement.id || document.activeElement.getAttribute('aria-pressed')"))
        if seen[-1] == "true":
            break
    assert {"generate", "download", "reuse-all", "tab-python", "copy", "code-panel", "film-step"} <= set(seen)
    assert seen[-1] == "true", "the gallery's picture cannot be reached"
    await page.keyboard.press("Enter")
    await page.focus("#tab-python")
    await page.keyboard.press("ArrowRight")
    assert await page.evaluate("document.activeElement.id") == "tab-curl"
    await expect(page.locator("#code")).to_contain_text("curl")


async def test_a_key_is_asked_for_only_where_one_is_wanted_and_stays_in_the_tab(browser, tmp_path):
    (tmp_path / "keys").write_text("studio-key-0123456789 name=studio\n")
    (tmp_path / "keys").chmod(0o600)
    async with site_of(browser, tmp_path, FakeEngine(), KeyRing(tmp_path / "keys")) as site:
        page = await site.open(wait=False)
        await expect(page.locator("#key-form")).to_be_visible()
        await page.fill("#key", "wrong")
        await page.keyboard.press("Enter")
        await expect(page.locator("#key-error")).to_have_text("The server does not know this key.")
        await page.fill("#key", "studio-key-0123456789")
        await page.keyboard.press("Enter")
        await expect(page.locator("#key-form")).to_be_hidden()
        await draw_to_the_end(page, "a red circle")
        assert "studio-key" not in await page.content()
        await expect(page.locator("#code")).to_contain_text('api_key=os.environ["MII_SERVE_API_KEY"]')
        stored = await page.evaluate("[JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie]")
        assert "studio-key" in stored[0] and stored[1:] == ["{}", ""]
        site.complaints[:] = [text for text in site.complaints if "status of 401" not in text]


async def test_a_failure_in_the_middle_is_told(unhurried_site: Site):
    site = unhurried_site
    page = await site.open()
    await draw(page, "a red circle", num_inference_steps="1000")
    await expect(page.locator("#count-step")).not_to_have_text("0")
    engine = site.server.engine
    engine.fail_sample_of(engine.plans[-1].steps[0].request_id)
    await expect(page.locator("#form-error")).to_have_text("told to fail")
    await expect(page.locator("#frames .tag")).to_have_text("not finished")
    await expect(page.locator("#generate")).to_have_attribute("aria-disabled", "false")


@SIZES
@pytest.mark.parametrize("scheme", ["dark", "light"])
async def test_no_accessibility_violations(site: Site, size, scheme):
    page = await site.open(size, color_scheme=scheme, reduced_motion="reduce")
    found = {"idle": await violations(page)}
    await page.fill("#width", "65")
    await page.fill("#prompt", "a skull")
    await page.click("#generate")
    await expect(page.locator("#width-error")).not_to_be_empty()
    found["refused"] = await violations(page)
    site.server.engine.gate.clear()
    await draw(page, "a skull", width="64", num_images_per_prompt="2")
    await expect(page.locator("#running")).to_be_visible()
    found["running"] = await violations(page)
    site.server.engine.gate.set()
    await expect(page.locator("#inspector")).to_be_visible()
    found["finished"] = await violations(page)
    assert not any(found.values()), found
    site.complaints[:] = [text for text in site.complaints if "status of 400" not in text]
