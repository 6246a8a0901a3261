#!/usr/bin/env python3
"""What the front adds to a request: the whole way with an engine that computes nothing, beside a bare gRPC echo.

    python benchmarks/front_cost.py                 half a minute

Four processes, as in a deployment: the caller, the front, a replica with the fake engine, and a bare `grpc.aio` server that
answers with the same bytes. Each answer carries one picture of about 400 KB. The three ways are asked in turn, so that what
else the machine does meets them alike. `added` is front minus replica asked directly.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from mii_serve.bench import environment
from mii_serve.proto.codec import CHANNEL_OPTIONS
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.proto.v1.image_generation_pb2_grpc import ImageGenerationStub
from mii_serve.replica.loop import ReplicaLoop
from mii_serve.replica.service import replica_server
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.front import GrpcFront
from mii_serve.server.router import Router

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
ECHO = "/bench.Echo/Generate"


async def replica(socket: str) -> None:
    loop = ReplicaLoop(FakeEngine(max_slots=64, max_decodes=64), ThreadPoolExecutor(1), max_waiting_samples=100_000)
    server = replica_server(loop, "bench", Path(socket))
    await server.start()
    await loop.run()


async def front(replica_socket: str, socket: str) -> None:
    dispatcher = Dispatcher(Router())
    server = GrpcFront(dispatcher)
    while not Path(replica_socket).exists():  # noqa: ASYNC110, ASYNC240 - another process makes it
        await asyncio.sleep(0.05)
    await dispatcher.attach(ReplicaAddress.socket(Path(replica_socket)))
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


def run(role: Any, *arguments: str) -> None:
    asyncio.run(role(*arguments))


async def measure(folder: Path, num_calls: int, concurrency: int) -> dict[str, Any]:
    targets = {
        "echo": f"127.0.0.1:{(folder / 'echo').read_text()}",
        "replica": f"unix:{folder / 'replica'}",
        "front": f"127.0.0.1:{(folder / 'front').read_text()}",
    }
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
        "added_ms": round(medians["front"] - medians["replica"], 2),
        "latency_times_echo": round(medians["front"] / medians["echo"], 1),
        "requests_per_s": {name: round(value) for name, value in rate.items()},
        "throughput_times_echo": round(rate["front"] / rate["echo"], 3),
    }


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
    parser.add_argument("--out", type=Path, default=RESULTS / "front-cost.json")
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = {role: str(folder / role) for role in ("replica", "front", "echo")}
        roles = ((replica, paths["replica"]), (front, paths["replica"], paths["front"]), (echo, paths["echo"]))
        processes = [spawn.Process(target=run, args=role, daemon=True) for role in roles]
        for process in processes:
            process.start()
        while not all((folder / role).exists() for role in paths):
            time.sleep(0.1)
        time.sleep(0.5)
        row = asyncio.run(measure(folder, arguments.calls, arguments.concurrency))
        for process in processes:
            process.kill()
    print(json.dumps(row))
    about = environment.circumstances()
    machine = {"cores": os.cpu_count(), "picture_bytes": SIDE_PX * SIDE_PX * 3}
    calls = {"calls": arguments.calls, "concurrency": arguments.concurrency}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**about, **machine, **calls, **row}, indent=1) + "\n")


if __name__ == "__main__":
    main()
