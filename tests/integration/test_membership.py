"""Replicas that join and leave a front while it serves, because the list of a cluster manager has them or no longer has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from patience import PATIENCE_S
from replicas import Replica

from mii_serve.server.call import CallContext
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.membership import Member, Membership
from mii_serve.server.replica_client import ReplicaAddress
from mii_serve.server.router import Router
from mii_serve.types import GenerationAnswer, GenerationRequest, RequestedParams


class Cluster:
    """A front without replicas of its own, and replicas that come and go."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.router = Router(0, patience_s=PATIENCE_S)
        self.dispatcher = Dispatcher(self.router)
        self.membership = Membership(self.dispatcher)
        self.replicas: dict[str, Replica] = {}
        self.failures: dict[str, str] = {}

    async def start(self, name: str) -> Replica:
        replica = self.replicas[name] = Replica(self._folder / f"{name}.sock", max_slots=4, on_poison=lambda: None)
        await replica.start()
        return replica

    async def list(self, *names: str, is_complete: bool = True) -> None:
        members = [
            Member(name=name, address=ReplicaAddress.socket(self.replicas[name].socket), failure=self.failures.get(name))
            for name in names
        ]
        await self.membership.update(members, is_complete=is_complete)

    async def have(self, *names: str) -> None:
        """List them until they and no others are attached."""
        await self.list(*names)
        await self.until(lambda: self.up == len(names), *names)

    async def until(self, condition, *names: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await self.list(*names)
                await asyncio.sleep(0.005)

    @property
    def up(self) -> int:
        return sum(replica.is_up for replica in self.router.replicas)

    def ask(self, seed: int, **fields: object) -> asyncio.Task[GenerationAnswer]:
        params = RequestedParams(prompt="a red circle", seed=seed, **fields)
        call = CallContext(request_id=str(seed), client="c")
        return asyncio.create_task(self.dispatcher.generate(GenerationRequest(params=params), call))

    def load(self) -> dict[str, int]:
        activities = {name: replica.loop.activity() for name, replica in self.replicas.items()}
        return {name: activity.num_running + activity.num_waiting for name, activity in activities.items()}

    async def die(self, name: str) -> None:
        await self.replicas.pop(name).die()


@pytest.fixture
async def cluster(tmp_path) -> AsyncIterator[Cluster]:
    cluster = Cluster(tmp_path)
    try:
        yield cluster
    finally:
        for replica in cluster.replicas.values():
            replica.engine.gate.set()
        await cluster.membership.close()
        for name in list(cluster.replicas):
            await cluster.die(name)


def seeds(answer: GenerationAnswer) -> list[int]:
    return [image.seed for image in answer.images]


async def test_a_replica_that_leaves_finishes_what_it_has_and_gets_nothing_new(cluster):
    old = await cluster.start("old")
    await cluster.have("old")
    old.engine.gate.clear()
    first = cluster.ask(1)
    await cluster.until(lambda: cluster.load()["old"] == 1, "old")

    await cluster.start("new")
    await cluster.have("new")
    assert len(cluster.router.replicas) == 2, "the old one still works"
    assert seeds(await cluster.ask(2)) == [2]
    assert cluster.load()["old"] == 1 and not first.done()

    old.engine.gate.set()
    assert seeds(await first) == [1]
    await cluster.until(lambda: len(cluster.router.replicas) == 1, "new")
    info = await cluster.dispatcher.server_info()
    assert [replica.index for replica in info.replicas] == [1]
    await cluster.start("third")
    await cluster.have("new", "third")
    assert sorted(replica.index for replica in cluster.router.replicas) == [0, 1], "a free index is used again"


async def test_the_work_of_a_replica_that_is_gone_is_made_by_the_others(cluster):
    for name in ("a", "b"):
        (await cluster.start(name)).engine.gate.clear()
    await cluster.have("a", "b")
    asked = [cluster.ask(seed) for seed in range(6)]
    await cluster.until(lambda: sum(cluster.load().values()) == 6, "a", "b")
    cluster.replicas["b"].engine.gate.set()
    await cluster.die("a")
    assert cluster.membership.has_broken
    await cluster.have("b")
    assert [seeds(answer) for answer in await asyncio.gather(*asked)] == [[seed] for seed in range(6)]


async def test_a_list_that_may_lack_some_ends_nobody_and_one_that_was_missed_may_come_back(cluster):
    await cluster.start("a")
    await cluster.have("a")
    await cluster.list(is_complete=False)
    assert cluster.up == 1
    cluster.replicas["a"].engine.gate.clear()
    asked = cluster.ask(1)
    await cluster.until(lambda: cluster.load()["a"] == 1, "a")
    await cluster.list()
    assert cluster.up == 0 and not cluster.dispatcher.is_ready
    await cluster.have("a")
    cluster.replicas["a"].engine.gate.set()
    assert seeds(await asked) == [1]


async def test_a_replica_that_says_it_failed_is_let_go_and_one_that_does_not_answer_is_tried_again(cluster):
    await cluster.start("a")
    cluster.failures["a"] = "its engine failed"
    await cluster.list("a")
    assert not cluster.router.replicas
    del cluster.failures["a"]
    await cluster.have("a")
    cluster.failures["a"] = "its engine failed"
    await cluster.list("a")
    assert not cluster.router.replicas


async def test_closing_ends_an_attempt_to_attach(cluster):
    silent = Member(name="silent", address=ReplicaAddress(target="unix:/nowhere"))
    await cluster.membership.update([silent])
    async with asyncio.timeout(PATIENCE_S):
        while not cluster.router.replicas:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0)
        await cluster.membership.close()
    assert not cluster.router.replicas
