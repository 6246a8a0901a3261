"""Settings, variables, flags, errors, files and make targets that the docs name are there, and every setting is named."""

from __future__ import annotations

import argparse
import builtins
import re
from pathlib import Path

import pytest

from mii_serve import errors
from mii_serve.cli.command_line import build_parser
from mii_serve.config import ENV_PREFIX, NOT_SETTINGS, DeployConfig, setting_names
from mii_serve.types import ENGINE_CHOICES

ROOT = Path(__file__).resolve().parents[2]
DEPLOYMENT = (ROOT / "deployment" / "README.md", ROOT / "deployment" / "azureml" / "README.md")
TOP = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md")
OTHER_PAGES = (*TOP, ROOT / "benchmarks" / "README.md", *DEPLOYMENT)
PAGES = sorted([*OTHER_PAGES, *(ROOT / "docs").rglob("*.md")])
SETTINGS = setting_names(DeployConfig)
OF_SCRIPTS = {
    name
    for script in (ROOT / "deployment" / "azureml").glob("*.py")
    for name in re.findall(rf'"({ENV_PREFIX}[A-Z_]+)"', script.read_text())
}
"""Variables that the scripts of deployments read themselves."""

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def flags_of_commands() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}

    def walk(parser: argparse.ArgumentParser, command: str) -> None:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, below in action.choices.items():
                    walk(below, command or name)
            else:
                found.setdefault(command, set()).update(action.option_strings)

    walk(build_parser(), "")
    return found


@each_page
def test_settings_and_variables_that_are_named_exist(page):
    text = page.read_text()
    variables = {ENV_PREFIX + name.replace(".", "__").upper() for name in SETTINGS} | NOT_SETTINGS | OF_SCRIPTS
    assert set(re.findall(rf"{ENV_PREFIX}[A-Z_]+[A-Z]", text)) <= variables
    assert set(re.findall(r"`((?:http|limits|content_safety)\.[a-z_]+)", text)) <= set(SETTINGS)


@each_page
def test_flags_of_commands_exist(page):
    flags = flags_of_commands()
    for command, rest in re.findall(rf"mii_serve ({'|'.join(filter(None, flags))})\b([^`\n]*)", page.read_text()):
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", rest)) <= flags[command], rest


@each_page
def test_errors_files_and_make_targets_exist(page):
    text, makefile = page.read_text(), (ROOT / "Makefile").read_text()
    for error in re.findall(r"`(\w+Error)\b", text):
        assert hasattr(errors, error) or hasattr(builtins, error), error
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert f"\n{target}:" in makefile, target
    top = "tests|tools|benchmarks|deployment|mii_serve|engine|server|replica|gateway|samplers"
    for file in re.findall(rf"`((?:{top})/[\w/.-]+)`", text):
        assert (ROOT / file).exists() or (ROOT / "mii_serve" / file).exists(), file


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_setting_is_named_on_a_page(setting):
    group, _, name = setting.rpartition(".")
    text = "".join(page.read_text() for page in PAGES)
    assert re.search(rf"\b{name}\b", text) or (not group and f"--{name.replace('_', '-')}" in text)


@pytest.mark.parametrize("engine", ENGINE_CHOICES)
def test_every_engine_is_named_on_a_page(engine):
    text = "".join(page.read_text() for page in PAGES)
    assert f"`{engine}`" in text
