"""`mii_serve config`: what a deployment would be configured with, and why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mii_serve.cli.exits import ExitCode


def show(flags: dict[str, Any], file: Path | None, *, is_effective: bool, is_json: bool) -> int:
    """Print every setting's value; with `is_effective`, where it came from too.

    Raises:
        ConfigError: a setting breaks a rule.
    """
    from mii_serve.config import DeployConfig, setting_names

    config = DeployConfig.load(flags, file)
    values = config.model_dump(mode="json")
    origins = DeployConfig.origins(flags, file)
    if is_json:
        names = setting_names(DeployConfig)
        described = {name: {"value": _value(values, name), "origin": origins[name]} for name in names}
        print(json.dumps(described if is_effective else values, indent=1))
        return ExitCode.OK
    width = max(len(name) for name in origins)
    for name, origin in origins.items():
        line = f"{name:<{width}}  {json.dumps(_value(values, name))}"
        print(f"{line:<{width + 32}}  {origin}" if is_effective else line)
    return ExitCode.OK


def schema() -> int:
    """Print the JSON schema of a configuration file."""
    from mii_serve.config import DeployConfig

    print(json.dumps(DeployConfig.model_json_schema(), indent=1))
    return ExitCode.OK


def _value(values: dict[str, Any], name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values
