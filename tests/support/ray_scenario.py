"""Runs the application on a real Ray, in a network of its own, and tells what happened as one JSON object, its last line.

usage: ray_scenario.py FOLDER, as the first process of new network and process name spaces, with the Python that has Ray. A part
that fails does not end the others; its traceback is what it tells.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import copy
import json
import os
import secrets
import signal
import subprocess
import sys
import time
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from mii_serve.client import Client
from mii_serve.errors import InvalidRequestError, MiiServeError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "deployment" / "ray_serve" / "config.yaml"
BIN = Path(sys.executable).parent
GRPC, HTTP = "127.0.0.1:9000", "http://127.0.0.1:8000"
DIRECT_GRPC, DIRECT_HTTP = "127.0.0.1:50050", "http://127.0.0.1:5001"
ELSEWHERE = "10.9.8.7"
"""An address of this machine that is none of loopback."""
WAIT_S = 300.0
CALL_S = 240.0
FEW = {"num_inference_steps": 3}
SOME = {"num_inference_steps": 40, "scheduler": "euler"}
PROMPT = "a red circle"

Told = dict[str, Any]


def main(folder: Path) -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["ip", "address", "add", f"{ELSEWHERE}/32", "dev", "lo"], check=True)
    os.environ |= {"HOME": str(folder), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    start = [BIN / "ray", "start", "--head", "--node-ip-address=127.0.0.1", "--num-cpus=8", "--include-dashboard=false"]
    bounds = ["--object-store-memory=100000000", "--disable-usage-stats", f"--temp-dir={folder / 'ray'}"]
    often = {"RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1"}
    subprocess.run([*start, *bounds], check=True, stdout=sys.stderr, env={**os.environ, **often})
    os.environ["RAY_ADDRESS"] = "127.0.0.1:6379"
    scenario = Scenario(folder)
    told = {part.__name__: attempt(part) for part in scenario.parts}
    print(json.dumps(told))


def attempt(part: Callable[[], Told]) -> Told:
    began = time.monotonic()
    try:
        told = part()
    except Exception:  # noqa: BLE001 - whatever it was, the other parts are to run
        told = {"failed": traceback.format_exc()}
    seconds = round(time.monotonic() - began, 1)
    print(f"{part.__name__}: {seconds} s, {told}", file=sys.stderr, flush=True)
    return {**told, "seconds": seconds}


class Scenario:
    """The parts run in their order; each begins with what the one before it left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_runs = 0
        self.client = Client(GRPC, max_retries=0)
        self.parts = [self.starts, self.clients, self.scales, self.redeploys, self.survives, self.ranks]

    def run(self, **args: Any) -> None:
        """`serve run` with the project's own configuration, and these arguments."""
        config = copy.deepcopy(yaml.safe_load(CONFIG.read_text()))
        [application] = config["applications"]
        application["args"] = {**application["args"], "num_cpus": 0.5, "max_slots": 4, **args}
        for deployment in application["deployments"]:
            if deployment["name"] == "Front":
                deployment["ray_actor_options"] = {"num_cpus": 0.5}
        self._num_runs += 1
        file = self._folder / f"{self._num_runs}.yaml"
        file.write_text(yaml.safe_dump(config))
        with (self._folder / f"serve-{self._num_runs}.log").open("w") as log:
            subprocess.Popen([BIN / "serve", "run", file], stdout=log, stderr=log)

    # --- the parts

    def starts(self) -> Told:
        self.run(replicas=1, max_replicas=2, target_queued_s=2, upscale_delay_s=1, downscale_delay_s=2)
        until(lambda: len(self.ready()) == 1)
        return {"listening": {port: address for address, port in listening() if port in (8000, 9000)}}

    def clients(self) -> Told:
        """Everybody's client, through Ray's proxy and on the front's own ports."""
        drawn = self.client.generate(PROMPT, seed=5, timeout=CALL_S, **FEW)
        with Client(DIRECT_GRPC) as direct:
            same = direct.generate(PROMPT, seed=5, timeout=CALL_S, **FEW)
        with Client(f"{ELSEWHERE}:9000", max_retries=0) as stranger:
            from_elsewhere = refusal(lambda: stranger.generate(PROMPT, timeout=CALL_S))
        mii = [ROOT / ".clients/mii/bin/python", ROOT / "tests/clients/mii_pictures.py", *GRPC.split(":"), ROOT]
        openai = [ROOT / ".clients/openai/bin/python", ROOT / "tests/clients/openai_one.py", HTTP]
        return {
            "seeds": list(drawn.seeds),
            "same": drawn.images[0].tobytes() == same.images[0].tobytes(),
            "events": [type(event).__name__ for event in self.client.stream(PROMPT, timeout=CALL_S, **FEW)],
            "unary error": refusal(lambda: self.client.generate(PROMPT, num_inference_steps=0)),
            "stream error": refusal(lambda: list(self.client.stream(PROMPT, height=7))),
            "deadline": refusal(
                lambda: self.client.generate(PROMPT, num_inference_steps=1000, scheduler="euler", timeout=CALL_S / 100)
            ),
            "health": self.client.health(),
            "from elsewhere": from_elsewhere,
            "mii": theirs(mii),
            "openai": theirs(openai),
            "http": {path: status(HTTP + path) for path in ("/readyz", "/metrics", "/", "/nothing")},
            "direct http": status(DIRECT_HTTP + "/readyz"),
        }

    def scales(self) -> Told:
        """From one replica to two under load, and back."""
        asked = self.keep_asking(16, lambda: len(self.ready()) == 2, **SOME)
        most = len(self.ready())
        until(lambda: len(self.ready()) == 1 and len(self.processes("Replica")) == 1)
        return {"answers": outcomes(asked), "most": most}

    def redeploys(self) -> Told:
        """Other settings, and so another front and other replicas, while requests never stop."""
        old = set(self.processes())
        self.run(replicas=2, max_replicas=None, deployment_name="redeployed")
        asked = self.keep_asking(6, lambda: not old & set(self.processes()) and len(self.ready()) == 2, **SOME)
        until(lambda: status(DIRECT_HTTP + "/readyz") == 200)
        return {"answers": outcomes(asked), "name": self.client.server_info(timeout=CALL_S).deployment_name}

    def survives(self) -> Told:
        """Kill the replica that has all the work."""
        alone = [self.ask(seed, **SOME) for seed in range(12)]
        long = self.client.stream(PROMPT, seed=1, num_inference_steps=1000, scheduler="euler")
        next(iter(long))
        with self.load(range(12), **SOME) as asked:
            until(lambda: sum(self.loads().values()) == 13)
            long.cancel()
            until(lambda: sorted(self.loads().values())[0] == 0)
            before = self.loads()
            victim = max(self.processes("Replica"), key=lambda pid: self.cpu_s(pid))
            os.kill(victim, signal.SIGKILL)
        pictures = [one.result() for one in asked if one.exception() is None]
        differences = [largest_difference(*pair) for pair in zip(alone, pictures, strict=False)]
        until(lambda: len(self.ready()) == 2)
        return {"answers": outcomes(asked), "before": sorted(before.values()), "differences": differences}

    def ranks(self) -> Told:
        """Two ranks of one replica, in one placement group."""
        self.run(replicas=1, max_replicas=None, tensor_parallel=2, deployment_name="ranks")
        until(lambda: self.info_or_none() is not None and self.client.server_info().deployment_name == "ranks")
        until(lambda: [info.is_ready for info in self.client.server_info().replicas] == [True])
        drawn = self.client.generate(PROMPT, seed=5, timeout=CALL_S, **FEW)
        script = (
            "import ray; ray.init(address='auto', log_to_driver=False); from ray.util import placement_group_table as table;"
            "print([g['bundles'] for g in table().values() if g['state'] == 'CREATED'])"
        )
        groups = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=WAIT_S, check=True)
        return {
            "num_ranks": self.client.server_info().num_ranks,
            "seeds": list(drawn.seeds),
            "groups": groups.stdout.splitlines()[-1],
        }

    # --- what is going on

    def ask(self, seed: int, **options: Any) -> bytes:
        return self.client.generate(PROMPT, seed=seed, timeout=CALL_S, **options).images[0].tobytes()

    @contextlib.contextmanager
    def load(self, seeds: range, **options: Any) -> Iterator[list[concurrent.futures.Future[bytes]]]:
        """One request for each seed, all at once; they are awaited when the block has ended."""
        with concurrent.futures.ThreadPoolExecutor(len(seeds)) as pool:
            yield [pool.submit(self.ask, seed, **options) for seed in seeds]

    def keep_asking(self, at_once: int, is_done: Callable[[], bool], **options: Any) -> list[concurrent.futures.Future[bytes]]:
        """Requests, so many at any time, until something has come about and all are answered."""
        asked: list[concurrent.futures.Future[bytes]] = []

        def asked_enough() -> bool:
            missing = at_once - sum(not one.done() for one in asked)
            asked.extend(pool.submit(self.ask, 100 + len(asked) + i, **options) for i in range(missing))
            return is_done()

        with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
            until(asked_enough)
        return asked

    def info_or_none(self) -> Any:
        try:
            return self.client.server_info(timeout=CALL_S)
        except MiiServeError:
            return None

    def ready(self) -> list[int]:
        info = self.info_or_none()
        return [] if info is None else [replica.index for replica in info.replicas if replica.is_ready]

    def loads(self) -> dict[int, int]:
        """Images in work or in the queue of each replica."""
        info = self.client.server_info(timeout=CALL_S)
        known = {replica.index: replica.activity for replica in info.replicas if replica.activity is not None}
        return {index: activity.num_running + activity.num_waiting for index, activity in known.items()}

    def processes(self, *names: str) -> list[int]:
        """Ray calls its processes after what runs in them."""
        wanted = [f"ray::ServeReplica:pictures:{name}" for name in names or ("Front", "Replica")]
        return [one.pid for one in psutil.process_iter() if any(name in " ".join(command(one)) for name in wanted)]

    def cpu_s(self, pid: int) -> float:
        """The seconds of CPU that it takes in a moment: the one that works takes most."""
        process = psutil.Process(pid)
        before = process.cpu_times()
        time.sleep(1.0)
        after = process.cpu_times()
        return (after.user + after.system) - (before.user + before.system)


def command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it does not come about")
        time.sleep(0.2)


def refusal(call: Callable[[], object]) -> list[str]:
    """The class of the error that the call ends with, its text, and its field where it has one."""
    try:
        call()
    except InvalidRequestError as error:
        return [type(error).__name__, str(error), error.field]
    except MiiServeError as error:
        return [type(error).__name__, str(error)]
    return []


def outcomes(asked: list[concurrent.futures.Future[bytes]]) -> dict[str, int]:
    errors = [one.exception() for one in asked]
    return dict(collections.Counter("ok" if error is None else f"{type(error).__name__}: {error}" for error in errors))


def largest_difference(one: bytes, other: bytes) -> int:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def theirs(command: list[object]) -> Any:
    """What a client in an environment of its own says in its last line; None where it is not installed."""
    if not Path(str(command[0])).exists():
        return None
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=WAIT_S, env=environment)
    if ran.returncode:
        raise RuntimeError(ran.stderr[-2000:])
    return json.loads(ran.stdout.splitlines()[-1])


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=CALL_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def listening() -> list[tuple[str, int]]:
    """Addresses and ports that something listens on."""
    return [(one.laddr.ip, one.laddr.port) for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
