"""One replica process over its lives: when it is started again, and what is said of its end. The processes are fakes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from itertools import pairwise

import pytest
from replica_doubles import settle

from mii_serve import errors
from mii_serve.config import DeployConfig
from mii_serve.errors import ConfigError, EngineError, MiiServeError, ModelError, UnusableEngineError, VerificationError
from mii_serve.server import supervisor, watch
from mii_serve.server.replica_client import Loss
from mii_serve.server.spare import Child
from mii_serve.server.supervisor import BACKOFF_S, STEADY_S, ReplicaSupervisor

READY = {"state": "ready"}


class FakeInput:
    def __init__(self) -> None:
        self.written = b""
        self.is_broken = False

    def write(self, line: bytes) -> None:
        self.written += line

    async def drain(self) -> None:
        if self.is_broken:
            raise BrokenPipeError


class FakeProcess:
    """A process that ends when the test or its supervisor says so."""

    pid = 1

    def __init__(self, status_fd: int, *, heeds_terminate: bool = True) -> None:
        self.stdin = FakeInput()
        self.returncode: int | None = None
        self.signals: list[int] = []
        self._status_fd: int | None = status_fd
        self._heeds_terminate = heeds_terminate
        self._ended = asyncio.Event()

    def report(self, status: Mapping[str, str] | bytes) -> None:
        assert self._status_fd is not None
        os.write(self._status_fd, status if isinstance(status, bytes) else json.dumps(status).encode() + b"\n")

    def end(self, code: int) -> None:
        if self.returncode is None:
            self.returncode = code
            self._ended.set()
        if self._status_fd is not None:
            os.close(self._status_fd)
            self._status_fd = None

    async def wait(self) -> int:
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def terminate(self) -> None:
        self.signals.append(signal.SIGTERM)
        if self._heeds_terminate:
            self.end(0)

    def kill(self) -> None:
        self.signals.append(signal.SIGKILL)
        self.end(-signal.SIGKILL)


class FakeSpares:
    """Hands out processes; `on_take` says what each of them does."""

    def __init__(self) -> None:
        self.processes: list[FakeProcess] = []
        self.taken_at: list[float] = []
        self.on_take: Callable[[FakeProcess], None] = lambda process: process.report(READY)
        self.error: OSError | None = None
        self.heeds_terminate = True

    def prepare(self, environment: Mapping[str, str]) -> None: ...

    async def take(self, environment: Mapping[str, str]) -> Child:
        self.taken_at.append(asyncio.get_running_loop().time())
        if self.error is not None:
            raise self.error
        read_fd, write_fd = os.pipe()
        self.processes.append(FakeProcess(write_fd, heeds_terminate=self.heeds_terminate))
        self.on_take(self.processes[-1])
        return Child(process=self.processes[-1], status_fd=read_fd)


class Supervised:
    def __init__(self) -> None:
        self.spares = FakeSpares()
        self.config = DeployConfig(model="random", startup_timeout_s=100.0)
        self.supervisor = ReplicaSupervisor(self.config, spares=self.spares)
        self.changed = asyncio.Event()
        self.hung: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.task = asyncio.create_task(self.supervisor.run(self.changed))
        await settle()

    @property
    def process(self) -> FakeProcess:
        return self.spares.processes[-1]

    async def ready(self) -> None:
        while not self.supervisor.is_ready:
            self.changed.clear()
            await self.changed.wait()

    async def lost(self) -> Loss:
        while self.supervisor.is_ready:
            self.changed.clear()
            await self.changed.wait()
        return self.supervisor.loss


@pytest.fixture
async def supervised(monkeypatch) -> AsyncIterator[Supervised]:
    one = Supervised()

    async def until_hung(address: object, bound_s: float) -> str:
        return await asyncio.shield(one.hung)

    monkeypatch.setattr(supervisor, "until_hung", until_hung)
    yield one
    if one.task is not None:
        one.task.cancel()
        await asyncio.gather(one.task, return_exceptions=True)
    for process in one.spares.processes:
        assert process.returncode is not None, "no process is left behind"
        process.end(0)


class TestOrder:
    async def test_it_gets_its_order_in_one_line(self, supervised):
        await supervised.start()
        await supervised.ready()
        line = supervised.process.stdin.written
        order = json.loads(line)
        assert line.endswith(b"\n") and DeployConfig.from_json(order["config"]) == supervised.config
        assert order["socket"] == str(supervised.supervisor.socket)

    async def test_cancelling_ends_it_in_good_order(self, supervised):
        await supervised.start()
        await supervised.ready()
        supervised.task.cancel()
        await asyncio.gather(supervised.task, return_exceptions=True)
        assert supervised.process.signals == [signal.SIGTERM] and not supervised.supervisor.is_ready
        assert not supervised.supervisor.socket.parent.exists()

    async def test_one_that_does_not_heed_that_is_killed(self, supervised):
        supervised.spares.heeds_terminate = False
        await supervised.start()
        await supervised.ready()
        supervised.task.cancel()
        await asyncio.gather(supervised.task, return_exceptions=True)
        assert supervised.process.signals == [signal.SIGTERM, signal.SIGKILL]

    async def test_a_folder_that_was_cleaned_away_is_made_again(self, supervised):
        await supervised.start()
        await supervised.ready()
        supervised.supervisor.socket.parent.rmdir()
        supervised.process.end(1)
        await supervised.lost()
        await supervised.ready()
        assert supervised.supervisor.socket.parent.is_dir()


class TestLosses:
    @pytest.mark.parametrize(
        ("code", "reason", "is_crash"),
        [
            (-signal.SIGSEGV, "it ended, killed by signal 11", True),
            (-signal.SIGABRT, "it ended, killed by signal 6", True),
            (1, "it ended, exit code 1", True),
            (0, "it ended, exit code 0", False),
            (-signal.SIGKILL, "it ended, killed by signal 9", False),
            (-signal.SIGTERM, "it ended, killed by signal 15", False),
        ],
    )
    async def test_the_reason_and_whether_it_speaks_against_what_was_running(self, supervised, code, reason, is_crash):
        await supervised.start()
        await supervised.ready()
        supervised.process.end(code)
        assert await supervised.lost() == Loss(reason=reason, is_crash=is_crash)

    async def test_one_that_hangs_is_killed_and_has_crashed(self, supervised):
        await supervised.start()
        await supervised.ready()
        supervised.hung.set_result("it does not answer for 5 s")
        assert await supervised.lost() == Loss(reason="it hung: it does not answer for 5 s", is_crash=True)
        assert supervised.spares.processes[0].signals == [signal.SIGKILL]

    async def test_it_is_started_again_and_that_is_counted(self, supervised):
        await supervised.start()
        for num_restarts in range(3):
            await supervised.ready()
            assert supervised.supervisor.num_restarts == num_restarts
            supervised.process.end(1)
            await supervised.lost()
        await supervised.ready()
        assert len(supervised.spares.processes) == 4


class TestBackoff:
    async def test_one_that_ends_soon_is_started_later_each_time(self, supervised):
        await supervised.start()
        for _ in range(len(BACKOFF_S) + 2):
            await supervised.ready()
            supervised.process.end(1)
            await supervised.lost()
        await supervised.ready()
        at = supervised.spares.taken_at
        assert [later - earlier for earlier, later in pairwise(at)] == pytest.approx([*BACKOFF_S, 30.0, 30.0])

    async def test_a_start_that_took_long_is_no_long_life(self, supervised):
        await supervised.start()
        await supervised.ready()
        supervised.spares.on_take = lambda process: None
        supervised.process.end(1)
        await asyncio.sleep(300.0)
        first, second, third, fourth = supervised.spares.taken_at[:4]
        assert (second - first, third - second, fourth - third) == pytest.approx((0.5, 100.0 + 1.0, 100.0 + 2.0))

    async def test_one_that_lived_long_is_started_at_once_and_the_count_begins_anew(self, supervised):
        await supervised.start()
        for lived_s, delay_s in ((1.0, 0.5), (1.0, 1.0), (STEADY_S + 1, 0.0), (1.0, 0.5)):
            await supervised.ready()
            await asyncio.sleep(lived_s)
            supervised.process.end(1)
            await supervised.lost()
            await supervised.ready()
            assert supervised.spares.taken_at[-1] - supervised.spares.taken_at[-2] == pytest.approx(lived_s + delay_s)


class TestStarts:
    @pytest.mark.parametrize(
        "error",
        [
            ConfigError("dtype", "must be one of: fp16"),
            UnusableEngineError("deepspeed needs nvcc: found none"),
            ModelError("no such model"),
            VerificationError("the VAE differs"),
            EngineError("out of memory"),
        ],
        ids=lambda error: type(error).__name__,
    )
    async def test_what_the_first_one_says_is_raised_as_it_was(self, supervised, error):
        supervised.spares.on_take = lambda process: process.report(
            {"state": "failed", "error": type(error).__name__, "message": str(error)}
        )
        await supervised.start()
        with pytest.raises(type(error)) as caught:
            await supervised.task
        assert type(caught.value) is type(error) and str(caught.value) == str(error)
        if isinstance(error, ConfigError):
            assert (caught.value.setting, caught.value.rule) == (error.setting, error.rule)
        assert supervised.process.signals == [signal.SIGTERM]

    def test_a_class_that_has_no_place_here_is_an_engine_error(self):
        error = supervisor._rebuilt("NotFiniteError", "text")
        assert type(error) is EngineError and str(error) == "text"
        assert all(isinstance(supervisor._rebuilt(name, "a: b"), MiiServeError) for name in vars(errors))

    async def test_one_that_ends_without_a_word(self, supervised):
        supervised.spares.on_take = lambda process: process.end(-signal.SIGSEGV)
        await supervised.start()
        with pytest.raises(EngineError, match="ended while starting, killed by signal 11"):
            await supervised.task

    async def test_one_that_ends_in_the_middle_of_a_word(self, supervised):
        def dies(process: FakeProcess) -> None:
            process.report(b'{"state": "fai')
            process.end(-signal.SIGKILL)

        supervised.spares.on_take = dies
        await supervised.start()
        with pytest.raises(EngineError, match="ended while starting, killed by signal 9"):
            await supervised.task

    async def test_one_that_is_gone_before_it_has_its_order(self, supervised):
        def dies(process: FakeProcess) -> None:
            process.stdin.is_broken = True
            process.end(1)

        supervised.spares.on_take = dies
        await supervised.start()
        with pytest.raises(EngineError, match="ended while starting, exit code 1"):
            await supervised.task

    async def test_one_that_takes_too_long_is_ended(self, supervised):
        supervised.spares.on_take = lambda process: None
        await supervised.start()
        with pytest.raises(EngineError, match="not ready within 100 s"):
            await supervised.task
        assert supervised.process.signals == [signal.SIGTERM]

    async def test_a_long_reason_is_told(self, supervised, monkeypatch):
        text, sent = "x" * 200_000, []

        def reports(process: FakeProcess) -> None:
            line = json.dumps({"state": "failed", "error": "EngineError", "message": text}).encode() + b"\n"
            os.set_blocking(process._status_fd, False)

            async def write() -> None:
                rest = line
                while rest:
                    with contextlib.suppress(BlockingIOError):
                        rest = rest[os.write(process._status_fd, rest) :]
                    await asyncio.sleep(0)

            sent.append(asyncio.create_task(write()))

        supervised.spares.on_take = reports
        await supervised.start()
        with pytest.raises(EngineError) as caught:
            await supervised.task
        assert str(caught.value) == text
        await asyncio.gather(*sent)

    async def test_a_reason_beyond_all_bounds_is_not_waited_for(self, supervised, monkeypatch):
        monkeypatch.setattr(supervisor, "MAX_STATUS_BYTES", 10)
        supervised.spares.on_take = lambda process: process.report({"state": "failed", "message": "x" * 1000})
        await supervised.start()
        with pytest.raises(EngineError, match="too long to be read"):
            await supervised.task
        assert supervised.process.signals == [signal.SIGTERM]

    async def test_no_memory_for_a_process(self, supervised):
        supervised.spares.error = OSError("Cannot allocate memory")
        await supervised.start()
        with pytest.raises(EngineError, match="no replica starts: Cannot allocate memory"):
            await supervised.task

    async def test_later_ones_are_tried_again(self, supervised):
        await supervised.start()
        await supervised.ready()
        supervised.spares.on_take = lambda process: process.report(
            {"state": "failed", "error": "ModelError", "message": "gone"}
        )
        supervised.process.end(1)
        await supervised.lost()
        await asyncio.sleep(5.0)
        assert not supervised.task.done() and supervised.supervisor.loss == Loss(reason="gone", is_crash=True)
        supervised.spares.error = OSError("Too many open files")
        await asyncio.sleep(20.0)
        assert not supervised.task.done() and supervised.supervisor.loss.reason == "Too many open files"
        supervised.spares.error, supervised.spares.on_take = None, lambda process: process.report(READY)
        await supervised.ready()


class FakeActivity:
    num_running = num_turns = num_images = 0


class FakeInfo:
    def __init__(self) -> None:
        self.activity = FakeActivity()


class FakeConnection:
    """A replica's answers to its watcher."""

    answer: FakeInfo | None
    is_closed: bool

    def __init__(self, address: object) -> None:
        FakeConnection.is_closed = False

    async def info(self, timeout_s: float) -> FakeInfo | None:
        if FakeConnection.answer is None:
            await asyncio.sleep(timeout_s)
        return FakeConnection.answer

    async def close(self) -> None:
        FakeConnection.is_closed = True


