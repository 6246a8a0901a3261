"""The MLflow flavour: a model that makes pictures in the process that loads it, for any number of threads at once.

Rows of a frame, and of several frames at once, share the batch. Settings are environment variables, as for `mii_serve deploy`;
those of ports, keys and replicas have no use here. Content safety, where it is configured, checks texts before any work and
pictures before they leave. `cli/export_mlflow.py` writes such models; `pyfunc_entry.py` is the script that MLflow runs.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import threading
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mii_serve.config import DeployConfig
from mii_serve.errors import ContentBlockedError
from mii_serve.provenance import Provenance
from mii_serve.replica.local import build_loop, build_warm_engine
from mii_serve.safety.azure import open_moderator
from mii_serve.safety.moderation import Moderator
from mii_serve.types import ImageReady, OutputOptions, RequestedParams, ResolvedRequest, draw_seed, gather

COLUMNS = ("prompt", "generated_image", "nsfw_content_detected")
OUTPUT_VARIABLE = "AZUREML_BI_OUTPUT_PATH"
"""The folder of an Azure ML batch job: where it is set, pictures are files there, and rows have their names."""
BLOCKED_FILE = "Blocked By Azure AI Content Safety"
MAX_IN_FLIGHT = 64
"""Rows at once, so that the memory for pictures does not grow with a frame."""


@dataclass(frozen=True, slots=True)
class Made:
    """A picture of a row; `encoded` is None where content safety blocked it."""

    encoded: bytes | None
    nsfw: bool | None


class TextToImage:
    """A loaded model."""

    def __init__(self, folder: Path, output: Path | None = None) -> None:
        """Pictures are files in `output` where it is given.

        Raises:
            ConfigError, ModelError: as `mii_serve deploy` would.
        """
        config = DeployConfig.load({"model": str(folder)})
        self._output = output
        self._engine_thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._engine = self._engine_thread.submit(build_warm_engine, config).result()
        self._loop = asyncio.new_event_loop()
        self._left = contextlib.AsyncExitStack()
        self._in_flight = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._thread = threading.Thread(target=self._loop.run_forever, name="mii-serve-model", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(config), self._loop).result()

    async def _start(self, config: DeployConfig) -> None:
        self._moderator: Moderator | None = await self._left.enter_async_context(open_moderator(config.content_safety))
        self._replica = build_loop(config, self._engine, self._engine_thread, Provenance.of(config.provenance))
        self._turns = asyncio.create_task(self._replica.run())

    def predict(self, prompts: Sequence[str], parameters: Mapping[str, Any]) -> list[tuple[str, str, bool | None]]:
        """A row for each picture, in the order of the prompts, with the values of `COLUMNS`.

        Raises:
            InvalidRequestError: naming the parameter and the rule; no picture of any prompt was kept.
            MiiServeError: the pictures cannot be made, or content safety gives no verdict.
        """
        made = asyncio.run_coroutine_threadsafe(self._make_all(prompts, parameters), self._loop).result()
        return [
            (prompt, self._shown(picture), picture.nsfw)
            for prompt, pictures in zip(prompts, made, strict=True)
            for picture in pictures
        ]

    def close(self) -> None:
        """Free the model."""

        async def stop() -> None:
            self._turns.cancel()
            await asyncio.gather(self._turns, return_exceptions=True)
            await self._left.aclose()

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._engine_thread.submit(self._engine.close).result()
        self._engine_thread.shutdown()

    def _shown(self, picture: Made) -> str:
        if self._output is None:
            return "" if picture.encoded is None else base64.b64encode(picture.encoded).decode()
        if picture.encoded is None:
            return BLOCKED_FILE
        name = f"image_{uuid.uuid4()}.png"
        self._output.mkdir(parents=True, exist_ok=True)
        (self._output / name).write_bytes(picture.encoded)
        return name

    async def _make_all(self, prompts: Sequence[str], parameters: Mapping[str, Any]) -> list[list[Made]]:
        try:
            async with asyncio.TaskGroup() as tasks:
                rows = [tasks.create_task(self._make({**parameters, "prompt": prompt})) for prompt in prompts]
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        return [row.result() for row in rows]

    async def _make(self, values: Mapping[str, Any]) -> list[Made]:
        params = self._engine.capabilities.resolve(RequestedParams(**values), fallback_seed=draw_seed())
        async with self._in_flight:
            try:
                if self._moderator is not None:
                    await self._moderator.check_texts(params.prompt, params.negative_prompt)
            except ContentBlockedError:
                return [Made(None, None)] * params.num_images_per_prompt
            request = ResolvedRequest(params=params, output=OutputOptions())
            async with contextlib.aclosing(self._replica.generate(uuid.uuid4().hex, request)) as events:
                answer = gather([event async for event in events])
            return [await self._checked(image) for image in answer.images]

    async def _checked(self, image: ImageReady) -> Made:
        if self._moderator is not None:
            from mii_serve.safety.pictures import is_scannable, scannable

            file = image.encoded
            if not is_scannable(file, image.format, image.width, image.height):
                file = await asyncio.to_thread(scannable, file, image.format, image.width, image.height)
            if (await self._moderator.check_image(file)).is_blocked:
                return Made(None, image.nsfw_content_detected)
        return Made(image.encoded, image.nsfw_content_detected)


def output_folder() -> Path | None:
    """Where an Azure ML batch job wants its pictures."""
    given = os.environ.get(OUTPUT_VARIABLE, "").strip()
    return Path(given) if given else None
