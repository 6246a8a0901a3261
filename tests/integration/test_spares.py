"""Which process is handed out for which environment. The processes are real; they are ended before they have imported much."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Mapping

import psutil
import pytest

from mii_serve.server.spare import Child, Spares

FIRST, SECOND = ({**os.environ, "CUDA_VISIBLE_DEVICES": index} for index in "01")


@pytest.fixture
async def handed_out() -> AsyncIterator[list[Child]]:
    children: list[Child] = []
    yield children
    for child in children:
        os.close(child.status_fd)
        with contextlib.suppress(ProcessLookupError):
            child.process.kill()
        await child.process.wait()


@pytest.fixture
async def spares() -> AsyncIterator[Spares]:
    spares = Spares(is_on=True)
    yield spares
    await spares.close()


async def taken(spares: Spares, environment: Mapping[str, str], handed_out: list[Child]) -> psutil.Process:
    handed_out.append(await spares.take(environment))
    return psutil.Process(handed_out[-1].process.pid)


def is_spare(process: psutil.Process) -> bool:
    return process.cmdline()[-1] == "spare"


async def test_a_spare_is_for_the_devices_it_was_started_with(spares, handed_out):
    spares.prepare(FIRST)
    other = await taken(spares, SECOND, handed_out)
    own = await taken(spares, FIRST, handed_out)
    assert (is_spare(other), other.environ()["CUDA_VISIBLE_DEVICES"]) == (False, "1")
    assert (is_spare(own), own.environ()["CUDA_VISIBLE_DEVICES"]) == (True, "0")


async def test_there_is_one_for_each_environment_and_each_is_used_once(spares, handed_out):
    for _ in range(3):
        spares.prepare(FIRST)
    assert [is_spare(await taken(spares, FIRST, handed_out)) for _ in range(2)] == [True, False]
    spares.prepare(FIRST)
    assert is_spare(await taken(spares, FIRST, handed_out))


async def test_a_dead_one_is_not_handed_out_and_is_replaced(spares, handed_out):
    for is_prepared_again in (False, True):
        spares.prepare(FIRST)
        dead = await killed(spares)
        if is_prepared_again:
            spares.prepare(FIRST)
        process = await taken(spares, FIRST, handed_out)
        assert process.pid != dead and is_spare(process) == is_prepared_again


async def killed(spares: Spares) -> int:
    [task] = spares._spares.values()
    process = (await task).process
    process.kill()
    await process.wait()
    return process.pid


async def test_those_that_nobody_took_are_ended(spares):
    spares.prepare(FIRST)
    spares.prepare(SECOND)
    children = [(await task).process.pid for task in spares._spares.values()]
    await spares.close()
    assert not any(psutil.pid_exists(pid) for pid in children)
    spares.prepare(FIRST)
    assert not spares._spares, "nor is another started"


async def test_where_there_are_to_be_none_a_process_is_started_when_it_is_needed(handed_out):
    spares = Spares(is_on=False)
    spares.prepare(FIRST)
    assert not is_spare(await taken(spares, FIRST, handed_out))
