"""LoRAs of a running replica: read beside the turns, added and removed between two of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mii_serve.engine import Engine, LoraEngine, Loras
from mii_serve.errors import InvalidRequestError, ModelError, UnsupportedError
from mii_serve.types import LoraInfo


class ReplicaLoras:
    """All methods are for the loop's thread."""

    def __init__(self, engine: Engine, engine_thread: ThreadPoolExecutor, used: Callable[[], set[str]]) -> None:
        """`used` gives the revisions that requests in flight need."""
        self._loras: Loras | None = engine.loras if isinstance(engine, LoraEngine) else None
        self._engine_name = engine.description.engine
        self._engine_thread = engine_thread
        self._used = used
        self._has_removed = False

    async def load(self, name: str, path: Path) -> LoraInfo:
        """
        Raises:
            InvalidRequestError: the files cannot be used.
            UnsupportedError: this engine computes no LoRAs, or not those that come at run time.
        """
        if (loras := self._loras) is None:
            raise UnsupportedError(f"the {self._engine_name} engine takes no LoRAs at run time; see the page about LoRAs")
        try:
            adapter = await asyncio.to_thread(loras.load, name, path)
            return await asyncio.get_running_loop().run_in_executor(self._engine_thread, loras.add, adapter)
        except ModelError as error:
            raise InvalidRequestError("path", str(error).removeprefix("lora: ")) from error

    async def remove(self, name: str) -> None:
        if self._loras is not None:
            await asyncio.get_running_loop().run_in_executor(self._engine_thread, self._loras.remove, name)
            self._has_removed = True
            self.forget_unused()

    def forget_unused(self) -> None:
        """Free what was removed, once no request in flight needs it. Called whenever one has ended."""
        if self._has_removed and self._loras is not None:
            used = self._used()
            self._has_removed = bool(used)
            self._engine_thread.submit(self._loras.forget_unused, used)
