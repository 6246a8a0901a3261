"""Rank 0's side of a group: starts the followers, hands every order down to them, and ends with any of them."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch

from mii_serve.config import DeployConfig
from mii_serve.engine.probe import Probe, UNetCall
from mii_serve.engine.ranks.group import RankGroup
from mii_serve.engine.ranks.order import Order, OrderName, RankEngine, execute
from mii_serve.engine.turns import Turn, TurnResult
from mii_serve.engine.warmup import input_image_of, warm_up_request
from mii_serve.errors import ConfigError, EngineError
from mii_serve.logs import current_format, finish_logs
from mii_serve.safe_path import safe_environment
from mii_serve.types import (
    Capabilities,
    EngineCapacity,
    EngineDescription,
    GenerationParams,
    Sample,
    SampleId,
    SampleProgress,
    SchedulerDescription,
    StepPlan,
)

logger = logging.getLogger(__name__)

MODULE = "mii_serve.engine.ranks.follower"
VISIBLE = "CUDA_VISIBLE_DEVICES"
CLOSE_S = 5.0
"""For a follower to end in good order; after that it is killed."""
BLAME_S = 2.0
"""For the end of a follower to be noticed after an order has failed: a lost follower is then the reason."""


class RankedEngine:
    """Implements `mii_serve.engine.Engine`, `mii_serve.engine.turns.LaunchingEngine` and
    `mii_serve.engine.probe.ProbedEngine` for the ranks of a group together.

    A follower that ends by itself ends this process, in the same way: what the group holds is then lost. The other way round
    the followers end with this process (`mii_serve.parent`).
    """

    def __init__(
        self,
        engine: RankEngine,
        group: RankGroup,
        followers: Sequence[Follower],
        *,
        rendezvous: int,
        parallelism: str,
        devices: tuple[str, ...],
    ) -> None:
        """`rendezvous` is the descriptor of the file through which the ranks have met; closed with the engine."""
        self._engine = engine
        self.group = group
        self._followers = followers
        self._rendezvous = rendezvous
        self._parallelism = parallelism
        self._devices = devices
        self._is_closing = False
        self.capabilities: Capabilities = engine.capabilities
        for follower in followers:
            threading.Thread(target=self._watch, args=(follower,), name=f"rank-{follower.rank}", daemon=True).start()

    @property
    def follower_pids(self) -> list[int]:
        return [follower.process.pid for follower in self._followers]

    @property
    def description(self) -> EngineDescription:
        return replace(
            self._engine.description, num_ranks=self.group.size, parallelism=self._parallelism, devices=self._devices
        )

    @property
    def capacity(self) -> EngineCapacity:
        return self._engine.capacity

    @property
    def num_graph_misses(self) -> int:
        return self._engine.num_graph_misses

    def stage_seconds(self) -> dict[str, float]:
        return self._engine.stage_seconds()

    def check(self, params: GenerationParams) -> int:
        return self._engine.check(params)

    def describe_scheduler(self, params: GenerationParams) -> SchedulerDescription:
        return self._engine.describe_scheduler(params)

    def warmup(self) -> None:
        """Warm up all ranks, and compare what they hold.

        Raises:
            EngineError: as `Engine`, and if the ranks do not hold the same bits afterwards.
        """
        self.order("warmup")
        params = self.capabilities.resolve(warm_up_request(self), fallback_seed=0)
        sample = Sample(id=SampleId("warm-up", 0), params=params, input_image=input_image_of(params))
        self.run(StepPlan(joins=(sample,), steps=(sample.id,)))
        digests = self.digests()
        self.run(StepPlan(leaves=(sample.id,)))
        if len(set(digests)) > 1:
            raise EngineError("the ranks compute different bits; use devices of one kind, or tensor_parallel 1")

    def run(self, plan: StepPlan) -> tuple[SampleProgress, ...]:
        progress: tuple[SampleProgress, ...] = self.order("run", plan)
        return progress

    def launch(self, plan: StepPlan) -> RankedTurn:
        return RankedTurn(self, self.order("launch", plan))

    def has_decoded(self) -> bool:
        return False

    def take_decoded(self) -> list[TurnResult]:
        return []

    @staticmethod
    def on_decoded() -> None:
        """Never called: ranks exchange pictures in the turn."""

    def digests(self) -> list[str]:
        """Of each rank's sampler states; equal where the bits are."""
        digests: list[str] = self.order("digests")
        return digests

    def memory_bytes(self) -> list[int]:
        """Of each rank, see `order.memory_bytes`."""
        held: list[int] = self.order("memory")
        return held

    def probe(self) -> RankedProbe:
        return RankedProbe(self, self._engine.probe())

    def close(self) -> None:
        if self._is_closing:  # after a failure, when the group cannot be left in good order
            self._engine.close()
            self.group.close(is_broken=True)
            return
        self._is_closing = True
        with contextlib.suppress(OSError):
            self._hand_down(Order("close"))
        self._engine.close()
        self.group.close()
        for follower in self._followers:
            follower.end(CLOSE_S)
        os.close(self._rendezvous)

    def order(self, name: OrderName, argument: Any = None) -> Any:
        """Run an order on all ranks; what it gives here.

        Raises:
            EngineError: it failed here, and the followers have been ended. If a follower was lost, this process ends instead.
        """
        order = Order(name, argument)
        with self.ending_all():
            self._hand_down(order)
            return execute(self._engine, self.group, order)

    @contextlib.contextmanager
    def ending_all(self) -> Iterator[None]:
        """End the followers if the block fails, see `order`."""
        try:
            yield
        except Exception as error:
            self._wait_for_loss()
            self._is_closing = True
            for follower in self._followers:
                follower.end(0.0)
            if isinstance(error, EngineError):
                raise
            raise EngineError(f"a rank failed: {type(error).__name__}: {error}") from error

    def _hand_down(self, order: Order) -> None:
        for follower in self._followers:
            follower.send(order)

    def _watch(self, follower: Follower) -> None:
        code = follower.process.wait()
        if self._is_closing:
            return
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        logger.error("rank %d ended, %s; the other ranks end with it", follower.rank, how)
        finish_logs(0.2)
        if code in (-signal.SIGKILL, -signal.SIGTERM):
            os.kill(os.getpid(), signal.SIGKILL)  # it was killed from outside; no request is to blame
        os._exit(1)

    def _wait_for_loss(self) -> None:
        deadline = time.monotonic() + BLAME_S
        for follower in self._followers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                follower.process.wait(max(0.0, deadline - time.monotonic()))
                threading.Event().wait()  # `_watch` ends this process


