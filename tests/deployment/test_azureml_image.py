"""The image of Azure ML's batch jobs: what hadolint says, and that its parts and versions are there."""

from __future__ import annotations

import re

import yaml
from azureml_batch import FOLDER
from deployment_tools import run

DOCKERFILE = FOLDER / "environment" / "Dockerfile"
COLLECT = (FOLDER / "environment" / "collect.sh").read_text()


def test_hadolint_finds_nothing():
    assert run("hadolint", DOCKERFILE).stdout == ""


def test_what_is_copied_is_collected_and_pinned():
    text = DOCKERFILE.read_text()
    ((sources, _),) = re.findall(r"^COPY (.+) (\S+)$", text, re.MULTILINE)
    assert sources.split() == ["conda.yaml", "constraints.txt", "mii_serve-*.whl"]
    for source in ("conda.yaml", "constraints.txt", "--wheel"):
        assert source in COLLECT, source
    assert "--constraint /tmp/context/constraints.txt" in text and "MII_SERVE_PYTHON=/opt/mii_serve/bin/python" in text
    assert re.search(r"^ARG BASE_IMAGE=\S+:\d{8}\.v\d+$", text, re.MULTILINE), "not whatever is the latest"
    *_, packages = yaml.safe_load((FOLDER / "environment" / "conda.yaml").read_text())["dependencies"]
    assert all("==" in package for package in packages["pip"])
