"""What this API says of a server: its model, samplers and options, what runs; and `png-info`, which reads an image's texts.

Options belong to the operator: a POST of what they are already is answered as that API does, and any other is refused.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response

from mii_serve.errors import InvalidRequestError, NotFoundError
from mii_serve.gateway.dialects.sdapi.body import NEUTRAL_SETTINGS
from mii_serve.gateway.dialects.sdapi.generate import short_hash
from mii_serve.gateway.dialects.sdapi.samplers import samplers_to_json, schedulers_to_json
from mii_serve.gateway.dialects.sdapi.tasks import Tasks, idle_to_json
from mii_serve.gateway.json_body import JsonObject, shown, validated
from mii_serve.gateway.middleware import HttpCall
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.model_names import ModelNames

Get = Callable[[HttpCall], Awaitable[Response]]

CHECKPOINT = "sd_model_checkpoint"
FIXED_OPTIONS: dict[str, Any] = {
    "samples_format": "png",
    "CLIP_stop_at_last_layers": 1,
    "live_previews_enable": False,
    "show_progress_every_n_steps": 0,
    **{name: values[0] for name, values in NEUTRAL_SETTINGS.items() if name != "forge_additional_modules"},
}
NOTHING: dict[str, Any] = {
    "upscalers": [],
    "latent-upscale-modes": [],
    "sd-vae": [],
    "hypernetworks": [],
    "face-restorers": [],
    "realesrgan-models": [],
    "prompt-styles": [],
    "scripts": {"txt2img": [], "img2img": []},
    "script-info": [],
    "extensions": [],
    "cmd-flags": {"api": True, "nowebui": True},
}
"""Addresses, and the answer of a server that has none of it."""
MAX_TEXT_CHARS = 1024 * 1024
"""Of all texts in a file."""
_FACT = re.compile(r'([\w ()/-]{1,60}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')
_LAST_LINE = re.compile(r"^Steps: \d+, ")


class Descriptions:
    """Answers calls that make nothing."""

    def __init__(self, dispatcher: Dispatcher, names: ModelNames, tasks: Tasks, embeddings: Sequence[str]) -> None:
        """`embeddings` are the words of the deployment that stand for embeddings."""
        self._dispatcher = dispatcher
        self._names = names
        self._tasks = tasks
        self._embeddings = tuple(embeddings)

    def readers(self) -> dict[str, Get]:
        """What answers a GET, by the last part of the address."""
        return {
            **{name: _constant(value) for name, value in NOTHING.items()},
            "schedulers": _constant(schedulers_to_json()),
            "samplers": self.samplers,
            "sd-models": self.models,
            "loras": self.loras,
            "embeddings": self.embeddings,
            "options": self.options,
            "progress": self.progress,
            "memory": self.memory,
        }

    async def samplers(self, call: HttpCall) -> Response:
        return JSONResponse(samplers_to_json(self._dispatcher.capabilities))

    async def models(self, call: HttpCall) -> Response:
        revision = short_hash((await self._names.info()).model_revision)
        return JSONResponse(
            [
                {"title": name, "model_name": name, "hash": revision, "sha256": None, "filename": name, "config": None}
                for name in await self._names.all()
            ]
        )

    async def loras(self, call: HttpCall) -> Response:
        names = sorted(self._dispatcher.loras.known)
        return JSONResponse([{"name": name, "alias": name, "path": name, "metadata": {}} for name in names])

    async def embeddings(self, call: HttpCall) -> Response:
        unknown = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None, "shape": None, "vectors": None}
        return JSONResponse({"loaded": dict.fromkeys(self._embeddings, unknown), "skipped": {}})

    async def options(self, call: HttpCall) -> Response:
        return JSONResponse(await self._options())

    async def set_options(self, call: HttpCall) -> Response:
        """Refuse what would change anything for anybody."""
        if not isinstance(call.body, dict):
            raise InvalidRequestError("body", "must be a JSON object", shown(call.body))
        options = await self._options()
        for name, value in call.body.items():
            if value is None or (name in options and options[name] == value):
                continue
            if name == CHECKPOINT and isinstance(value, str):
                try:
                    await self._names.check(value)
                    continue
                except NotFoundError as error:
                    raise InvalidRequestError(CHECKPOINT, f"cannot be changed: {error}") from None
            rule = "cannot be changed for all callers; a request may say it in override_settings, if it is served"
            raise InvalidRequestError(name[:60], rule, shown(value))
        return JSONResponse(None)

    async def _options(self) -> dict[str, Any]:
        name, revision = (await self._names.all())[0], (await self._names.info()).model_revision
        return {CHECKPOINT: name, "sd_checkpoint_hash": short_hash(revision), **FIXED_OPTIONS}

    async def progress(self, call: HttpCall) -> Response:
        query = call.request.query_params
        own = self._tasks.of(call.context.client, query.get("id_task"))
        if not own:
            return JSONResponse(idle_to_json())
        has_image = query.get("skip_current_image", "false").lower() not in ("true", "1")
        return JSONResponse(own[0].to_json(has_image=has_image), headers={"cache-control": "no-store"})

    async def interrupt(self, call: HttpCall) -> Response:
        """End what this caller alone has asked for."""
        for task in self._tasks.of(call.context.client, call.request.query_params.get("id_task")):
            task.interrupted.set()
        return JSONResponse({})

    async def refresh(self, call: HttpCall) -> Response:
        """There is one model, and it stays."""
        return JSONResponse(None)

    async def memory(self, call: HttpCall) -> Response:
        unavailable = {"error": "unavailable"}
        try:
            page, pages, free = (os.sysconf(name) for name in ("SC_PAGE_SIZE", "SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
        except (ValueError, OSError):  # a system that does not say
            return JSONResponse({"ram": unavailable, "cuda": unavailable})
        ram = {"free": page * free, "used": page * (pages - free), "total": page * pages}
        return JSONResponse({"ram": ram, "cuda": unavailable})

    async def png_info(self, call: HttpCall) -> Response:
        body = validated(PngInfoBody, call.body)
        return JSONResponse(await asyncio.to_thread(_png_info, body.image))


class PngInfoBody(JsonObject):
    image: str


def _constant(value: Any) -> Get:
    async def answer(call: HttpCall) -> Response:
        return JSONResponse(value)

    return answer


def _png_info(text: str) -> dict[str, Any]:
    from mii_serve.gateway.dialects.sdapi.images import decoded  # Pillow is for those who send images
    from mii_serve.safety.input_image import opened

    with opened(decoded(text.strip(), "image"), "image") as file:
        texts = {name: value for name, value in file.info.items() if isinstance(name, str) and isinstance(value, str)}
    if sum(map(len, texts.values())) > MAX_TEXT_CHARS:
        raise InvalidRequestError("image", f"must have at most {MAX_TEXT_CHARS} characters of text")
    info = texts.get("parameters", "")
    return {"info": info, "items": texts, "parameters": facts_of(info)}


def facts_of(info: str) -> dict[str, str]:
    """The facts in a text as `_infotext` writes it."""
    lines = info.strip().split("\n")
    if not _LAST_LINE.match(lines[-1]):
        return {}
    negative = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines) - 1)
    facts = {
        "Prompt": "\n".join(lines[:negative]),
        "Negative prompt": "\n".join(lines[negative:-1]).removeprefix("Negative prompt:").strip(),
    }
    for name, value in _FACT.findall(lines[-1]):
        facts[name.strip()] = value.strip().strip('"')
        if (size := re.fullmatch(r"(\d+)x(\d+)", value.strip())) is not None:
            facts[f"{name.strip()}-1"], facts[f"{name.strip()}-2"] = size[1], size[2]
    return facts
