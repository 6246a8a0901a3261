"""Takes the pictures of the page that the documentation shows, of a deployment of the built-in model, in a real Chromium.

python tools/screenshot_page.py http://127.0.0.1:5001 [--out docs/images]
"""

from __future__ import annotations

import argparse
import io
import os
from pathlib import Path

from chromium import chromium_path
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

HUNG = (
    ("a green star on a purple background", 3),
    ("a yellow moon above a blue house", 11),
    ("two pink hearts on a white background", 5),
    ("a white skull on a black background", 2),
    ("an orange tree on a cyan background", 8),
    ("a red ring and a blue diamond on a yellow background", 4),
    ("a small black cross on a green background", 9),
)
LAST = ("a yellow star above a red house", 11)
NOT_SHOWN = {"page_idle_light", "page_running_light", "page_idle_phone", "page_mask_light"}
DESKTOP, PHONE = {"width": 1280, "height": 860}, {"width": 390, "height": 844}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    sandbox = [] if os.geteuid() else ["--no-sandbox"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=sandbox)
        take(browser, arguments.url, arguments.out, "dark", DESKTOP, "")
        take(browser, arguments.url, arguments.out, "light", DESKTOP, "_light")
        take(browser, arguments.url, arguments.out, "dark", PHONE, "_phone")
        browser.close()


def take(browser: Browser, url: str, out: Path, scheme: str, size: dict[str, int], suffix: str) -> None:
    is_phone = size is PHONE
    page = browser.new_page(
        viewport=size,  # type: ignore[arg-type]
        color_scheme=scheme,  # type: ignore[arg-type]
        device_scale_factor=2 if is_phone else 1,
        has_touch=is_phone,
        is_mobile=is_phone,
    )
    page.goto(url)
    page.wait_for_selector("#scheduler option", state="attached")
    expect(page.locator("#rate-text")).not_to_have_text("–")
    save(page, out / f"page_idle{suffix}.webp")
    for prompt, seed in HUNG:
        draw(page, prompt, seed, 20)
        expect(page.locator("#generate")).to_have_attribute("aria-disabled", "false", timeout=60_000)
    draw(page, *LAST, 40, "euler")
    fifth = page.locator("body:has(#running:not([hidden])) #film-pictures img").nth(4)
    fifth.wait_for(state="attached", timeout=60_000)
    save(page, out / f"page_running{suffix}.webp")
    expect(page.locator("#generate")).to_have_attribute("aria-disabled", "false", timeout=60_000)
    page.evaluate("scrollTo(0, 0)")
    draw(page, *LAST, 20)
    expect(page.locator("#inspector")).to_be_visible(timeout=60_000)
    page.wait_for_timeout(1200)
    save(page, out / f"page_finished{suffix}.webp")
    paint(page)
    save(page, out / f"page_mask{suffix}.webp")
    page.close()


def draw(page: Page, prompt: str, seed: int, num_inference_steps: int, scheduler: str = "dpm++_2m") -> None:
    page.fill("#prompt", prompt)
    page.fill("#seed", str(seed))
    page.fill("#num_inference_steps", str(num_inference_steps))
    page.select_option("#scheduler", scheduler)
    page.click("#generate")


def paint(page: Page) -> None:
    """A mask over the upper half of the picture that is shown."""
    page.click("#use-image")
    page.click("#mask-paint")
    box = page.locator("#mask").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 0.25 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 0.3 * box["height"], steps=5)
    page.mouse.up()


def save(page: Page, path: Path) -> None:
    if path.stem in NOT_SHOWN:
        return
    with Image.open(io.BytesIO(page.screenshot())) as image:
        image.save(path, quality=90, method=6)
    print(f"{path} {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
