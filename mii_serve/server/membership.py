"""Keeps the replicas of a front the same as the list of a cluster manager that starts and ends them.

A replica that is new in the list is attached by its address. One that is no longer in it gets nothing new, finishes what it
has, and is let go; if its connection is broken instead, it was lost, and its work is made again elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import grpc

from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.replica_client import Loss, ReplicaAddress, ReplicaClient

logger = logging.getLogger(__name__)

RETIRED = Loss(reason="it was retired", is_crash=False)
LOST = Loss(reason="it is gone for an unknown reason", is_crash=False)
"""A cluster manager does not say whether a replica crashed or was killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One replica in the list. No two lives of replicas have the same name. With `failure` it works no longer, and says why."""

    name: str
    address: ReplicaAddress
    failure: str | None = None


class Membership:
    """Owns all replicas of a dispatcher that has none of its own."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._attached: dict[str, ReplicaClient] = {}
        self._attaching: dict[str, asyncio.Task[None]] = {}

    @property
    def has_broken(self) -> bool:
        """Whether a connection broke: the next list is to say why, and requests wait for that."""
        return any(replica.is_broken for replica in self._attached.values())

    async def update(self, members: Sequence[Member], *, is_complete: bool = True) -> None:
        """Act on a new list. One that may lack some is not `is_complete`; then none counts as lost."""
        listed = {member.name: member for member in members}
        for name, replica in list(self._attached.items()):
            member = listed.get(name)
            if member is not None and member.failure is not None:
                await self._let_go(name, Loss(reason=member.failure, is_crash=True))
            elif member is not None:
                if replica.is_retiring:
                    self._dispatcher.retire(replica, is_retiring=False)
            elif replica.is_broken and is_complete:
                await self._let_go(name, LOST)
            elif not replica.is_retiring and is_complete:
                logger.info("replica %d leaves when it has done what it has: %s", replica.index, name)
                self._dispatcher.retire(replica)
            elif replica.is_retiring and not replica.num_running:
                await self._let_go(name, RETIRED)
        for name, member in listed.items():
            if name not in self._attached and name not in self._attaching and member.failure is None:
                self._attaching[name] = asyncio.create_task(self._attach(member))

    async def close(self) -> None:
        """Let all go at once."""
        attaching = list(self._attaching.values())
        for task in attaching:
            task.cancel()
        await asyncio.gather(*attaching, return_exceptions=True)
        for name in list(self._attached):
            await self._let_go(name, Loss(reason="the server is stopping", is_crash=False))

    async def _attach(self, member: Member) -> None:
        """In a task of its own: one that does not answer must not keep the others waiting."""
        try:
            replica = self._attached[member.name] = await self._dispatcher.add(member.address)
            logger.info("replica %d is attached: %s", replica.index, member.name)
        except grpc.aio.AioRpcError as error:  # if the next list still has it, it is tried again
            logger.warning("a replica does not answer: %s, %s", member.name, error.code().name)
        finally:
            del self._attaching[member.name]

    async def _let_go(self, name: str, loss: Loss) -> None:
        replica = self._attached.pop(name)
        log = logger.info if loss is RETIRED else logger.warning
        log("replica %d is let go: %s: %s", replica.index, name, loss.reason)
        await self._dispatcher.remove(replica, loss)
