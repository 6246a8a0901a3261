"""The Helm chart, as helm renders it and as the validators of Kubernetes read it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from deployment_tools import CHART, TOOLS, one, rendered, rendered_text, run, succeeded, tool

from mii_serve.config import DeployConfig
from mii_serve.gateway.app import GRACE_S

FULL, HPA = CHART / "ci" / "full-values.yaml", CHART / "ci" / "hpa-values.yaml"
each_set = pytest.mark.parametrize("values", [(), ("-f", FULL), ("-f", HPA)], ids=["default", "full", "hpa"])
SCHEMAS = json.loads((Path(__file__).parent / "crd_schemas.json").read_text())
"""Of the custom resources: the parts that the chart uses, and no others."""

UNCHECKED = {
    "CKV_K8S_11": "no CPU limit: the front would be throttled while torch computes, and miss its probes",
    "CKV_K8S_43": "a digest is the operator's to give (image.digest)",
    "CKV_K8S_14": "the default tag is the chart's appVersion, which is fixed",
    "CKV_K8S_15": "a fixed tag is not pulled again",
}
"""Checks of checkov that the chart does not follow, and why."""


@each_set
def test_helm_lints_it_strictly(values):
    succeeded("helm", "lint", "--strict", CHART, *values)


@each_set
def test_every_object_is_valid_in_kubernetes(values, tmp_path):
    (tmp_path / "out.yaml").write_text(rendered_text(*values))
    for version in ("1.31", "1.35"):
        said = succeeded("kubernetes-validate", "-k", version, "--strict", tmp_path / "out.yaml")
        assert "passed for resource deployment/" in said
    without_schema = {line.split("kind ")[1].split()[0] for line in said.splitlines() if "Couldn't find schema" in line}
    assert without_schema <= set(SCHEMAS)


def test_custom_resources_follow_their_schemas(tmp_path):
    tool("kubernetes-validate")
    objects = [found for found in rendered("-f", FULL) if found["kind"] in SCHEMAS]
    assert {found["kind"] for found in objects} == set(SCHEMAS)
    for found in objects:
        (tmp_path / "schema.json").write_text(json.dumps(SCHEMAS[found["kind"]]))
        (tmp_path / "spec.json").write_text(json.dumps(found["spec"]))
        command = [TOOLS / "venv/bin/python", "-W", "ignore", "-m", "jsonschema", "-i", "spec.json", "schema.json"]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, (found["kind"], ended.stderr)


@pytest.mark.parametrize("values", [(), ("-f", FULL)], ids=["default", "full"])
def test_checkov_finds_nothing_but_the_stated_exceptions(values, tmp_path):
    (tmp_path / "out.yaml").write_text(rendered_text(*values, "--skip-tests"))  # of what stays in the cluster
    ended = run("checkov", "-f", "out.yaml", "--framework", "kubernetes", "--skip-download", "-o", "json", cwd=tmp_path)
    report = json.loads(ended.stdout)
    failed = {check["check_id"]: (check["check_name"], check["resource"]) for check in report["results"]["failed_checks"]}
    assert report["summary"]["passed"] > 80
    assert {check: told for check, told in failed.items() if check not in UNCHECKED} == {}


@each_set
def test_the_settings_file_is_one_that_the_server_reads(values, tmp_path):
    objects = rendered(*values)
    (mounted,) = [volume for volume in pod(objects)["volumes"] if volume["name"] == "config"]
    if "secret" in mounted:
        assert not [found for found in objects if found["kind"] == "ConfigMap"]
        return
    (tmp_path / "config.yaml").write_text(one(objects, "ConfigMap")["data"]["config.yaml"])
    config = DeployConfig.load({}, tmp_path / "config.yaml")
    assert (config.host, config.grpc_port, config.http_port) == ("0.0.0.0", 50050, 5001)
    mounts = {mount["mountPath"] for mount in container(objects)["volumeMounts"]}
    for file in (config.api_key_file, config.tls_cert, config.tls_key):
        assert file is None or str(file.parent) in mounts


def pod(objects):
    return one(objects, "Deployment")["spec"]["template"]["spec"]


def container(objects):
    (only,) = pod(objects)["containers"]
    return only


@pytest.mark.parametrize("drain_s", [0, 30, 45.5, 600])
def test_the_grace_period_holds_the_sleep_the_drain_and_what_comes_after_it(drain_s):
    found = pod(rendered("--set-json", f"config.drain_timeout_s={drain_s}", "--set", "preStopSeconds=7"))
    sleep = found["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert sleep == 7
    # After the drain, slow callers over HTTP have GRACE_S to read, and replicas 5 s to end.
    assert drain_s + sleep + GRACE_S + 5 < found["terminationGracePeriodSeconds"] <= drain_s + sleep + 30


@pytest.mark.parametrize("startup_s", [60, 900, 901])
def test_a_start_has_the_time_that_the_server_gives_itself(startup_s):
    probe = container(rendered("--set", f"config.startup_timeout_s={startup_s}"))["startupProbe"]
    assert startup_s <= probe["periodSeconds"] * probe["failureThreshold"] <= startup_s + 10


def test_probes_ask_what_each_is_for():
    found = container(rendered())
    assert found["startupProbe"]["httpGet"]["path"] == found["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert found["livenessProbe"]["httpGet"]["path"] == "/livez"
    encrypted = container(rendered("--set", "secrets.tls=certificate"))
    assert {encrypted[f"{name}Probe"]["httpGet"]["scheme"] for name in ("startup", "readiness", "liveness")} == {"HTTPS"}


def test_gpus_are_those_of_all_ranks_and_ranks_get_shared_memory():
    objects = rendered("--set", "gpu.enabled=true,config.replicas=2,config.tensor_parallel=4")
    assert container(objects)["resources"]["limits"]["nvidia.com/gpu"] == 8
    (shared,) = [volume for volume in pod(objects)["volumes"] if volume["name"] == "shared-memory"]
    assert shared["emptyDir"]["medium"] == "Memory"
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container(objects)["volumeMounts"]
    alone = rendered("--set", "gpu.enabled=true")
    assert container(alone)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "shared-memory" not in {volume["name"] for volume in pod(alone)["volumes"]}
    assert "nvidia.com/gpu" not in container(rendered())["resources"]["limits"]


def test_no_secret_is_in_a_variable_or_an_argument():
    objects = rendered("-f", FULL)
    for each in (*pod(objects)["containers"], *pod(objects)["initContainers"]):
        assert not [variable for variable in each["env"] if "valueFrom" in variable]
    assert not [found for found in objects if found["kind"] == "Secret"]


def test_the_containers_are_locked_down():
    found = pod(rendered("-f", FULL))
    for each in (*found["containers"], *found["initContainers"]):
        security = each["securityContext"]
        assert security["readOnlyRootFilesystem"] and security["runAsNonRoot"] and not security["allowPrivilegeEscalation"]
        assert security["capabilities"] == {"drop": ["ALL"]}
    assert found["automountServiceAccountToken"] is False
    assert found["enableServiceLinks"] is False  # MII_SERVE_PORT=tcp://… would be read as a misspelt setting


def test_every_selector_finds_the_pods():
    objects = rendered("-f", FULL)
    labels = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    selectors = [one(objects, "Deployment")["spec"]["selector"]["matchLabels"]]
    selectors += [found["spec"]["selector"] for found in objects if found["kind"] == "Service"]
    selectors.append(one(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"])
    selectors.append(one(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"])
    assert all(selector.items() <= labels for selector in selectors)
    monitored = one(objects, "ServiceMonitor")["spec"]["selector"]["matchLabels"].items()
    services = [found["metadata"] for found in objects if found["kind"] == "Service"]
    assert [found["name"] for found in services if monitored <= found["labels"].items()] == ["pictures-mii-serve"]


def test_the_headless_service_names_every_pod():
    assert one(rendered(), "Service", "pictures-mii-serve-grpc")["spec"]["clusterIP"] == "None"


def test_the_autoscaler_counts_seconds_of_work():
    keda = one(rendered("-f", FULL), "ScaledObject")["spec"]["triggers"][0]
    assert keda["metricType"] == "AverageValue" and keda["metadata"]["threshold"] == "10"
    assert 'service="pictures-mii-serve"' in keda["metadata"]["query"]
    objects = rendered("-f", HPA)
    (metric,) = one(objects, "HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["target"]["averageValue"] == "20"  # 10 for each of the two replicas of a pod
    assert "replicas" not in one(objects, "Deployment")["spec"]  # the autoscaler's to set


def test_the_rules_and_the_dashboard_arrive_unchanged():
    objects = rendered("-f", FULL)
    alerts = yaml.safe_load((CHART / "files" / "alerts.yaml").read_text())
    assert one(objects, "PrometheusRule")["spec"] == alerts
    sent = one(objects, "ConfigMap", "pictures-mii-serve-dashboard")["data"]["mii-serve.json"]
    assert json.loads(sent) == json.loads((CHART / "files" / "dashboard.json").read_text())


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("replicas=2", "replicas"),  # the value's name is replicaCount
        ("config.replicas=0", "replicas"),
        ("modelCache.download=true", "must be a hub id"),
        ("modelCache.kind=existingClaim", "name the claim"),
        ("config.tls_client_ca=/x", "tls_client_ca"),
        ("config.grpc_port=1", "the chart sets it"),
        ("autoscaling.kind=vpa", "autoscaling"),
    ],
)
def test_a_wrong_value_is_refused_by_its_name(setting, told):
    ended = run("helm", "template", CHART, "--set", setting)
    assert ended.returncode != 0 and told in ended.stderr
