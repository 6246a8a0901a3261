"""The page of a real deployment of the built-in model, in a real Chromium."""

from __future__ import annotations

import base64
import io
import os
import socket

import pytest
from chromium import chromium_path
from deployments import deployed, until
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from mii_serve.client import Client

PROMPT = "a yellow star on a blue background"


def test_a_person_watches_a_picture_come_out_of_the_noise(deployment):
    if (path := chromium_path()) is None:
        pytest.skip("no Chromium on this machine: tools/install_chromium.sh says what it tried")
    sandbox = [] if os.geteuid() else ["--no-sandbox"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=sandbox)
        page = browser.new_page()
        complaints = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.goto(f"http://{deployment.http}/")
        expect(page.locator("#model")).to_have_text("demo · native fp32 on cpu")
        page.fill("#prompt", PROMPT)
        page.fill("#seed", "7")
        # every source the picture ever has, written down in the page itself: a preview may be there for a moment only
        page.evaluate(
            """() => {
                window.seen = new Set();
                const look = () => document.querySelectorAll("#frames img").forEach((image) => window.seen.add(image.src));
                new MutationObserver(look).observe(document.querySelector("#frames"),
                                                   {subtree: true, childList: true, attributes: true});
            }"""
        )
        page.click("#generate")
        expect(page.locator("#inspector")).to_be_visible(timeout=60_000)
        assert len(page.evaluate("[...window.seen]")) >= 3, "no previews, or all the same"
        shots = page.locator("#film-pictures img").evaluate_all(
            """async (images) => {
                const canvas = document.createElement("canvas");
                canvas.width = canvas.height = 64;
                return Promise.all(images.map(async (image) => {
                    await image.decode();
                    canvas.getContext("2d").drawImage(image, 0, 0);
                    return canvas.toDataURL("image/png");
                }));
            }"""
        )
        pictures = [Image.open(io.BytesIO(base64.b64decode(shot.partition(",")[2]))).convert("RGB") for shot in shots]
        with Client(deployment.grpc) as client:
            told = client.generate(PROMPT, seed=7).images[0]
        away = [_distance(picture, told) for picture in pictures]
        assert away[-1] == 0, "the page's picture is the one that gRPC gives"
        assert away[0] > away[len(away) // 2] > 0, f"the previews do not sharpen: {away}"
        assert not complaints
        browser.close()


def _distance(one: Image.Image, other: Image.Image) -> float:
    pairs = zip(one.tobytes(), other.tobytes(), strict=True)
    return sum(abs(a - b) for a, b in pairs) / (3 * one.width * one.height)


def test_the_end_waits_for_no_page_that_takes_in_nothing():
    """The caller has asked for much and reads none of it."""
    with (
        deployed("demo", env={"MII_SERVE_DRAIN_TIMEOUT_S": "1"}, has_model=False) as running,
        socket.create_connection(address(running.http)) as line,
        Client(running.grpc) as client,
    ):
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = b'{"prompt": "a star", "num_images_per_prompt": 16, "num_inference_steps": 999, "scheduler": "euler"}'
        head = (
            "POST /ui/generate HTTP/1.1",
            "host: localhost",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "",
            "",
        )
        line.sendall("\r\n".join(head).encode() + body)
        until(lambda: client.server_info().activity.num_running > 0, "it is at work")
        assert running.stop() == 0


def address(http: str) -> tuple[str, int]:
    host, _, port = http.rpartition(":")
    return host, int(port)
