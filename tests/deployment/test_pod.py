"""The pod of the chart as a process: its settings file, its probes, its metrics, and its end as a kubelet brings it about."""

from __future__ import annotations

import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
import yaml
from deployment_tools import alert_rules, dashboard_expressions, metrics_in, one, rendered, run, succeeded
from deployments import ENDLESS, Deployment, deployed

from mii_serve.client import Client, Step
from mii_serve.errors import UnavailableError

PRE_STOP_S = 1


def get(running: Deployment, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{running.http}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""
    except urllib.error.URLError:
        return 0, ""


@pytest.fixture
def pod(tmp_path, request) -> Iterator[tuple[Deployment, float]]:
    """The container's command with its settings file, on free ports; and the seconds that a kubelet gives it to end."""
    objects = rendered("--set", f"config.drain_timeout_s={request.param},preStopSeconds={PRE_STOP_S}")
    spec = one(objects, "Deployment")["spec"]["template"]["spec"]
    settings = yaml.safe_load(one(objects, "ConfigMap")["data"]["config.yaml"])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(settings | {"host": "127.0.0.1", "grpc_port": 0, "http_port": 0}))
    command, *arguments = spec["containers"][0]["args"]
    assert command == "deploy"
    arguments = [str(file) if argument.endswith("config.yaml") else argument for argument in arguments]
    with deployed(*arguments, "--grpc-port", "0") as running:
        yield running, float(spec["terminationGracePeriodSeconds"])


def sigterm(running: Deployment) -> float:
    running.process.send_signal(signal.SIGTERM)
    return time.monotonic()


@pytest.mark.parametrize("pod", [120], indirect=True)
def test_a_request_that_runs_when_the_pod_is_ended_gets_its_image(pod):
    running, grace_s = pod
    with (
        Client(running.grpc, max_retries=0) as client,
        client.stream("a red circle", num_inference_steps=300, scheduler="euler") as events,
    ):
        next(event for event in events if isinstance(event, Step))
        time.sleep(PRE_STOP_S)  # the kubelet's: endpoints forget the pod, which serves as before
        assert get(running, "/readyz")[0] == 200
        begun = sigterm(running)
        step = next(event for event in events if isinstance(event, Step))
        while step.step < step.num_steps - 1 and get(running, "/readyz")[0] == 200:
            step = next(event for event in events if isinstance(event, Step))
        assert get(running, "/readyz")[0] in (0, 503)
        with pytest.raises(UnavailableError):
            client.generate("a blue square", num_inference_steps=1)
        assert len(events.result().images) == 1
    assert running.process.wait(grace_s) == 0
    assert time.monotonic() - begun < grace_s - PRE_STOP_S


@pytest.mark.parametrize("pod", [2], indirect=True)
def test_a_pod_whose_requests_do_not_end_ends_before_it_is_killed(pod):
    running, grace_s = pod
    with Client(running.grpc, max_retries=0) as client, client.stream("a red circle", **ENDLESS) as events:
        next(event for event in events if isinstance(event, Step))
        begun = sigterm(running)
        assert running.process.wait(grace_s) == 0
        assert time.monotonic() - begun < grace_s - PRE_STOP_S


@pytest.mark.parametrize("pod", [0], indirect=True)
def test_the_server_has_every_metric_that_alerts_and_panels_name(pod):
    running, _ = pod
    with Client(running.grpc) as client:
        client.generate("a red circle", num_inference_steps=1)
    status, text = get(running, "/metrics")
    assert status == 200
    suffixes = {"counter": ("",), "gauge": ("",), "summary": ("_sum", "_count"), "histogram": ("_bucket", "_sum", "_count")}
    families = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    names = {name + suffix for name, kind in families for suffix in suffixes[kind]}
    wanted = set().union(*(metrics_in(rule["expr"]) for rule in alert_rules()), *map(metrics_in, dashboard_expressions()))
    assert wanted <= names
    succeeded("promtool", "--version")
    assert run("promtool", "check", "metrics", stdin=text).returncode == 0
