"""The container files: what hadolint says, what compose mounts, and an image that is built and run where the tools are."""

from __future__ import annotations

import re

import pytest
import yaml
from deployment_tools import ALERTS, DASHBOARD, ROOT, run, succeeded

from mii_serve import __version__
from mii_serve.config import ENV_PREFIX, DeployConfig, setting_names

DOCKER = ROOT / "deployment" / "docker"
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
each_file = pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])


@each_file
def test_hadolint_finds_nothing(name):
    assert run("hadolint", DOCKER / name).stdout == ""


@each_file
def test_every_file_that_is_copied_exists_and_is_not_ignored(name):
    text = (DOCKER / name).read_text()
    ignored = (DOCKER / f"{name}.dockerignore").read_text().splitlines()
    for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists(), source
            kept = [line[1:] for line in ignored if line.startswith("!")]
            assert any(source == each or each.startswith(f"{source}/") for each in kept), source


@each_file
def test_the_image_is_pinned_and_runs_as_a_plain_user(name):
    text = (DOCKER / name).read_text()
    assert "-c constraints.txt" in text and "\nUSER 10001:10001\n" in text and "\nHEALTHCHECK " in text
    (torch,) = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert set(re.findall(r"torch(?:==| )(\d\S+)", text)) == {torch}
    assert f"\nARG VERSION={__version__}\n" in text
    assert "latest" not in "".join(re.findall(r"^ARG .*IMAGE=(.*)$", text, re.MULTILINE))


def test_compose_gives_settings_that_exist():
    names = {ENV_PREFIX + name.replace(".", "__").upper() for name in setting_names(DeployConfig)}
    assert set(COMPOSE["services"]["mii_serve"]["environment"]) <= names


def test_every_file_that_compose_mounts_exists():
    mounted = [volume.split(":")[0] for service in COMPOSE["services"].values() for volume in service["volumes"]]
    files = [(DOCKER / source).resolve() for source in mounted if source.startswith(".")]
    assert {ALERTS, DASHBOARD} <= set(files)
    assert all(file.is_file() for file in files)
    assert {source for source in mounted if not source.startswith(".")} == set(COMPOSE["volumes"])


def test_compose_waits_for_the_drain():
    server = COMPOSE["services"]["mii_serve"]
    drain_s = float(server["environment"]["MII_SERVE_DRAIN_TIMEOUT_S"])
    assert float(server["stop_grace_period"].removesuffix("s")) >= drain_s + 20
    assert server["read_only"] is True


def test_everything_listens_on_this_machine_only():
    ports = [port for service in COMPOSE["services"].values() for port in service["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_prometheus_reads_its_configuration(tmp_path):
    text = (DOCKER / "prometheus" / "prometheus.yaml").read_text()
    (tmp_path / "prometheus.yml").write_text(text)
    (tmp_path / "alerts.yaml").write_text(ALERTS.read_text())
    succeeded("promtool", "check", "config", tmp_path / "prometheus.yml")
    (target,) = yaml.safe_load(text)["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == "mii_serve:5001" and "mii_serve" in COMPOSE["services"]
