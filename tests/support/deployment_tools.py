"""The outside tools that check deployment/, and the chart as they render it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deployment" / "helm"
ALERTS = CHART / "files" / "alerts.yaml"
DASHBOARD = CHART / "files" / "dashboard.json"
NAMESPACE, RELEASE = "studio", "pictures"
TOOLS = ROOT / ".deployment-tools"


def tool(name: str) -> str:
    """The path of a tool. Without it the test is skipped, and says so."""
    places = os.pathsep.join([str(TOOLS / "bin"), str(TOOLS / "venv" / "bin"), os.environ.get("PATH", ""), "/usr/sbin"])
    found = shutil.which(name, path=places)
    if found is None:
        pytest.skip(f"{name} is not installed; tools/install_deployment_tools.sh could not get it")
    return found


def run(
    name: str, *arguments: str | Path, cwd: Path | None = None, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    command = [tool(name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, check=False)


def succeeded(name: str, *arguments: str | Path, cwd: Path | None = None) -> str:
    """What the tool says when it is content."""
    ended = run(name, *arguments, cwd=cwd)
    assert ended.returncode == 0, f"{name} {ended.returncode}: {ended.stdout}\n{ended.stderr}"
    return ended.stdout + ended.stderr


def rendered_text(*arguments: str | Path) -> str:
    ended = run("helm", "template", RELEASE, CHART, "--namespace", NAMESPACE, *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def rendered(*arguments: str | Path) -> list[dict[str, Any]]:
    """The objects that `helm template` makes with these flags."""
    return [found for found in yaml.safe_load_all(rendered_text(*arguments)) if found]


def one(objects: list[dict[str, Any]], kind: str, name: str = "pictures-mii-serve") -> dict[str, Any]:
    (found,) = [each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


def alert_rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def dashboard_expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:mii_serve|process)_\w+", expression))
