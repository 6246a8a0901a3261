"""The scoring script for Azure ML's inference server (azmlinfsrv): `init()` starts a deployment, `run()` asks it.

A process of its own, because the inference server's workers take turns and are restarted at will: all workers of a container
share one deployment, which batches across them and outlives none of them. Whoever owns it holds the write end of a pipe; when
that end is closed, even by SIGKILL, the deployment drains and ends. A lock that the deployment holds as well keeps a second one
from being started before the first has given the GPU back.

Settings are environment variables: `AZUREML_MODEL_DIR` names the model, `MII_SERVE_*` the rest; `MII_SERVE_PYTHON` is the
interpreter that has mii_serve, where it is not this one.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

logger = logging.getLogger(__name__)

START_TIMEOUT_S = float(os.environ.get("MII_SERVE_STARTUP_TIMEOUT_S", "900"))
ANSWER_TIMEOUT_S = float(os.environ.get("SCORING_TIMEOUT_MS", "3600000")) / 1000
LOOK_S = 0.1
PROBE_TIMEOUT_S = 2.0
HOST = "127.0.0.1"
FOLDER = Path(tempfile.gettempdir()) / f"mii_serve-{os.getuid()}"
PASSED_IN = (
    "authorization",
    "api-key",
    "traceparent",
    "x-request-id",
    "x-client-id",
    "x-idempotency-key",
    "x-request-timeout-s",
)
PASSED_OUT = ("content-type", "retry-after", "www-authenticate")
PASSED_OUT_PREFIX = "x-mii-"
NOT_OURS = ("WORKER_COUNT",)
"""The inference server sets it for itself; to mii_serve it would be the number of images in work at once."""

_address_file: Path


def init() -> None:
    """Come back when there is a deployment that has made its warm-up picture, started here or by another worker.

    Raises:
        RuntimeError: there is none within `START_TIMEOUT_S`, or it ended; the inference server then ends the container.
    """
    global _address_file
    FOLDER.mkdir(mode=0o700, exist_ok=True)
    if FOLDER.stat().st_uid != os.getuid():
        raise RuntimeError(f"{FOLDER} belongs to another user")
    port = os.environ.get("SERVER_PORT", "5001")  # set by the inference server
    _address_file = FOLDER / f"address-{port}"
    lock = os.open(FOLDER / f"lock-{port}", os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + START_TIMEOUT_S
    try:
        while time.monotonic() < deadline:
            if _is_free(lock):
                _start(lock, deadline)
                return
            if _is_ready():
                return
            time.sleep(LOOK_S)
    finally:
        os.close(lock)  # the deployment has its own copy
    raise RuntimeError(f"no deployment was ready within {START_TIMEOUT_S:g} s")


def run(raw: str, request_headers: dict[str, str]):  # type: ignore[no-untyped-def]
    """The deployment's answer to `POST /score`, its status and errors included."""
    given = {name.lower(): value for name, value in request_headers.items()}
    headers = {name: given[name] for name in PASSED_IN if name in given} | {"content-type": "application/json"}
    try:
        status, answered, body = _ask("POST", "/score", raw.encode(), headers)
    except TimeoutError:
        return _response(424, {}, _refusal(424, "deadline_exceeded", "the deployment did not answer in time"))
    except OSError as error:
        logger.error("the deployment does not answer: %s", error)
        return _response(503, {}, _refusal(503, "unavailable", "the deployment does not answer; it is being restarted"))
    passed = {name: value for name, value in answered.items() if name in PASSED_OUT or name.startswith(PASSED_OUT_PREFIX)}
    return _response(status, passed | {"x-ms-run-function-failed": str(status >= 424 and status not in (429, 431))}, body)


# ---- the deployment ----------------------------------------------------------------------------------------------


def _start(lock: int, deadline: float) -> None:
    """Start the deployment and wait for its line; it lives as long as this process does."""
    _address_file.unlink(missing_ok=True)
    python = os.environ.get("MII_SERVE_PYTHON", sys.executable)
    environment = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
    environment["PYTHONSAFEPATH"] = "1"  # the folder of this script is the caller's code, not the deployment's
    process = subprocess.Popen(
        [python, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(lock,), env=environment, text=True
    )
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], max(0.0, deadline - time.monotonic()))
    line = process.stdout.readline() if ready else ""
    words = dict(word.partition("=")[::2] for word in line.split())
    if not line.startswith("ready ") or words.get("http", "off") == "off":
        process.kill()
        raise RuntimeError(f"the deployment did not start, exit code {process.wait()}; its log says why: {line!r}")
    new = _address_file.with_suffix(".new")
    new.write_text(words["http"])
    new.replace(_address_file)
    threading.Thread(target=_follow, args=(process,), name="follow-deployment", daemon=True).start()


def _follow(process: subprocess.Popen[str]) -> None:
    """A deployment that has ended takes this worker along: the inference server starts another, whose `init` begins anew."""
    code = process.wait()
    logger.error("the deployment has ended, exit code %d", code)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_free(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_ready() -> bool:
    try:
        return _ask("GET", "/readyz", b"", {}, PROBE_TIMEOUT_S)[0] == 200
    except (OSError, ValueError):
        return False


def _ask(
    method: str, path: str, body: bytes, headers: dict[str, str], timeout_s: float = ANSWER_TIMEOUT_S
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(_address_file.read_text(), timeout=timeout_s)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    except http.client.HTTPException as error:
        raise ConnectionError(str(error)) from error
    finally:
        connection.close()


def _refusal(status: int, code: str, message: str) -> bytes:
    return json.dumps({"error": {"code": code, "message": message, "status": status}, "message": message}).encode()


def _response(status: int, headers: dict[str, str], body: bytes):  # type: ignore[no-untyped-def]
    from flask import Response

    return Response(body, status, {"content-type": "application/json", **headers})


def _serve_until_abandoned() -> int:
    """The deployment itself: ends when the other end of its standard input is closed."""
    from mii_serve.cli import main

    def follow() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, name="follow-owner", daemon=True).start()
    return int(main(["deploy", "--host", HOST, "--grpc-port", "0", "--http-port", "0"]) or 0)


if __name__ == "__main__":
    sys.exit(_serve_until_abandoned())
