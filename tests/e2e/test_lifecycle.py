"""Start, readiness, ports, restart, drain and end of a deployment, seen from outside."""

from __future__ import annotations

import os
import signal
import socket
import threading
import urllib.error
import urllib.request

import psutil
import pytest
from deployments import deployed, finished, read_line, start, until
from patience import PATIENCE_S

from mii_serve.client import Client, Restarted
from mii_serve.errors import UnavailableError


def http_status(address: str, path: str) -> int:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=PATIENCE_S) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_a_deployment_lives_serves_and_ends_cleanly(tmp_path):
    with deployed("demo", "--deployment-name", "mine", has_model=False) as running:
        assert [http_status(running.http, path) for path in ("/livez", "/readyz", "/")] == [200, 200, 200]
        [replica] = running.replica_pids()
        assert running.spare_pids() == [], "there is one only where the setting says so"
        command_line = " ".join(psutil.Process(replica).cmdline())
        assert "mine" not in command_line, "the configuration does not travel on argv"
        with Client(running.grpc) as client:
            assert client.server_info().deployment_name == "mine"
        assert running.stop(signal.SIGTERM) == 0
        until(lambda: not psutil.pid_exists(replica), "the replica is gone")


def test_running_work_is_finished_before_the_end():
    patient = {"MII_SERVE_DRAIN_TIMEOUT_S": str(PATIENCE_S)}
    with deployed("demo", env=patient, has_model=False) as running, Client(running.grpc) as client:
        stream = client.stream("a red circle", num_inference_steps=60)
        next(iter(stream))
        code: list[int] = []
        stopper = threading.Thread(target=lambda: code.append(running.stop(signal.SIGTERM)))
        stopper.start()
        assert stream.result().images
        stopper.join(PATIENCE_S)
        assert code == [0]


def test_a_killed_replica_is_replaced_and_its_request_made_again():
    with deployed("demo", env={"OMP_NUM_THREADS": "2"}) as running, Client(running.grpc) as client:
        [first] = running.replica_pids()
        stream = client.stream("a red circle", num_inference_steps=60, seed=4)
        events = [next(stream) for _ in range(3)]
        os.kill(first, signal.SIGKILL)
        events += list(stream)
        assert [event.image_indexes for event in events if isinstance(event, Restarted)] == [(0,)]
        assert first not in running.replica_pids()
        again = client.generate("a red circle", num_inference_steps=60, seed=4)
        assert stream.result().images[0].tobytes() == again.images[0].tobytes()
        [replica] = client.server_info().replicas
        assert (replica.is_ready, replica.num_restarts) == (True, 1)


def test_a_replica_that_hangs_is_killed_and_replaced():
    with deployed("demo", env={"MII_SERVE_HANG_TIMEOUT_S": "5"}, has_model=False) as running, Client(running.grpc) as client:
        [first] = running.replica_pids()
        stream = client.stream("a red circle", num_inference_steps=200, scheduler="euler")
        next(stream)
        os.kill(first, signal.SIGSTOP)
        assert stream.result().images
        assert first not in running.replica_pids()


def test_the_address_is_open_while_the_model_loads_and_says_not_ready():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with start("demo", "--grpc-port", str(port), "--http-port", "0") as process, Client(f"127.0.0.1:{port}") as client:
        try:
            until(lambda: is_answering(client), "the port is open")
            ready_line = read_line(process)
            assert f":{port} " in ready_line
            assert client.health() == "SERVING"
        finally:
            process.kill()
            process.communicate()


def is_answering(client: Client) -> bool:
    try:
        return client.health() in ("NOT_SERVING", "SERVING")
    except UnavailableError:
        return False


def ended(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    with start(*arguments, env=env) as process:
        _, stderr = finished(process)
        return process.returncode, stderr


def test_a_port_in_use_ends_with_an_error_that_names_it():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, stderr = ended("demo", "--grpc-port", port, "--http-port", "0")
        assert code != 0
        assert f"grpc_port: cannot listen on 127.0.0.1:{port}" in stderr
        code, stderr = ended("demo", "--grpc-port", "0", "--http-port", port)
        assert code != 0
        assert f"http_port: cannot listen on 127.0.0.1:{port}" in stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("./no-such-model",), "no-such-model"),
        (("demo", "--replicas", "0"), "replicas"),
        (("demo", "--engine", "reference", "--tensor-parallel", "2"), "tensor_parallel"),
        (("demo", "--grpc-port", "70000"), "grpc_port"),
        (("demo", "--device", "cuda"), "device"),
    ],
)
def test_what_cannot_be_deployed_ends_with_one_clear_line(arguments, text):
    code, stderr = ended(*arguments)
    assert code in (1, 2)
    assert "Traceback" not in stderr
    assert any(line.startswith("error: ") and text in line for line in stderr.splitlines()), stderr


def test_flags_beat_environment_and_environment_beats_the_file(tmp_path):
    file = tmp_path / "deploy.yaml"
    file.write_text("deployment_name: from-file\nlimits:\n  max_images_per_prompt: 3\n  max_num_inference_steps: 70\n")
    env = {"MII_SERVE_DEPLOYMENT_NAME": "from-env", "MII_SERVE_LIMITS__MAX_IMAGES_PER_PROMPT": "2"}
    with deployed("demo", "--config", str(file), env=env) as running, Client(running.grpc) as client:
        info = client.server_info()
        assert info.deployment_name == "from-env"
        assert (info.limits.max_images_per_prompt, info.limits.max_num_inference_steps) == (2, 70)
        assert info.engine_note.startswith("not deepspeed: deepspeed needs "), "auto says what it would have preferred"


def test_an_unknown_setting_is_refused_by_name(tmp_path):
    file = tmp_path / "deploy.toml"
    file.write_text('deploymnt_name = "x"\n')
    code, stderr = ended("demo", "--config", str(file))
    assert code == 2
    assert "deploymnt_name: no such setting" in stderr
