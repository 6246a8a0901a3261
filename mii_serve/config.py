"""How a deployment is configured: flags beat environment, environment beats file, file beats default.

Unknown keys are refused. A replica receives the finished configuration as JSON over a pipe, never on its command line.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
    YamlConfigSettingsSource,
)

from mii_serve.errors import ConfigError

EngineName = Literal["auto", "reference", "native", "deepspeed"]
DtypeName = Literal["auto", "fp32", "fp16", "bf16"]
Port = Annotated[int, Field(ge=0, le=65535)]

ENV_PREFIX = "MII_SERVE_"


class LimitsConfig(BaseModel):
    """The operator's bounds on one request. A size bound left out is the model's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_prompt_chars: int = Field(4096, ge=1, le=1_000_000)
    max_num_inference_steps: int = Field(1000, ge=1, le=1000)
    max_guidance_scale: float = Field(50.0, ge=1, allow_inf_nan=False)
    min_size_px: int | None = Field(None, ge=8, multiple_of=8)
    max_size_px: int | None = Field(None, ge=8, multiple_of=8)
    max_images_per_prompt: int = Field(16, ge=1, le=1024)


class DeployConfig(BaseSettings):
    """Everything `mii_serve deploy` can be told."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, protected_namespaces=()
    )

    model: str = Field("demo", min_length=1)
    revision: str | None = None
    allow_pickle: bool = False
    enable_safety_checker: bool = True
    engine: EngineName = "auto"
    dtype: DtypeName = "auto"
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    replicas: int = Field(1, ge=1)
    tensor_parallel: int = Field(1, ge=1)
    max_slots: int | None = Field(None, ge=1)
    host: str = Field("127.0.0.1", min_length=1)
    grpc_port: Port = 50050
    http_port: Port = 5001
    api_key_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    deployment_name: str = Field("mii-serve", min_length=1, max_length=64)
    max_waiting_samples: int = Field(4096, ge=1)
    max_waiting_s: float = Field(600.0, gt=0)
    replica_wait_s: float = Field(120.0, gt=0)
    hang_timeout_s: float = Field(300.0, gt=0)
    startup_timeout_s: float = Field(900.0, gt=0)
    drain_timeout_s: float = Field(30.0, ge=0)
    limits: LimitsConfig = LimitsConfig()

    @classmethod
    def load(cls, flags: dict[str, Any], file: Path | None = None) -> DeployConfig:
        """Merge the sources.

        Raises:
            ConfigError: naming the setting and the rule.
        """
        if file is not None and not file.is_file():
            raise ConfigError("config", f"no such file: {file}")

        class _Layered(cls):  # type: ignore[misc, valid-type]
            @classmethod
            def settings_customise_sources(
                cls_,  # noqa: N804
                settings_cls: type[BaseSettings],
                init_settings: PydanticBaseSettingsSource,
                env_settings: PydanticBaseSettingsSource,
                dotenv_settings: PydanticBaseSettingsSource,
                file_secret_settings: PydanticBaseSettingsSource,
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                if file is None:
                    return init_settings, env_settings
                toml = file.suffix == ".toml"
                source = TomlConfigSettingsSource if toml else YamlConfigSettingsSource
                return init_settings, env_settings, source(settings_cls, file)

        try:
            merged = _Layered(**flags)
        except ValidationError as error:
            raise _first_problem(error) from None
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError("config", str(error)) from error
        return cls.model_construct(**{name: getattr(merged, name) for name in cls.model_fields})

    def to_json(self) -> str:
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> DeployConfig:
        return cls.load(_Json.model_validate_json(text).model_dump())


class _Json(BaseModel):
    model_config = ConfigDict(extra="allow")


def _first_problem(error: ValidationError) -> ConfigError:
    problem = error.errors()[0]
    setting = ".".join(str(part) for part in problem["loc"]) or "config"
    if problem["type"] == "extra_forbidden":
        return ConfigError(setting, "no such setting")
    return ConfigError(setting, f"{problem['msg']}, got {problem['input']!r}")
