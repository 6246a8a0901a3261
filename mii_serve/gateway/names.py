"""What the one model of a deployment is called by those who ask for it by name."""

from __future__ import annotations

import time

from mii_serve.gateway.problems import NotFoundError
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.server.desk import Desk


class ModelNames:
    """Asks the replicas once: a deployment's model never changes."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
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

    async def check(self, name: str) -> None:
        """Accept the model's name, its last part, or the deployment's name.

        Raises:
            NotFoundError: any other name.
        """
        info = await self.info()
        known = [info.model, info.model.rpartition("/")[2], info.deployment_name]
        if name.casefold() not in (other.casefold() for other in known):
            raise NotFoundError(f"there is no model {name[:100]!r} here; this server has {info.model}", "model_not_found")
