"""LoRAs at run time: loaded, listed and removed on all replicas at once, and again on a replica that comes back.

Requests that are accepted keep their LoRAs: a replica forgets a removed one when the last of them has ended.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mii_serve.errors import InvalidRequestError, MiiServeError, UnavailableError
from mii_serve.server.replica_client import ReplicaConnection
from mii_serve.server.router import Router
from mii_serve.types import LORA_NAME, LoraInfo, ServerInfo

logger = logging.getLogger(__name__)

INFO_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class _Loaded:
    path: Path
    revision: str


class Loras:
    """What was changed since the start. All methods are for the front's loop."""

    def __init__(self, router: Router, on_change: Callable[[Mapping[str, LoraInfo]], None]) -> None:
        """`on_change` is called with the LoRAs that requests can name from now on."""
        self._router = router
        self._on_change = on_change
        self._known: dict[str, LoraInfo] = {}
        self._loaded: dict[str, _Loaded] = {}
        self._removed: set[str] = set()
        self._lock = asyncio.Lock()

    @property
    def known(self) -> Mapping[str, LoraInfo]:
        """Those that requests can name."""
        return self._known

    async def prepare(self, connection: ReplicaConnection, info: ServerInfo) -> ServerInfo:
        """Bring a replica that has just answered up to date, before it gets any work; its description afterwards."""
        async with self._lock:
            has = {lora.name: lora for lora in info.loras}
            for name in self._removed & has.keys():
                await connection.remove_lora(name)
            lost = [name for name, loaded in self._loaded.items() if not await self._restore(connection, name, loaded, has)]
            for name in lost:
                await self._withdraw(name)
            if self._removed or self._loaded or lost:
                info = await connection.info(INFO_TIMEOUT_S) or info
            self._set({lora.name: lora for lora in info.loras})
            return info

    async def load(self, name: str, path: Path) -> LoraInfo:
        """Let requests name this LoRA, whose files every replica can read.

        Raises:
            InvalidRequestError: the name is taken or is none, or a replica cannot use the files; names the member.
            UnavailableError: no replica is ready.
        """
        if re.fullmatch(LORA_NAME, name) is None:
            raise InvalidRequestError("name", "must be up to 64 letters, digits, '_', '.' and '-'", repr(name)[:80])
        async with self._lock:
            if name in self._known:
                raise InvalidRequestError("name", "must not be that of a LoRA which is there; remove that one first", name)
            connections = self._connections()
            if not connections:
                raise UnavailableError("the server is not ready: no replica can load it")
            answers = await asyncio.gather(*(one.load_lora(name, path) for one in connections), return_exceptions=True)
            found = [answer for answer in answers if isinstance(answer, LoraInfo)]
            errors = [answer for answer in answers if isinstance(answer, BaseException)]
            if errors or len({lora.revision for lora in found}) != 1:
                await self._remove_from_all(name)
                if errors:
                    raise errors[0]
                raise UnavailableError("no replica answered, or they have read different files; try again")
            self._loaded[name] = _Loaded(path, found[0].revision)
            self._removed.discard(name)
            self._set({**self._known, name: found[0]})
            logger.info("LoRA %s is loaded, revision %s", name, found[0].revision)
            return found[0]

    async def remove(self, name: str) -> None:
        """Let no request name it any more.

        Raises:
            InvalidRequestError: there is none of this name.
        """
        async with self._lock:
            if name not in self._known:
                raise InvalidRequestError("name", "must be that of a LoRA of this server", repr(name[:80]))
            await self._withdraw(name)
            logger.info("LoRA %s is removed", name)

    async def _restore(self, connection: ReplicaConnection, name: str, loaded: _Loaded, has: Mapping[str, LoraInfo]) -> bool:
        """Whether the replica has this LoRA now, as the others have it."""
        if name in has and has[name].revision == loaded.revision:
            return True
        try:
            found = await connection.load_lora(name, loaded.path)
        except MiiServeError as error:
            logger.error("LoRA %s is withdrawn: a replica that came back cannot load it: %s", name, error)
            return False
        if found is not None and found.revision != loaded.revision:
            logger.error("LoRA %s is withdrawn: its files have changed since it was loaded", name)
            await connection.remove_lora(name)
            return False
        return True

    async def _withdraw(self, name: str) -> None:
        self._loaded.pop(name, None)
        self._removed.add(name)
        self._set({known: lora for known, lora in self._known.items() if known != name})
        await self._remove_from_all(name)

    async def _remove_from_all(self, name: str) -> None:
        await asyncio.gather(*(one.remove_lora(name) for one in self._connections()))

    def _connections(self) -> list[ReplicaConnection]:
        return [connection for replica in self._router.replicas if (connection := replica.connection) is not None]

    def _set(self, known: dict[str, LoraInfo]) -> None:
        self._known = known
        self._on_change(known)
