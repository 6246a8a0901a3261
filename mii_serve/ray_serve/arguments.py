"""The arguments of the application: those of this page, and every setting of `mii_serve deploy` beside them.

`serve run mii_serve.ray_serve.app:build model=demo replicas=2 limits.max_size_px=512`, or `args` in a Serve config file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mii_serve.config import DeployConfig
from mii_serve.errors import ConfigError

SECRETS = ("content_safety.key",)
"""Ray shows an application's arguments to everyone who sees its dashboard."""
NOT_HERE = {
    "enable_spare_process": "Ray starts the replicas",
    "admin_key_file": "LoRAs are loaded and removed on one front; give them with lora",
    "jobs_folder": "files and batches belong to one front on one machine; use mii_serve deploy",
    "enable_mii_terminate": "Ray ends the application: serve shutdown",
}


class Scale(BaseModel):
    """What Ray has to know. `num_cpus` and `num_gpus` are those of one device's process, a rank; the setting `replicas` is the
    number of replicas to begin with, and the least. With `max_replicas` there are as many as bring the accepted work of each to
    `target_queued_s` seconds, once that has been so for a delay.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_cpus: float = Field(1.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    max_replicas: int | None = Field(None, ge=1)
    target_queued_s: float = Field(10.0, gt=0)
    upscale_delay_s: float = Field(5.0, ge=0)
    downscale_delay_s: float = Field(300.0, ge=0)


def read_arguments(arguments: Mapping[str, Any]) -> tuple[Scale, dict[str, Any], DeployConfig]:
    """What Ray has to know, the settings to pass on, and the same as the processes of the cluster will read them.

    Raises:
        ConfigError: naming the argument and the rule.
    """
    settings = _nested(arguments)
    own = {name: settings.pop(name) for name in Scale.model_fields if name in settings}
    for name in SECRETS:
        if _has(settings, name):
            variable = name.replace(".", "_").upper()
            raise ConfigError(name, f"is a secret, and arguments are shown; set {variable} in the front's environment")
    for name, reason in NOT_HERE.items():
        if name in settings:
            raise ConfigError(name, f"is not for Ray: {reason}")
    try:
        scale = Scale.model_validate(own)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(name, f"{problem['msg']}, got {problem['input']!r}") from None
    config = settings_of(settings)
    if scale.max_replicas is not None and scale.max_replicas < config.replicas:
        raise ConfigError("max_replicas", f"must be at least replicas, {config.replicas}, got {scale.max_replicas}")
    return scale, settings, config


def settings_of(settings: Mapping[str, Any]) -> DeployConfig:
    """The settings, and those of this process's environment, which come first as everywhere.

    Raises:
        ConfigError: naming the setting and the rule.
    """
    return DeployConfig.load({}, None, dict(settings))


def _nested(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`{"limits.max_size_px": 512}` as a setting in its group."""
    nested: dict[str, Any] = {}
    for name, value in arguments.items():
        group, _, inner = name.rpartition(".")
        if group:
            nested.setdefault(group, {})[inner] = value
        else:
            nested[name] = {**nested[name], **value} if isinstance(value, dict) and name in nested else value
    return nested


def _has(settings: Mapping[str, Any], name: str) -> bool:
    group, _, inner = name.rpartition(".")
    found = settings.get(group)
    return isinstance(found, Mapping) and inner in found