@dataclass(frozen=True, slots=True, eq=False)
class RankedTurn:
    """Implements `mii_serve.engine.turns.Turn`. The followers wait for theirs by themselves."""

    engine: RankedEngine
    own: Turn

    def is_done(self) -> bool:
        return self.own.is_done()

    def wait(self) -> TurnResult:
        with self.engine.ending_all():
            return self.own.wait()


@dataclass(frozen=True, slots=True, eq=False)
class RankedProbe:
    """Implements `mii_serve.engine.probe.Probe`: what one rank can do alone, rank 0 does."""

    engine: RankedEngine
    own: Probe

    @property
    def num_channels(self) -> int:
        return self.own.num_channels

    def encode(self, prompts: Sequence[str]) -> torch.Tensor:
        return self.own.encode(prompts)

    def predict(self, calls: Sequence[UNetCall]) -> torch.Tensor:
        prediction: torch.Tensor = self.engine.order("predict", tuple(calls))
        return prediction

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.own.decode(latents)

    def without_checker(self) -> AbstractContextManager[None]:
        return self._removed()

    @contextlib.contextmanager
    def _removed(self) -> Iterator[None]:
        self.engine.order("remove_checker")
        try:
            yield
        finally:
            self.engine.order("restore_checker")


@dataclass(frozen=True, slots=True, eq=False)
class Follower:
    """A process that was told its rank. It is waited for by `RankedEngine`."""

    rank: int
    process: subprocess.Popen[bytes]
    status_fd: int

    def send(self, order: object) -> None:
        assert self.process.stdin is not None
        pickle.dump(order, self.process.stdin)
        self.process.stdin.flush()

    def built(self) -> EngineDescription:
        """Wait until it has built its engine.

        Raises:
            MiiServeError: why it has not.
        """
        with os.fdopen(self.status_fd, "rb") as pipe:
            try:
                status = pickle.load(pipe)
            except EOFError:
                raise EngineError(f"rank {self.rank} ended while starting, exit code {self.process.wait()}") from None
        if isinstance(status, BaseException):
            raise status
        assert isinstance(status, EngineDescription)
        return status

    def end(self, timeout_s: float) -> None:
        assert self.process.stdin is not None
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        with contextlib.suppress(OSError):
            self.process.stdin.close()


