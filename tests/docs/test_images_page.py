"""The code of the page about images runs as it stands."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from fake_engine import FakeEngine
from PIL import Image
from servers import running_server

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architecture" / "22-images.md"


async def test_hires_fix_is_two_requests(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    async with running_server(tmp_path, FakeEngine()) as server:
        await asyncio.to_thread(exec, code.replace("127.0.0.1:50050", server.target), {})
        first, second = (sample for plan in server.engine.plans for sample in plan.joins)
    assert (first.input_image, first.params.width) == (None, 512)
    assert (len(second.input_image.rgb), second.params.strength) == (1024 * 1024 * 3, 0.5)
    with Image.open("lighthouse.png") as made:
        assert made.size == (1024, 1024)
