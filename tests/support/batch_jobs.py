"""Inputs and servers for batch jobs: each picture is a small PNG whose colour is a function of its prompt and seed."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image
from scripted_server import done, effective, num_images

from mii_serve.types import Event, GenerationRequest, ImageReady

PROMPT = "a circle, number {}"


def jsonl(path: Path, rows: int | list[dict[str, Any]]) -> Path:
    """Rows in our own format; a number makes so many."""
    if isinstance(rows, int):
        rows = [{"prompt": PROMPT.format(n)} for n in range(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def picture(prompt: str, seed: int, file_format: str = "PNG") -> bytes:
    colour = hashlib.sha256(f"{prompt} {seed}".encode()).digest()
    file = io.BytesIO()
    Image.new("RGB", (16, 8), (colour[0], colour[1], colour[2])).save(file, file_format)
    return file.getvalue()


def pictures(request: GenerationRequest) -> Iterator[Event]:
    """What a healthy server says to those who want the images at once."""
    params, count = request.params, num_images(request)
    for index in range(count):
        seed = (params.seed or 0) + index
        yield ImageReady(
            image_index=index,
            encoded=picture(params.prompt, seed, request.output.format.name),
            format=request.output.format,
            height=8,
            width=16,
            seed=seed,
            nsfw_content_detected=False,
        )
    yield done(replace(effective(request), num_images_per_prompt=count))


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "mii_serve", "batch", *map(str, arguments)]


def ran(*arguments: object, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, to its end."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False, env=env)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def assert_whole(folder: Path, num_rows: int) -> list[dict[str, Any]]:
    """Every row has its pictures, none twice, each the one of its prompt and seed, and nothing else lies there."""
    index = lines_of(folder / "index.jsonl")
    assert [line["row"] for line in index if line["image"] == 0] == list(range(num_rows))
    assert len({line["file"] for line in index}) == len(index)
    on_disk = {path.relative_to(folder).as_posix() for path in (folder / "pictures").rglob("*") if path.is_file()}
    assert on_disk == {line["file"] for line in index}
    assert not list((folder / "parts").iterdir())
    for line in index:
        content = (folder / line["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == line["sha256"] and len(content) == line["bytes"]
        assert content == picture(line["prompt"], line["seed"])
    return index