def lead(config: DeployConfig, build_rank: Callable[[RankGroup], RankEngine]) -> RankedEngine:
    """Start the followers, build this rank's engine with theirs, and connect them. It is not warm yet.

    Raises:
        ConfigError: there are too few GPUs, or this is not Linux.
        MiiServeError: what any rank's engine ended with.
    """
    if not hasattr(os, "memfd_create"):
        raise ConfigError("tensor_parallel", f"several ranks need Linux, got {config.tensor_parallel}; use 1")
    group = RankGroup(0, config.tensor_parallel)
    rendezvous = os.memfd_create("rendezvous")  # a file without a name: new for each group, and gone with it
    followers: list[Follower] = []
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, rendezvous)
        gpus = _gpus(config)
        for rank in range(1, group.size):
            followers.append(follower := _start(rank, gpus, rendezvous))
            undo.callback(follower.end, 0.0)
        timeout_s = max(config.hang_timeout_s, config.startup_timeout_s)
        order = {
            "config": config.to_json(),
            "size": group.size,
            "rendezvous": f"/proc/self/fd/{rendezvous}",
            "timeout_s": timeout_s,
            "log_level": logging.getLevelName(logging.getLogger().getEffectiveLevel()),
            "log_format": current_format(),
        }
        for follower in followers:
            with contextlib.suppress(OSError):  # it has ended, and `built` says so
                follower.send({**order, "rank": follower.rank})
        engine = build_rank(group)
        devices = list(engine.description.devices)
        for follower in followers:
            other = follower.built()
            if replace(other, devices=engine.description.devices) != engine.description:
                raise EngineError(f"rank {follower.rank} has the engine {other}, and rank 0 has {engine.description}")
            devices += other.devices
        group.connect(f"/proc/self/fd/{rendezvous}", torch.device(engine.description.device), timeout_s)
        undo.pop_all()
    return RankedEngine(engine, group, followers, rendezvous=rendezvous, parallelism=config.parallelism, devices=tuple(devices))


def _gpus(config: DeployConfig) -> list[str]:
    """The GPU of each rank, as `CUDA_VISIBLE_DEVICES` names it; none on a CPU. Rank 0 computes on the first that it sees."""
    if config.device == "cpu" or not torch.cuda.is_available():
        return []
    if (named := os.environ.get(VISIBLE)) is not None:
        gpus = [name.strip() for name in named.split(",")]
    else:
        gpus = [str(index) for index in range(torch.cuda.device_count())]
    if len(gpus) < config.tensor_parallel:
        raise ConfigError("tensor_parallel", f"{config.tensor_parallel} ranks need a GPU each, and {len(gpus)} can be seen")
    return gpus


def _start(rank: int, gpus: Sequence[str], rendezvous: int) -> Follower:
    """With the number of threads of this process: another number rounds in another way."""
    added = {VISIBLE: gpus[rank]} if gpus else {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    read_fd, write_fd = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", MODULE, str(write_fd)],
            stdin=subprocess.PIPE,
            stdout=2,  # standard output belongs to the front
            pass_fds=(write_fd, rendezvous),
            env=safe_environment({**os.environ, **added}),
        )
    except BaseException:
        os.close(read_fd)
        raise
    finally:
        os.close(write_fd)
    return Follower(rank, process, read_fd)
