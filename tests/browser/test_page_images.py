"""The page's image to start from: chosen, dropped, pasted or a finished picture; its mask and its strength."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import sys
from dataclasses import replace

import pytest
from fake_engine import FakeEngine
from outside import ROOT
from patience import PATIENCE_S
from PIL import Image
from playwright.async_api import Page, expect
from sites import DESKTOP, PHONE, Site, site_of, violations

pytestmark = pytest.mark.asyncio(loop_scope="session")
IMAGE = Image.linear_gradient("L").resize((96, 64)).convert("RGB")


def file(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


async def choose(page: Page, content: bytes, name: str = "room.png") -> None:
    await page.set_input_files("#image-file", {"name": name, "mimeType": "image/png", "buffer": content})
    await expect(page.locator("#start-chosen")).to_be_visible()


async def draw(page: Page, prompt: str = "") -> None:
    num_before = await page.locator("#gallery img").count()
    await page.fill("#prompt", prompt)
    await page.click("#generate")
    await expect(page.locator("#gallery img")).to_have_count(num_before + 1)
    await expect(page.locator("#inspector")).to_be_visible()


async def facts(page: Page) -> dict[str, str]:
    rows = await page.locator("#parameters > div").all_inner_texts()
    return dict(row.split("\n", 1) for row in rows)


def joined(site: Site) -> list:
    return [sample for plan in site.server.engine.plans for sample in plan.joins]


async def brought(page: Page, event: str, content: bytes, kind: str = "image/png") -> None:
    """The file dropped on the page, or pasted."""
    script = """([event, text, kind]) => {
        const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
        const data = new DataTransfer();
        data.items.add(new File([bytes], "brought.png", { type: kind }));
        const made = event === "drop"
          ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
          : new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true });
        document.body.dispatchEvent(made);
    }"""
    await page.evaluate(script, [event, base64.b64encode(content).decode(), kind])


async def test_an_image_is_sent_as_the_page_shows_it_and_a_result_can_be_the_next(site: Site):
    page = await site.open()
    await choose(page, file(IMAGE))
    assert [await page.input_value(f"#{name}") for name in ("width", "height", "strength")] == ["96", "64", "0.8"]
    await page.fill("#strength", "0.5")
    await draw(page)  # without a prompt
    [sample] = joined(site)
    assert (sample.input_image.rgb, sample.params.strength, sample.params.prompt) == (IMAGE.tobytes(), 0.5, "")
    assert (await facts(page))["Strength"] == "0.5" and "Mask" not in await facts(page)
    await page.fill("#prompt", "one more")
    await page.click("#use-image")
    await expect(page.locator("#image-shown")).to_have_attribute("aria-label", re.compile("seed"))
    async with page.expect_download() as downloading:
        await page.click("#download")
    made = Image.open(await (await downloading.value).path()).convert("RGB")
    await page.fill("#width", "192")  # the second request of a hires fix
    await draw(page, "one more")
    assert joined(site)[-1].input_image.rgb == made.resize((192, 64), Image.Resampling.LANCZOS).tobytes()
    await page.click("#image-remove")
    await draw(page, "a")
    assert joined(site)[-1].input_image is None and await page.locator("#files").is_hidden()


async def test_what_a_camera_and_a_designer_send_is_made_plain(site: Site):
    page = await site.open()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    await choose(page, file(IMAGE.resize((2400, 1600)), "JPEG", exif=exif), "photo.jpg")
    assert [await page.input_value(f"#{name}") for name in ("width", "height")] == ["680", "1024"]
    clear = IMAGE.convert("RGBA")
    clear.putalpha(0)
    await brought(page, "drop", file(clear))
    await expect(page.locator("#image-shown")).to_have_attribute("aria-label", "The image to start from: brought.png")
    await draw(page, "a")
    assert joined(site)[-1].input_image.rgb == Image.new("RGB", IMAGE.size, "white").tobytes()
    await brought(page, "paste", file(IMAGE))
    await expect(page.locator("#strength")).to_have_value("0.8")
    await draw(page, "a")
    assert joined(site)[-1].input_image.rgb == IMAGE.tobytes()
    await brought(page, "drop", b"%PDF", "application/pdf")
    await expect(page.locator("#image-error")).to_have_text("The image must be an image file")
    await page.set_input_files("#image-file", {"name": "x.png", "mimeType": "image/png", "buffer": b"no image"})
    await expect(page.locator("#image-error")).to_have_text("The image cannot be read by this browser (x.png)")


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
async def test_a_mask_is_painted_and_the_code_makes_the_same_picture(site: Site, size, tmp_path):
    page = await site.open(size, reduced_motion="reduce")
    await choose(page, file(IMAGE))
    await page.click("#mask-paint")
    await page.fill("#brush-size", "30")
    box = await page.locator("#mask").bounding_box()
    assert box is not None and box["width"] > 150
    await page.mouse.move(box["x"] + 2, box["y"] + box["height"] / 2)
    await page.mouse.down()
    await page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2, steps=4)
    await page.mouse.up()
    assert await page.input_value("#strength") == "1"
    found = {"painting": await violations(page)}
    await page.focus("#mask")
    for _ in range(24):
        await page.keyboard.press("ArrowRight")
    await page.keyboard.press("Space")
    await draw(page, 'it\'s a "door"')
    [sample] = joined(site)
    mask = Image.frombytes("L", IMAGE.size, sample.input_image.mask)
    assert [mask.getpixel(at) for at in ((10, 32), (50, 32), (90, 32), (10, 2))] == [255, 0, 255, 0]
    assert sample.params.has_mask and (await facts(page))["Mask"] == "painted parts only"
    found["finished"] = await violations(page)
    assert not any(found.values()), found
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    if size is PHONE:
        return
    for name in ("image", "mask_image"):
        async with page.expect_download() as downloading:
            await page.click(f"#file-{name}")
        download = await downloading.value
        await download.save_as(tmp_path / download.suggested_filename)
    openai = ROOT / ".clients" / "openai" / "bin" / "python"
    for name, *command in (("python", sys.executable, "-c"), ("curl", "sh", "-c"), ("openai", sys.executable, "-c")):
        await page.click(f"#tab-{name}")
        code = await page.locator("#code").text_content()
        if name == "openai":  # its environment has no Pillow: the mask's part runs here, the rest there
            ahead, rest = code.split("# In this API's mask")[1].partition("client = ")[::2]
            exec(
                "from PIL import Image, ImageOps\n#"
                + ahead.replace('"mask.png"', f'r"{tmp_path}/mask.png"').replace(
                    '"transparent.png"', f'r"{tmp_path}/transparent.png"'
                )
            )
            code = "import base64\nfrom openai import OpenAI\nclient = " + rest
            command = [str(openai), "-c"]
        (tmp_path / "picture.png").unlink(missing_ok=True)
        ran = await asyncio.create_subprocess_exec(*command, code, cwd=tmp_path, stderr=asyncio.subprocess.PIPE)
        _, said = await asyncio.wait_for(ran.communicate(), PATIENCE_S)
        assert ran.returncode == 0, said.decode()
        again = joined(site)[-1]
        assert (again.input_image, again.params) == (sample.input_image, sample.params), name


async def test_a_mask_is_erased_cleared_and_refused_by_name(site: Site):
    page = await site.open()
    await choose(page, file(IMAGE))
    await page.click("#mask-paint")
    await page.keyboard.press("Space")
    await expect(page.locator("#mask-clear")).to_be_visible()
    await page.click("#mask-clear")
    assert await page.input_value("#strength") == "0.8"
    await page.fill("#strength", "2")
    await page.fill("#prompt", "a")
    await page.keyboard.press("Control+Enter")
    await expect(page.locator("#strength-error")).to_have_text("Strength must be a finite number in [0, 1], got 2.0")
    assert await page.evaluate("document.activeElement.id") == "strength"
    await page.fill("#strength", "0.5")
    await draw(page, "a")
    assert joined(site)[-1].input_image.mask is None
    site.complaints[:] = [text for text in site.complaints if "status of 400" not in text]


class InpaintingEngine(FakeEngine):
    @property
    def capabilities(self):
        return replace(super().capabilities, needs_mask=True)


async def test_a_model_that_needs_a_mask_asks_for_it(browser, tmp_path):
    async with site_of(browser, tmp_path, InpaintingEngine()) as site:
        page = await site.open()
        await expect(page.locator("#start-hint")).to_have_text("this model repaints a part of one")
        await page.fill("#prompt", "a")
        await page.click("#generate")
        await expect(page.locator("#image-error")).to_contain_text("The image is missing: this model repaints")
        await choose(page, file(IMAGE))
        await page.click("#generate")
        await expect(page.locator("#mask_image-error")).to_contain_text("The mask is missing: this model repaints")
        await page.focus("#mask")
        await page.keyboard.press("Space")
        await draw(page, "a")
        assert joined(site)[-1].params.has_mask
        site.complaints[:] = [text for text in site.complaints if "status of 400" not in text]
