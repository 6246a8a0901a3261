"""How a deployment ends when it is told twice, and where it has no output, no room for its sockets, or a hostile folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from deployments import ENDLESS, WITHOUT_SPARE, deployed, read_line, start, until, without_models
from patience import PATIENCE_S

from mii_serve.client import Client
from mii_serve.errors import UnavailableError

INFO_ROUTES = ("/ui/state", "/ui/info", "/metrics", "/v1/models", "/info", "/readyz", "/livez", "/")
SECOND_SIGNALS = [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)]


def posted(address: str, path: str, body: dict) -> tuple[int, dict]:
    asked = urllib.request.Request(f"http://{address}{path}", json.dumps(body).encode(), {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=PATIENCE_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def status_of(address: str, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=PATIENCE_S) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def signal_twice(process: subprocess.Popen, first: int, second: int, log: Path) -> None:
    """The second one once the first has been seen, or they could be one."""
    process.send_signal(first)
    if first == second:
        until(lambda: "draining" in log.read_text(), "the first signal is noticed")
    process.send_signal(second)


class Logged:
    """A deployment whose log can be read while it runs."""

    def __init__(self, folder: Path, *, has_model: bool) -> None:
        self.log = folder / "log.txt"
        with self.log.open("w") as log:
            self.process = start("demo", stderr=log, has_model=has_model)

    def __enter__(self) -> Logged:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=PATIENCE_S)

    def ready(self) -> tuple[str, str]:
        with self.log.open() as log:
            words = dict(word.partition("=")[::2] for word in read_line(self.process, log).split())
        return words["grpc"], words["http"]

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.mark.parametrize(("first", "second"), SECOND_SIGNALS)
def test_a_second_signal_ends_at_once_and_callers_are_told_why(tmp_path, first, second):
    with Logged(tmp_path, has_model=False) as running:
        grpc_address, http = running.ready()
        answers: dict[str, tuple[int, dict]] = {}

        def ask(path: str, body: dict) -> None:
            answers[path] = posted(http, path, body)

        endless = {"input_data": {"columns": ["prompt"], "data": ["a red circle"]}, "parameters": ENDLESS}
        askers = [
            threading.Thread(target=ask, args=("/score", endless)),
            threading.Thread(target=ask, args=("/v1/images/generations", {"prompt": "a", "size": "128x128", **ENDLESS})),
        ]
        with Client(grpc_address) as client:
            for asker in askers:
                asker.start()
            stream = client.stream("a red circle", **ENDLESS)
            next(iter(stream))
            until(lambda: client.server_info().activity.num_running >= 2, "those over HTTP run too")
            children = running.children()
            signal_twice(running.process, first, second, running.log)
            assert running.process.wait(PATIENCE_S) == 0
            with pytest.raises(UnavailableError, match="the server is stopping"):
                stream.result()
        for asker in askers:
            asker.join(PATIENCE_S)
        assert answers["/score"][0] == 503 and answers["/score"][1]["error"]["code"] == "unavailable", answers
        assert "the server is stopping" in answers["/score"][1]["message"]
        log = running.log.read_text()
        assert "Traceback" not in log and "was lost" not in log and "restarting" not in log, log
        until(lambda: not any(child.is_running() for child in children), "no process is left")


def test_a_replica_that_answers_no_signal_does_not_outlive_the_second_one(tmp_path):
    with Logged(tmp_path, has_model=False) as running:
        running.ready()
        [replica] = [child for child in running.children() if "spare" not in child.cmdline()]
        replica.suspend()
        signal_twice(running.process, signal.SIGTERM, signal.SIGINT, running.log)
        assert running.process.wait(PATIENCE_S) == 0
        until(lambda: not replica.is_running(), "the replica is gone")
        assert "Traceback" not in running.log.read_text()


def test_a_caller_who_sends_slowly_is_told_too_when_the_server_has_waited_long_enough(tmp_path):
    with Logged(tmp_path, has_model=False) as running:
        _, http = running.ready()
        host, _, port = http.rpartition(":")
        with socket.create_connection((host, int(port))) as slow:
            slow.sendall(f"POST /score HTTP/1.1\r\nhost: {http}\r\ncontent-type: application/json\r\n".encode())
            slow.sendall(b"content-length: 100\r\n\r\n{")
            assert status_of(http, "/readyz") == 200
            running.process.send_signal(signal.SIGTERM)
            slow.settimeout(60)
            answer = slow.recv(65536)
            assert answer.startswith(b"HTTP/1.1 503 "), answer
        assert running.process.wait(PATIENCE_S) == 0
        assert "Traceback" not in running.log.read_text()


@pytest.mark.parametrize(
    ("signals", "is_spawned"),
    [
        ((signal.SIGTERM,), False),
        ((signal.SIGINT,), False),
        ((signal.SIGTERM,), True),
        ((signal.SIGTERM, signal.SIGINT), True),
    ],
)
def test_signals_while_it_starts_end_it_in_good_order(tmp_path, signals, is_spawned):
    with Logged(tmp_path, has_model=True) as running:
        until(lambda: "deploying demo" in running.log.read_text(), "it has begun")
        if is_spawned:
            until(running.children, "the replica has been started")
        children = running.children()
        for number in signals:
            if running.process.poll() is None:
                running.process.send_signal(number)
        assert running.process.wait(PATIENCE_S) == 0
        until(lambda: not any(child.is_running() for child in children), "no process is left")
        log = running.log.read_text()
        assert "Traceback" not in log and "error: " not in log, log


def test_what_only_asks_is_answered_while_a_replica_that_hangs_is_replaced():
    with deployed("demo", env={"MII_SERVE_HANG_TIMEOUT_S": "5"}, has_model=False) as running:
        [first] = running.replica_pids()
        seen: dict[str, set[int]] = {path: set() for path in INFO_ROUTES}
        is_over = threading.Event()

        def ask(path: str) -> None:
            while not is_over.is_set():
                seen[path].add(status_of(running.http, path))
                time.sleep(0.1)  # all of them together take little from the replica that starts

        askers = [threading.Thread(target=ask, args=(path,)) for path in INFO_ROUTES for _ in range(2)]
        for asker in askers:
            asker.start()
        try:
            until(lambda: all(200 in statuses for statuses in seen.values()), "all have been answered once")
            os.kill(first, signal.SIGSTOP)
            until(lambda: not psutil.pid_exists(first), "the replica is killed")
            until(lambda: status_of(running.http, "/readyz") == 200, "another one is ready")
        finally:
            is_over.set()
            for asker in askers:
                asker.join()
        assert all(statuses <= {200, 503} for statuses in seen.values()), seen
        assert seen["/livez"] == {200} and 200 in seen["/ui/state"]


def is_ready_at(address: str) -> bool:
    try:
        return status_of(address, "/readyz") == 200
    except OSError:
        return False


@pytest.mark.parametrize("redirection", ["<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_without_standard_streams_it_serves_and_ends_cleanly(redirection):
    port = free_port()
    command = f"exec {sys.executable} -m mii_serve deploy demo --grpc-port 0 --http-port {port} {redirection}"
    with subprocess.Popen(["sh", "-c", command], env=without_models({**os.environ, **WITHOUT_SPARE})) as process:
        try:
            until(lambda: is_ready_at(f"127.0.0.1:{port}"), "it is ready")
            assert (
                posted(f"127.0.0.1:{port}", "/v1/images/generations", {"prompt": "a red circle", "size": "128x128"})[0] == 200
            )
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()


def test_a_reader_that_goes_away_ends_nothing():
    """Of the ready line and of the log alike."""
    read, write = os.pipe()
    port = free_port()
    command = [sys.executable, "-m", "mii_serve", "deploy", "demo", "--grpc-port", "0", "--http-port", str(port)]
    environment = without_models({**os.environ, **WITHOUT_SPARE})
    with subprocess.Popen(command, stdout=write, stderr=write, env=environment) as process:
        os.close(write)
        os.close(read)
        try:
            until(lambda: is_ready_at(f"127.0.0.1:{port}"), "it is ready")
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def socket_folder_of(pid: int) -> Path:
    """Of the replica's server, as the kernel knows it."""
    [connection] = [c for c in psutil.Process(pid).net_connections("unix") if c.laddr and "mii_serve-" in c.laddr][:1]
    return Path(connection.laddr).parent


