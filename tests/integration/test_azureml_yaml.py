"""The YAML of deployment/azureml: Azure's client reads it, the server reads its variables, and the scripts it names exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from azureml_batch import FOLDER, script
from fake_engine import FakeEngine
from outside import run_client

from mii_serve.config import DeployConfig

KINDS = {
    "amlCompute": "compute",
    "batchEndpoint": "batch endpoint",
    "environment": "environment",
    "managedOnlineDeployment": "online deployment",
    "managedOnlineEndpoint": "online endpoint",
    "modelBatchDeployment": "batch deployment",
    "workspace": "workspace",
}
METRICS = {
    "CpuMemoryUtilizationPercentage",
    "CpuUtilizationPercentage",
    "DeploymentCapacity",
    "DiskUtilization",
    "GpuMemoryUtilizationPercentage",
    "GpuUtilizationPercentage",
    "RequestLatency_P50",
    "RequestLatency_P90",
    "RequestLatency_P95",
    "RequestLatency_P99",
    "RequestsPerMinute",
}
"""Of an online deployment, by Azure's documentation."""
FILES = sorted(FOLDER.glob("*.yaml"))
WRONG = {
    "mini_batch_size": ("batch-deployment.yaml", {"settings.mini_batch_size": "one"}),
    "output_action": ("batch-deployment.yaml", {"settings.output_action": "append"}),
    "auth_mode": ("endpoint.yaml", {"auth_mode": "none"}),
}


def kind_of(path: Path) -> str:
    schema = yaml.safe_load(path.read_text())["$schema"]
    return KINDS[schema.rpartition("/")[2].removesuffix(".schema.json")]


@pytest.mark.slow
def test_azures_client_reads_every_file_and_notices_what_is_wrong(tmp_path):
    (tmp_path / "build" / "azureml").mkdir(parents=True)
    folder = tmp_path / "deployment" / "azureml"
    folder.mkdir(parents=True)
    for path in FOLDER.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    asked = [(str(folder / path.name), kind_of(path), {}) for path in FILES]
    asked += [(str(folder / name), kind_of(FOLDER / name), wrong) for name, wrong in WRONG.values()]
    told = json.loads(run_client("azureml", "azureml_yaml.py", json.dumps(asked)))
    read = {path.name: entry.get("read", entry) for path, entry in zip(FILES, told, strict=False)}
    assert not [name for name, entry in read.items() if "error" in entry], read
    for name, entry in zip(WRONG, told[len(FILES) :], strict=True):
        assert name in entry["error"], entry

    batch = read["batch-deployment.yaml"]
    assert batch["settings"]["retry_settings"] == {"max_retries": 2, "timeout": 9999}
    assert batch["settings"]["max_concurrency_per_instance"] == 1 and batch["settings"]["output_file_name"] == "predictions.csv"
    assert set(read["batch-deployment-safe.yaml"]["settings"]["environment_variables"]) - set(
        batch["settings"]["environment_variables"]
    ) == {"CONTENT_SAFETY_ENDPOINT", "CONTENT_SAFETY_THRESHOLD", "UAI_CLIENT_ID"}
    assert read["endpoint-safe.yaml"]["identity"]["type"] == "user_assigned"
    [rule] = read["workspace-network.yaml"]["managed_network"]["outbound_rules"]
    assert rule["type"] == "private_endpoint" and rule["destination"]["subresource_target"] == "account"


def test_the_autoscale_rules_name_metrics_that_a_deployment_has():
    template = json.loads((FOLDER / "autoscale.json").read_text())
    [resource] = template["resources"]
    [profile] = resource["properties"]["profiles"]
    rules = [(rule["metricTrigger"], rule["scaleAction"]) for rule in profile["rules"]]
    assert {trigger["metricName"] for trigger, _ in rules} <= METRICS
    assert {trigger["metricResourceUri"] for trigger, _ in rules} == {"[parameters('deploymentId')]"}
    assert [action["direction"] for _, action in rules] == ["Increase", "Decrease", "Decrease"]
    used = set(re.findall(r"parameters\('(\w+)'\)", json.dumps(resource)))
    assert used == set(template["parameters"])
    assert template["parameters"]["fastMs"]["defaultValue"] < template["parameters"]["slowMs"]["defaultValue"]


@pytest.mark.parametrize("path", [path for path in FILES if "deployment" in path.name], ids=lambda path: path.name)
def test_the_server_reads_the_variables(path, monkeypatch):
    written = yaml.safe_load(path.read_text())
    variables = written.get("environment_variables") or written["settings"]["environment_variables"]
    for name, value in variables.items():
        assert isinstance(value, str), f"{name}: Azure's service takes text alone"
        monkeypatch.setenv(name, value.replace("<", "").replace(">", ""))
    config = DeployConfig.load({})
    assert config.content_safety.is_on is ("safe" in path.name) and config.content_safety.key is None
    script("batch_worker").settings_of(variables, FakeEngine().capabilities)
    if (code := written.get("code_configuration")) is not None:
        assert (FOLDER / code["code"] / code["scoring_script"]).is_file()
    assert "KEY" not in " ".join(variables), "secrets are no part of a file"
