"""What the README tells people to type works, and the files it points to exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from deployments import deployed
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TOP = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
PAGES = sorted([*(ROOT / name for name in TOP), ROOT / "deployment" / "README.md", *(ROOT / "docs").rglob("*.md")])


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_readmes_python_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = code_blocks(ROOT / "README.md", "python")
    assert len(blocks) == 3
    Image.new("L", (64, 64), 255).save("mask.png")
    with deployed("demo") as running:
        code = "\n".join(blocks).replace("127.0.0.1:50050", running.grpc)
        names: dict[str, object] = {}
        try:
            exec(compile(code, "README.md", "exec"), names)
        finally:
            names["pipe"].close()
    assert (tmp_path / "circle.png").is_file()
    assert (tmp_path / "star.png").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_a_heading_find_it(page):
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)", page.read_text()):
        headings = re.findall(r"^#+ (.*)$", (page.parent / link if link else page).read_text(), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], (link, anchor)


def test_the_limits_in_the_docs_are_the_limits_in_the_code():
    from mii_serve.types import Limits

    page = (ROOT / "docs" / "architecture" / "03-wire.md").read_text()
    limits = Limits()
    assert f"1 to {limits.max_prompt_chars} characters" in page
    assert f"1 to {limits.max_num_inference_steps}, fewer" in page
    assert f"finite, 0 to {limits.max_guidance_scale:g};" in page
    assert f"from {limits.min_size_px} to {limits.max_size_px}," in page
    assert f"| `num_images_per_prompt` | 1 to {limits.max_images_per_prompt} |" in page