def test_a_folder_for_sockets_that_is_too_long_or_cleaned_away_does_no_harm(tmp_path):
    long = tmp_path / ("x" * 120)
    long.mkdir()
    with deployed("demo", env={"TMPDIR": str(long)}, has_model=False) as running, Client(running.grpc) as client:
        [first] = running.replica_pids()
        folder = socket_folder_of(first)
        assert folder.stat().st_mode & 0o777 == 0o700
        shutil.rmtree(folder)
        assert client.generate("a red circle", num_inference_steps=2).images
        os.kill(first, signal.SIGKILL)
        assert client.generate("a red circle", num_inference_steps=2).images
        [second] = running.replica_pids()
        again = socket_folder_of(second)
        assert again.stat().st_mode & 0o777 == 0o700
        assert running.stop() == 0
        assert not again.exists()


def write_traps(folder: Path, marker: Path) -> None:
    """Modules that a server might import, each of which tells that it was."""
    trap = f"open({str(marker)!r}, 'a').write(__name__ + chr(10))\nraise ImportError('a trap')\n"
    names = ["json", "torch", "numpy", "grpc", "diffusers", "deepspeed", "mii", "torchsde", "sitecustomize", "usercustomize"]
    for name in names:
        (folder / f"{name}.py").write_text(trap)


def test_nothing_that_lies_in_the_current_folder_is_run(tmp_path):
    marker = tmp_path / "marker"
    folder = tmp_path / "model"
    folder.mkdir()
    write_traps(folder, marker)
    commands = ([sys.executable, "-m", "mii_serve"], [str(Path(sys.executable).with_name("mii_serve"))])
    for number, command in enumerate(commands):
        if number:  # by then the command's own Python has looked for the package: only `python -m` finds one here
            (folder / "mii_serve").mkdir()
            (folder / "mii_serve" / "__init__.py").write_text((folder / "json.py").read_text())
        with (
            (tmp_path / "log").open("w+") as log,
            subprocess.Popen(
                [*command, "deploy", "demo", "--grpc-port", "0", "--http-port", "0"],
                cwd=folder,
                env={**os.environ, **WITHOUT_SPARE},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            ) as process,
        ):
            try:
                read_line(process, log)
                process.send_signal(signal.SIGTERM)
                assert process.wait(PATIENCE_S) == 0
            finally:
                process.kill()
        assert not marker.exists(), marker.read_text()
