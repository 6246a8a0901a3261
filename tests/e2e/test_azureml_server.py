"""Azure ML's own inference server with our scoring script: two workers, one deployment, and nothing left when they go."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from deployments import WITHOUT_SPARE, until
from outside import ROOT
from patience import PATIENCE_S
from PIL import Image

from mii_serve.models.source import DEMO_FOLDER

SERVER = ROOT / ".clients" / "azmlinfsrv" / "bin" / "azmlinfsrv"
SCRIPT = ROOT / "deployment" / "azureml" / "score.py"
SAMPLE = {
    "input_data": {
        "columns": ["prompt"],
        "data": ["a red circle on a blue background", "a skull"],
        "parameters": {"num_inference_steps": 2, "seed": 3},
    }
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class InferenceServer:
    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self.port = port
        self.log = log
        self.process = process

    def post(self, body: bytes, **headers: str) -> tuple[int, dict[str, str], bytes]:
        given = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/score", body, given)
        try:
            answer = urllib.request.urlopen(request, timeout=PATIENCE_S)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            return answer.status, {name.lower(): value for name, value in answer.headers.items()}, answer.read()

    def answers(self) -> bool:
        with contextlib.suppress(OSError):
            return self.post(json.dumps(SAMPLE).encode())[0] == 200
        return False

    def deployments(self) -> list[psutil.Process]:
        """Processes that run our script as the deployment, whoever their parent is."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            with contextlib.suppress(psutil.Error):
                if (process.info["cmdline"] or [])[1:] == [str(SCRIPT)] and process.environ().get("SERVER_PORT") == str(
                    self.port
                ):
                    found.append(process)
        return found


def catalog_folder(folder: Path) -> Path:
    """The built-in model as Azure's catalog mounts one."""
    inner = folder / "tiny-pictures" / "4" / "mlflow_model_folder" / "artifacts" / "INPUT_model_path"
    shutil.copytree(DEMO_FOLDER, inner)
    (inner.parent.parent / "MLmodel").write_text("flavors: {}\n")
    return folder / "tiny-pictures" / "4"


@pytest.fixture
def server(tmp_path: Path):
    port = free_port()
    environment = {**os.environ, **WITHOUT_SPARE, "MII_SERVE_PYTHON": sys.executable, "TMPDIR": str(tmp_path)}
    command = [str(SERVER), "--entry_script", str(SCRIPT), "--port", str(port), "--worker_count", "2"]
    command += ["--model_dir", str(catalog_folder(tmp_path))]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=tmp_path, start_new_session=True)
    running = InferenceServer(port, process, tmp_path / "log")
    try:
        until(lambda: process.poll() is not None or running.answers(), "the inference server answers")
        assert process.poll() is None
        yield running
    except BaseException:
        print((tmp_path / "log").read_text()[-6000:], file=sys.stderr)
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(PATIENCE_S)


@pytest.mark.slow
def test_the_script_serves_and_leaves_nothing_behind(server):
    status, headers, body = server.post(json.dumps(SAMPLE).encode(), x_request_id="mine")
    first, second = json.loads(body)
    assert status == 200 and headers["x-request-id"] == "mine" and headers["x-ms-run-function-failed"] == "False"
    assert (first["prompt"], first["nsfw_content_detected"], second["nsfw_content_detected"]) == (
        SAMPLE["input_data"]["data"][0],
        False,
        True,
    )
    image = Image.open(io.BytesIO(base64.b64decode(first["generated_image"])))
    assert (image.format, image.mode) == ("PNG", "RGB")
    for bad in ({"input_data": {}}, {**SAMPLE, "params": {"steps": 3}}):
        status, headers, body = server.post(json.dumps(bad).encode())
        assert status == 400 and json.loads(body)["error"]["param"] and headers["x-ms-run-function-failed"] == "False"
    status, _, body = server.post(b"{")
    assert status == 400 and json.loads(body)["message"]

    assert "serving tiny-pictures " in server.log.read_text()

    [deployment] = server.deployments()
    owner = deployment.parent()
    assert owner is not None and owner.pid != server.process.pid
    owner.kill()  # the hard way: nothing of the worker's own runs any more
    until(lambda: not deployment.is_running(), "the deployment is gone with its owner")
    until(server.answers, "another worker has started another")
    [other] = server.deployments()
    assert other.pid != deployment.pid

    server.process.send_signal(signal.SIGTERM)
    server.process.wait(PATIENCE_S)
    until(lambda: not server.deployments(), "nothing is left")
