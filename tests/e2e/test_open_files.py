"""A deployment that may have few open files, and strangers who would like to have them all."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import urllib.error
import urllib.request

from deployments import deployed, finished, start, until
from patience import PATIENCE_S

from mii_serve.client import Client
from mii_serve.server import open_files

MAX_FILES = 256
NUM_IDLE = 300
MAX_LINES = 40


def status(address: str, path: str) -> int:
    """0 where there is no answer."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=PATIENCE_S) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


def connected(address: str, stack: contextlib.ExitStack, greeting: bytes) -> None:
    host, _, port = address.rpartition(":")
    connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=PATIENCE_S))
    with contextlib.suppress(OSError):
        connection.sendall(greeting)


HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"


def test_idle_connections_silence_no_probe_and_stop_no_replica_from_coming_back():
    with deployed("demo", max_files=MAX_FILES, has_model=False) as running:
        with contextlib.ExitStack() as idle:
            for i in range(NUM_IDLE):
                connected(running.http, idle, [b"", b"GET /livez HT", b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"][i % 3])
                connected(running.grpc, idle, [b"", HTTP2][i % 2])
                if i % 50 == 49:
                    assert status(running.http, "/livez") == 200, f"after {i + 1} idle connections"
            [replica] = running.replica_pids()
            os.kill(replica, signal.SIGKILL)
            until(lambda: status(running.http, "/readyz") == 503, "the loss is noticed")
            until(lambda: status(running.http, "/readyz") == 200, "the replica is back")
            assert [status(running.http, path) for path in ("/livez", "/", "/metrics", "/v1/models")] == [200] * 4
        with Client(running.grpc) as client:
            assert client.generate("a red circle", num_inference_steps=2, timeout=PATIENCE_S).images
        assert running.logged().count("\n") < MAX_LINES, running.logged()
        assert running.stop(signal.SIGTERM) == 0


def test_a_limit_that_is_too_low_to_serve_is_told_at_the_start():
    with start("demo", max_files=80) as process:
        _, said = finished(process)
    assert process.returncode == 2 and "ulimit -n: " in said and "Traceback" not in said


def test_the_limit_is_raised_as_far_as_it_goes():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, before[1]))
    try:
        limits = open_files.connection_limits(1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(before[1], open_files.MOST_FILES)
        assert limits.http == limits.grpc > (1024 - 80) // 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