class TestHanging:
    @pytest.fixture(autouse=True)
    def fake_connection(self, monkeypatch):
        FakeConnection.answer = FakeInfo()
        monkeypatch.setattr(watch, "ReplicaConnection", FakeConnection)

    async def watched(self, bound_s: float = 10.0) -> asyncio.Task[str]:
        watching = asyncio.create_task(watch.until_hung(None, bound_s))
        await settle()
        return watching

    async def test_one_with_nothing_to_do_does_not_hang(self):
        watching = await self.watched()
        await asyncio.sleep(1000.0)
        assert not watching.done()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        assert FakeConnection.is_closed

    @pytest.mark.parametrize("what", ["num_turns", "num_images"])
    async def test_one_that_makes_progress_does_not(self, what):
        watching, activity = await self.watched(), FakeConnection.answer.activity
        activity.num_running = 1
        for number in range(20):
            setattr(activity, what, number)
            await asyncio.sleep(9.0)
        assert not watching.done()
        assert await watching == "1 images are in work and no step was completed for 10 s"

    async def test_one_that_does_not_answer_does(self):
        watching = await self.watched()
        FakeConnection.answer = None
        assert await watching == "it does not answer for 10 s"
        assert 10.0 <= asyncio.get_running_loop().time() < 14.0

    async def test_one_that_answers_again_in_time_does_not(self):
        watching = await self.watched()
        info, FakeConnection.answer = FakeConnection.answer, None
        await asyncio.sleep(8.0)
        FakeConnection.answer = info
        await asyncio.sleep(1000.0)
        assert not watching.done()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
