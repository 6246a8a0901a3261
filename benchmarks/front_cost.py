#!/usr/bin/env python3
"""What the front costs: per request, beside a bare gRPC echo; and per step of a sample, on a full server.

    python benchmarks/front_cost.py                 one minute

Engines are fakes that compute nothing. For requests there are three more processes, as in a deployment: the front, a replica,
and a bare `grpc.aio` server that answers with the same bytes, one image of about 400 KB. Both are called in turn, so that what
else the machine does affects them alike. For steps, eight replicas take twenty turns a second with sixteen samples each; the
row has the processor time of the front's process, for callers who wait for their images and for callers who read every step.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from mii_serve.bench import environment
from mii_serve.proto.codec import CHANNEL_OPTIONS
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.proto.v1.image_generation_pb2_grpc import ImageGenerationStub
from mii_serve.replica.loop import ReplicaLoop
from mii_serve.replica.service import ListenOn, replica_server
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.front import GrpcFront
from mii_serve.server.replica_client import ReplicaAddress
from mii_serve.server.router import Router
from mii_serve.types import SampleProgress, StepPlan

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from fake_engine import FakeEngine

RESULTS = Path(__file__).parent / "results"
SIDE_PX = 368
"""Raw RGB, 406 KB: no time goes into encoding."""
REQUEST = pb.GenerateRequest(
    prompt="a",
    seed=1,
    height=SIDE_PX,
    width=SIDE_PX,
    num_inference_steps=1,
    output=pb.OutputOptions(format=pb.IMAGE_FORMAT_RAW_RGB),
)
LONG_REQUEST = pb.GenerateRequest(prompt="a", seed=1, height=64, width=64, num_inference_steps=1000)
ECHO = "/bench.Echo/Generate"


class PacedEngine(FakeEngine):
    """Takes a fixed time for each turn."""

    turn_s = 0.0

    def run(self, plan: StepPlan) -> tuple[SampleProgress, ...]:
        time.sleep(self.turn_s)
        return super().run(plan)


async def replica(socket: str, num_slots: int, turn_s: float) -> None:
    engine = PacedEngine(max_slots=num_slots, max_decodes=64)
    engine.turn_s = turn_s
    loop = ReplicaLoop(engine, ThreadPoolExecutor(1), max_waiting_samples=100_000)
    server, _ = replica_server(loop, "bench", ListenOn.socket(Path(socket)))
    await server.start()
    await loop.run()


async def front(socket: str, *replica_sockets: str) -> None:
    dispatcher = Dispatcher(Router(len(replica_sockets)))
    server = GrpcFront(dispatcher)
    for index, replica_socket in enumerate(replica_sockets):
        while not Path(replica_socket).exists():  # noqa: ASYNC110, ASYNC240 - another process makes it
            await asyncio.sleep(0.05)
        await dispatcher.attach(ReplicaAddress.socket(Path(replica_socket)), index)
    port = await server.listen("127.0.0.1", 0)
    Path(socket).write_text(str(port))  # noqa: ASYNC240
    await asyncio.Event().wait()


async def echo(socket: str) -> None:
    answer = pb.GenerateResponse(images=[pb.GeneratedImage(data=os.urandom(SIDE_PX * SIDE_PX * 3))]).SerializeToString()

    async def answered(request: bytes, context: Any) -> bytes:
        return answer

    server = grpc.aio.server(options=CHANNEL_OPTIONS)
    method = grpc.unary_unary_rpc_method_handler(answered)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench.Echo", {"Generate": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    Path(socket).write_text(str(port))  # noqa: ASYNC240
    await asyncio.Event().wait()


def run(role: Any, *arguments: Any) -> None:
    asyncio.run(role(*arguments))


@contextlib.contextmanager
def deployment(num_replicas: int, num_slots: int, turn_s: float) -> Iterator[tuple[str, str, int]]:
    """The addresses of a front and of an echo, and the front's process id."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sockets = [str(folder / f"replica-{index}") for index in range(num_replicas)]
        processes = [spawn.Process(target=run, args=(replica, one, num_slots, turn_s), daemon=True) for one in sockets]
        processes.append(spawn.Process(target=run, args=(echo, str(folder / "echo")), daemon=True))
        fronting = spawn.Process(target=run, args=(front, str(folder / "front"), *sockets), daemon=True)
        processes.append(fronting)
        for process in processes:
            process.start()
        while not all((folder / role).exists() and (folder / role).read_text() for role in ("echo", "front")):
            time.sleep(0.1)
        assert fronting.pid is not None
        try:
            yield (
                f"127.0.0.1:{(folder / 'front').read_text()}",
                f"127.0.0.1:{(folder / 'echo').read_text()}",
                fronting.pid,
            )
        finally:
            for process in processes:
                process.kill()


