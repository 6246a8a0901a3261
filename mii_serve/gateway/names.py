"""What the one model of a deployment is called by those who ask for it by name."""

from __future__ import annotations

import time
from collections.abc import Sequence

from mii_serve.gateway.problems import NotFoundError
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.server.desk import Desk


class ModelNames:
    """Asks the replicas once: a deployment's model never changes."""

    def __init__(self, desk: Desk, served: Sequence[str] = ()) -> None:
        """`served` are the names that the operator gave the model; without any it has its own."""
        self._desk = desk
        self._served = tuple(served)
        self._info: pb.GetServerInfoResponse | None = None
        self.created = int(time.time())

    async def info(self) -> pb.GetServerInfoResponse:
        """The model and the deployment; counts in it are old.

        Raises:
            UnavailableError: no replica has told yet.
        """
        if self._info is None:
            self._info = await self._desk.server_info()
        return self._info

    async def all(self) -> tuple[str, ...]:
        """The model's names, the one that answers tell first.

        Raises:
            UnavailableError: no replica has told yet.
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
