"""The resources for KServe: their schemas, their pods, and that the server has what they name."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from deployment_tools import ROOT, TOOLS, succeeded, tool

from mii_serve.cli.command_line import build_parser
from mii_serve.config import HttpConfig
from mii_serve.gateway.app import build_app
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.keys import KeyRing
from mii_serve.server.oip import OIP_SERVICE

KSERVE = ROOT / "deployment" / "kserve"
SCHEMAS = json.loads((Path(__file__).parent / "kserve_schemas.json").read_text())
"""The parts of KServe's resources that are used here, and no others."""
RUNTIMES = list(yaml.safe_load_all((KSERVE / "runtime.yaml").read_text()))
SERVICE = yaml.safe_load((KSERVE / "inference-service.yaml").read_text())

each_runtime = pytest.mark.parametrize("runtime", RUNTIMES, ids=lambda runtime: runtime["metadata"]["name"])


def test_the_resources_follow_their_schemas(tmp_path):
    tool("kubernetes-validate")
    for found in (*RUNTIMES, SERVICE):
        (tmp_path / "schema.json").write_text(json.dumps(SCHEMAS[found["kind"]]))
        (tmp_path / "spec.json").write_text(json.dumps(found["spec"]))
        command = [TOOLS / "venv/bin/python", "-W", "ignore", "-m", "jsonschema", "-i", "spec.json", "schema.json"]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, (found["metadata"]["name"], ended.stderr)


@each_runtime
def test_its_container_is_one_that_kubernetes_takes(runtime, tmp_path):
    spec = {"containers": runtime["spec"]["containers"]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "made-by-kserve"}, "spec": spec}
    (tmp_path / "pod.yaml").write_text(yaml.safe_dump(pod))
    succeeded("kubernetes-validate", "-k", "1.35", "--strict", tmp_path / "pod.yaml")


@each_runtime
def test_the_server_has_the_flags_and_the_probes(runtime):
    (container,) = runtime["spec"]["containers"]
    flags = build_parser().parse_args(container["args"])
    (port,) = container["ports"]
    routes = {getattr(route, "path", None) for route in build_app(Dispatcher(), KeyRing(), HttpConfig()).routes}
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        (probe,) = (container[name][kind] for kind in ("httpGet", "grpc", "tcpSocket") if kind in container[name])
        assert probe["port"] == port["containerPort"] in (flags.http_port, flags.grpc_port)
        assert probe.get("path", "/livez") in routes and probe.get("service", OIP_SERVICE) == OIP_SERVICE


def test_the_service_uses_a_runtime_that_is_there():
    model = SERVICE["spec"]["predictor"]["model"]
    (runtime,) = (one for one in RUNTIMES if one["metadata"]["name"] == model["runtime"])
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert model["modelFormat"]["name"] in {one["name"] for one in runtime["spec"]["supportedModelFormats"]}
