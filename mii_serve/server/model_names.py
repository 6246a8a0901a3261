"""The names of the deployment's one model, for protocols whose requests name a model."""

from __future__ import annotations

import time
from collections.abc import Sequence

from mii_serve.errors import NotFoundError
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.types import ServerInfo


class ModelNames:
    """Asks the replicas once: a deployment's model never changes."""

    def __init__(self, dispatcher: Dispatcher, served: Sequence[str] = ()) -> None:
        """`served` are the names that the operator gave the model; without any it has its own."""
        self._dispatcher = dispatcher
        self._served = tuple(served)
        self._info: ServerInfo | None = None
        self.created = int(time.time())

    async def info(self) -> ServerInfo:
        """The model and the deployment; counts in it are old.

        Raises:
            UnavailableError: no replica has described itself yet.
        """
        if self._info is None:
            self._info = await self._dispatcher.server_info()
        return self._info

    async def all(self) -> tuple[str, ...]:
        """The model's names, the one that answers name first.

        Raises:
            UnavailableError: no replica has described itself yet.
        """
        return self._served or ((await self.info()).model,)

    async def check(self, name: str) -> str:
        """The model's name that was meant: one of its names or the last part of one, or the deployment's name.

        Raises:
            NotFoundError: any other name.
        """
        names = await self.all()
        asked = name.casefold()
        for known in names:
            if asked in (known.casefold(), known.rpartition("/")[2].casefold()):
                return known
        if asked == (await self.info()).deployment_name.casefold():
            return names[0]
        raise NotFoundError(f"there is no model {name[:100]!r} here; this server has {', '.join(names)}", "model_not_found")