async def cost_of_requests(front_at: str, echo_at: str, num_calls: int, concurrency: int) -> dict[str, Any]:
    targets = {"echo": echo_at, "front": front_at}
    channels = {name: grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS) for name, target in targets.items()}
    calls = {name: ImageGenerationStub(channel).Generate for name, channel in channels.items()}
    calls["echo"] = channels["echo"].unary_unary(
        ECHO, request_serializer=pb.GenerateRequest.SerializeToString, response_deserializer=pb.GenerateResponse.FromString
    )
    for call in calls.values():
        for _ in range(50):
            await call(REQUEST)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(num_calls):
        for name, call in calls.items():
            start = time.perf_counter()
            await call(REQUEST)
            times[name].append(1e3 * (time.perf_counter() - start))
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(3):
        for name, call in calls.items():
            rates[name].append(await throughput(call, num_calls, concurrency))
    for channel in channels.values():
        await channel.close()
    medians = {name: statistics.median(values) for name, values in times.items()}
    rate = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "latency_ms": {name: round(value, 2) for name, value in medians.items()},
        "latency_times_echo": round(medians["front"] / medians["echo"], 1),
        "requests_per_s": {name: round(value) for name, value in rate.items()},
        "throughput_times_echo": round(rate["front"] / rate["echo"], 3),
    }


async def cost_of_steps(front_at: str, front_pid: int, num_images: int, seconds: float) -> dict[str, Any]:
    """The front's processor time for each step of a sample while the server is full."""
    row: dict[str, Any] = {}
    async with grpc.aio.insecure_channel(front_at, options=CHANNEL_OPTIONS) as channel:
        stub = ImageGenerationStub(channel)

        async def wait_for_images() -> None:
            await stub.Generate(LONG_REQUEST)

        async def read_steps() -> None:
            async for _ in stub.GenerateStream(LONG_REQUEST):
                pass

        for name, caller in (("callers_who_wait", wait_for_images), ("callers_who_read_steps", read_steps)):
            calls = [asyncio.create_task(caller()) for _ in range(num_images)]
            while (await stub.GetServerInfo(pb.GetServerInfoRequest())).activity.num_running < num_images:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            before = (await stub.GetServerInfo(pb.GetServerInfoRequest())).activity.num_steps
            cpu_before_s, start = cpu_s(front_pid), time.perf_counter()
            await asyncio.sleep(seconds)
            used_s, wall_s = cpu_s(front_pid) - cpu_before_s, time.perf_counter() - start
            num_steps = (await stub.GetServerInfo(pb.GetServerInfoRequest())).activity.num_steps - before
            row[name] = {
                "steps_per_s": round(num_steps / wall_s),
                "us_per_step": round(1e6 * used_s / num_steps, 1),
                "share_of_a_core": round(used_s / wall_s, 3),
            }
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            while (await stub.GetServerInfo(pb.GetServerInfoRequest())).activity.num_running:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
    return row


def cpu_s(pid: int) -> float:
    """Processor time of a process so far, from https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def throughput(call: Any, num_calls: int, concurrency: int) -> float:
    left = iter(range(num_calls))

    async def caller() -> None:
        for _ in left:
            await call(REQUEST)

    start = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(concurrency)))
    return num_calls / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--slots", type=int, default=16, help="samples in work on each replica")
    parser.add_argument("--turn-ms", type=float, default=50.0)
    parser.add_argument("--seconds", type=float, default=8.0, help="how long the front's processor time is measured")
    parser.add_argument("--out", type=Path, default=RESULTS / "front-cost.json")
    arguments = parser.parse_args()
    with deployment(1, 64, 0.0) as (front_at, echo_at, _):
        requests = asyncio.run(cost_of_requests(front_at, echo_at, arguments.calls, arguments.concurrency))
    with deployment(arguments.replicas, arguments.slots, arguments.turn_ms / 1e3) as (front_at, _, pid):
        steps = asyncio.run(cost_of_steps(front_at, pid, arguments.replicas * arguments.slots, arguments.seconds))
    row = {"requests": requests, "steps": steps}
    print(json.dumps(row))
    about = environment.circumstances()
    machine = {"cores": os.cpu_count(), "picture_bytes": SIDE_PX * SIDE_PX * 3}
    calls = {name: value for name, value in vars(arguments).items() if name != "out"}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**about, **machine, **calls, **row}, indent=1) + "\n")


if __name__ == "__main__":
    main()
