"""The configuration of a deployment, merged from flags, environment, Azure ML's own variables, a file and defaults
(`DeployConfig._sources` has the order).

Unknown keys are refused. A replica receives the merged configuration as JSON over a pipe, never on its command line.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
    YamlConfigSettingsSource,
)

from mii_serve.errors import ConfigError
from mii_serve.types import LORA_NAME, EngineChoice

DtypeName = Literal["auto", "fp32", "fp16", "bf16"]
Parallelism = Literal["rows", "tensor"]
"""What the devices of a replica split: the rows of each UNet call, or its weights."""
Port = Annotated[int, Field(ge=0, le=65535)]

ENV_PREFIX = "MII_SERVE_"
NOT_SETTINGS = frozenset({"MII_SERVE_API_KEY", "MII_SERVE_DEBUG", "MII_SERVE_RUNTIME_DIR"})
"""Variables with the prefix that clients and commands read."""
AZURE_MODEL_FOLDER = "MLFLOW_MODEL_FOLDER"
"""The model's folder inside AZUREML_MODEL_DIR, where it is not the usual one."""
AZURE_TEXTS = {"DEPLOYMENT_NAME": "deployment_name", "AZUREML_MODEL_DIR": "model"}
AZURE_COUNTS = {"TENSOR_PARALLEL": "tensor_parallel", "NUM_REPLICAS": "replicas", "WORKER_COUNT": "max_slots"}
AZURE_VARIABLES = AZURE_TEXTS | AZURE_COUNTS
"""The variables that configure Azure ML's images, and our settings. A worker there is one request in flight."""
CONTENT_SAFETY_VARIABLES = {
    "CONTENT_SAFETY_ENDPOINT": "content_safety.endpoint",
    "CONTENT_SAFETY_KEY": "content_safety.key",
    "CONTENT_SAFETY_THRESHOLD": "content_safety.threshold",
    "CONTENT_SAFETY_BLOCKLISTS": "content_safety.blocklists",
    "CONTENT_SAFETY_ACCOUNT_NAME": "content_safety.account_name",
    "UAI_CLIENT_ID": "content_safety.client_id",
}
"""Azure ML's variables for content safety, and our settings."""
OF_KUBERNETES = re.compile(r"CONTENT_SAFETY_(SERVICE_(HOST|PORT(_.*)?)|PORT(_.*)?)")
"""Variables that Kubernetes sets in the containers of a namespace with a service named content-safety."""
MAX_MODERATED_CHARS = 10_000
"""The longest text that Azure AI Content Safety takes in one request."""
_LABEL = r"[0-9A-Za-z_-]{1,63}"
_IPV6 = r"\[?[0-9A-Fa-f]{0,4}:[0-9A-Fa-f]{0,4}:[0-9A-Fa-f:.]{0,40}\]?"
HOST_PATTERN = rf"^(\*|(\*\.)?{_LABEL}(\.{_LABEL}){{0,20}}\.?|{_IPV6})$"
"""A host name, optionally with a leading wildcard, or an IP address; without a port."""
CLOSE = 0.8
"""The similarity (`difflib` ratio, 0 to 1) from which a name counts as a misspelling of another."""


ORIGIN_PATTERN = r"^(\*|[a-z][a-z0-9+.-]*://[^\s/?#@*]{1,300})$"
"""What browsers send as `Origin`, such as `https://app.example.com`, or `*`."""


HostName = Annotated[str, Field(pattern=HOST_PATTERN)]
Origin = Annotated[str, Field(pattern=ORIGIN_PATTERN)]
ServedName = Annotated[str, Field(pattern=r"^[!-~]([ -~]*[!-~])?$", max_length=200)]
"""A name of the model in requests: printable ASCII, because paths and logs hold it."""


EmbeddingToken = Annotated[str, Field(pattern=r"^[^\s,=]+$", max_length=64)]
"""A word of prompts."""


LoraName = Annotated[str, Field(pattern=LORA_NAME)]


def _names(given: object) -> object:
    """Names from flags, a variable (separated by commas) or a file, without duplicates and empty ones."""
    if isinstance(given, str):
        given = [name.strip() for name in given.split(",")]
    if not isinstance(given, list | tuple):
        return given
    return tuple(dict.fromkeys(name for name in given if name != ""))


def _paths_by_name(given: object) -> object:
    """Paths by name from flags (NAME=PATH), a variable (separated by commas) or a file."""
    if isinstance(given, str):
        given = [pair for pair in given.split(",") if pair.strip()]
    if not isinstance(given, list | tuple):
        return given
    pairs = [str(pair).strip().partition("=") for pair in given]
    if any(not (name and path) for name, _, path in pairs):
        raise ValueError("must be NAME=PATH")
    return {name: path for name, _, path in pairs}


class HttpConfig(BaseModel):
    """Limits of one HTTP request, and the answers to refused pictures.

    `allowed_hosts` are the host names that requests may give: `*.example.com` is every name below one, `*` is any. Left out, a
    server on a loopback address accepts this machine's names, and any other server accepts all. `max_images` and `max_steps`
    count all prompts of a request together; a step is one denoising step of one image.
    `refuse_blocked_score` answers `/score` with 400 if content safety blocked a prompt, instead of Azure's empty object;
    `refuse_flagged_images` refuses an OpenAI request if every picture was flagged, instead of sending black ones.
    `cors_origins` are the origins whose pages may use the server in a browser (CORS); `*` is any.
    `enable_sdapi` serves AUTOMATIC1111's API below `/sdapi`.
    `keep_alive_s` is how long an idle connection stays open between requests; proxies that pool connections must close theirs
    sooner. `public_url` is the start of the links in answers, if it is not the address that requests name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_body_bytes: int = Field(4 * 1024 * 1024, ge=1024, le=1024**3)
    max_images: int = Field(64, ge=1)
    max_steps: int = Field(16_000, ge=1)
    timeout_s: float = Field(900.0, gt=0, allow_inf_nan=False)
    keep_alive_s: float = Field(75.0, ge=1, le=3600)
    public_url: str | None = Field(None, pattern=r"^https?://[^\s?#@]+$")
    refuse_blocked_score: bool = False
    refuse_flagged_images: bool = True
    enable_sdapi: bool = False
    cors_origins: Annotated[tuple[Origin, ...], NoDecode, BeforeValidator(_names)] = ()
    allowed_hosts: Annotated[tuple[HostName, ...] | None, NoDecode, BeforeValidator(_names)] = Field(None, min_length=1)


class LimitsConfig(BaseModel):
    """The operator's limits of one request. A size limit that is left out is the model's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_prompt_chars: int = Field(4096, ge=1, le=1_000_000)
    max_num_inference_steps: int = Field(1000, ge=1, le=1000)
    max_guidance_scale: float = Field(50.0, ge=1, allow_inf_nan=False)
    min_size_px: int | None = Field(None, ge=8, multiple_of=8)
    max_size_px: int | None = Field(None, ge=8, multiple_of=8)
    max_images_per_prompt: int = Field(16, ge=1, le=1024)


class ContentSafetyConfig(BaseModel):
    """Azure AI Content Safety for prompts and pictures; off unless one of these is set.

    A severity (0, 2, 4 or 6) above `threshold` is blocked. `client_id` is that of a managed identity, or "system" for the
    machine's own; it is not used if there is a `key`. `account_name` is short for that account's public endpoint. `timeout_s`
    bounds one verdict, with its retries.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint: str | None = Field(None, pattern=r"^https?://[^\s/?#@]+/?$")
    key: SecretStr | None = None
    threshold: int = Field(2, ge=0, le=6)
    blocklists: tuple[Annotated[str, Field(pattern=r"^[0-9A-Za-z._~-]{1,64}$")], ...] = ()
    account_name: str | None = Field(None, pattern=r"^[0-9A-Za-z-]{2,64}$")
    client_id: str | None = Field(None, min_length=1)
    timeout_s: float = Field(10.0, gt=0, le=60)

    @property
    def is_on(self) -> bool:
        return bool(self.model_fields_set)

    @property
    def url(self) -> str:
        return (self.endpoint or f"https://{self.account_name}.cognitiveservices.azure.com").rstrip("/")


class ProvenanceConfig(BaseModel):
    """Marks that say that a picture was generated.

    `enable_metadata` writes XMP into every file, with the model and its revision. `certificate`, a chain in PEM whose first is
    the signer's, and its private `key` sign every file as C2PA Content Credentials. `enable_watermark` changes pixels.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    enable_metadata: bool = True
    enable_watermark: bool = False
    certificate: Path | None = None
    key: Path | None = None


class DeployConfig(BaseSettings):
    """Every setting of `mii_serve deploy`. Names that end in `_s` are seconds, in `_bytes` bytes, in `_px` pixels."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, protected_namespaces=()
    )

    model: str = Field("demo", min_length=1)
    served_model_name: Annotated[tuple[ServedName, ...], NoDecode, BeforeValidator(_names)] = ()
    revision: str | None = None
    tokenizer: Path | None = None
    vae: Path | None = None
    embedding: Annotated[dict[EmbeddingToken, Path], NoDecode, BeforeValidator(_paths_by_name)] = Field(default_factory=dict)
    lora: Annotated[dict[LoraName, Path], NoDecode, BeforeValidator(_paths_by_name)] = Field(default_factory=dict)
    allow_pickle: bool = False
    enable_safety_checker: bool = True
    engine: EngineChoice = "auto"
    dtype: DtypeName = "auto"
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    replicas: int = Field(1, ge=1)
    tensor_parallel: int = Field(1, ge=1)
    parallelism: Parallelism = "rows"
    max_slots: int | None = Field(None, ge=1)
    verify: bool = False
    host: str = Field("127.0.0.1", min_length=1)
    grpc_port: Port = 50050
    http_port: Port = 5001
    api_key_file: Path | None = None
    admin_key_file: Path | None = None
    jobs_folder: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    enable_mii_terminate: bool = False
    deployment_name: str = Field("mii-serve", min_length=1, max_length=64)
    max_waiting_samples: int = Field(4096, ge=1)
    max_waiting_s: float = Field(600.0, gt=0)
    batch_share: float = Field(0.02, ge=0, le=0.5)
    replica_wait_s: float = Field(120.0, gt=0)
    hang_timeout_s: float = Field(300.0, gt=0)
    startup_timeout_s: float = Field(900.0, gt=0)
    drain_timeout_s: float = Field(30.0, ge=0)
    max_connection_age_s: float | None = Field(None, ge=1, le=86400)
    enable_spare_process: bool = True
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    http: HttpConfig = HttpConfig()
    limits: LimitsConfig = LimitsConfig()
    content_safety: ContentSafetyConfig = ContentSafetyConfig()
    provenance: ProvenanceConfig = ProvenanceConfig()

    @classmethod
    def load(cls, flags: dict[str, Any], file: Path | None = None, written: dict[str, Any] | None = None) -> DeployConfig:
        """Merge the sources; `written` takes the place of a file.

        Raises:
            ConfigError: naming the setting and the rule.
        """
        if file is not None and not file.is_file():
            raise ConfigError("config", f"no such file: {file}")
        _refuse_misspelt_variables(cls)
        config = cls._merged(lambda: cls._sources(flags, file, written or {}))
        if config.content_safety.model_fields_set == {"client_id"} and "UAI_CLIENT_ID" in os.environ:
            return config.model_copy(update={"content_safety": ContentSafetyConfig()})  # an identity alone does not turn it on
        _check_content_safety(config)
        _check_ranks(config)
        return config

    @classmethod
    def _sources(
        cls, flags: dict[str, Any], file: Path | None, written: dict[str, Any]
    ) -> dict[str, PydanticBaseSettingsSource]:
        """Every source of settings by its name, in the order of precedence. This is the only statement of that order."""
        return {
            "flag": InitSettingsSource(cls, flags),
            "environment": EnvSettingsSource(cls),
            "azure": InitSettingsSource(cls, _azure_settings()),
            "file": InitSettingsSource(cls, written) if file is None else _file_source(cls, file),
        }

    @classmethod
    def _merged(cls, sources: Callable[[], Mapping[str, PydanticBaseSettingsSource]]) -> DeployConfig:
        class _Layered(cls):  # type: ignore[misc, valid-type]
            @classmethod
            def settings_customise_sources(cls_, *_: Any, **__: Any) -> tuple[PydanticBaseSettingsSource, ...]:  # noqa: N804
                return tuple(sources().values())

        try:
            merged = _Layered()
        except ValidationError as error:
            raise _first_problem(cls, error) from None
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ConfigError("config", str(error)) from error
        return cls.model_construct(**{name: getattr(merged, name) for name in cls.model_fields})

    @classmethod
    def origins(cls, flags: dict[str, Any], file: Path | None = None) -> dict[str, str]:
        """The source from which `load` takes each setting; "limits.max_size_px" is a setting in a group."""
        layers = {source: read() for source, read in cls._sources(flags, file, {}).items()}
        azure = {setting: variable for variable, setting in (AZURE_VARIABLES | CONTENT_SAFETY_VARIABLES).items()}
        found = {}
        for name in setting_names(cls):
            group, _, key = name.rpartition(".")
            holders = (source for source, values in layers.items() if key in (values.get(group, {}) if group else values))
            match next(holders, "default"):
                case "environment":
                    found[name] = f"environment {ENV_PREFIX}{name.replace('.', '__').upper()}"
                case "azure":
                    found[name] = f"environment {azure[name]}"
                case "file":
                    found[name] = f"file {file}"
                case source:
                    found[name] = source
        return found

    def to_json(self) -> str:
        """The configuration for a replica: without content safety, because replicas moderate nothing and need no secrets."""
        return self.model_dump_json(exclude={"content_safety"})

    @classmethod
    def from_json(cls, text: str) -> DeployConfig:
        """The configuration that `to_json` wrote, and nothing of this process's environment."""
        return cls._merged(lambda: {"json": InitSettingsSource(cls, json.loads(text))})


def setting_names(model: type[BaseModel]) -> list[str]:
    """Every setting's name, those of a group with the group's name and a dot."""
    names = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += [f"{name}.{inner}" for inner in setting_names(kind)]
        else:
            names.append(name)
    return names


def _file_source(settings: type[BaseSettings], file: Path) -> PydanticBaseSettingsSource:
    source = TomlConfigSettingsSource if file.suffix == ".toml" else YamlConfigSettingsSource
    return source(settings, file)


def _azure_settings() -> dict[str, Any]:
    found: dict[str, Any] = {"content_safety": content} if (content := _content_safety_settings()) else {}
    for variable, setting in AZURE_VARIABLES.items():
        if text := os.environ.get(variable, "").strip():
            if variable in AZURE_TEXTS:
                found[setting] = text
                continue
            if not text.isascii() or not text.isdigit() or int(text) < 1:
                raise ConfigError(variable, f"must be a whole number, 1 or more, got {text!r}")
            found[setting] = int(text)
    if "model" in found and (folder := os.environ.get(AZURE_MODEL_FOLDER, "").strip()):
        found["model"] = str(Path(found["model"]) / folder)
    return found


def _content_safety_settings() -> dict[str, Any]:
    """The settings of content safety in Azure's variables.

    Raises:
        ConfigError: a variable is empty or unknown. It was set on purpose, and ignoring it could turn content safety off.
    """
    off = "unset every CONTENT_SAFETY_* variable to serve without content safety"
    found: dict[str, Any] = {}
    for variable, text in os.environ.items():
        if not variable.startswith("CONTENT_SAFETY_") or OF_KUBERNETES.fullmatch(variable):
            continue
        if variable not in CONTENT_SAFETY_VARIABLES:
            nearest = _nearest(variable, CONTENT_SAFETY_VARIABLES)
            raise ConfigError(variable, f"no such variable; did you mean {nearest}?" if nearest else f"no such variable; {off}")
        if not text.strip():
            raise ConfigError(variable, f"is set and empty; {off}")
    for variable, setting in CONTENT_SAFETY_VARIABLES.items():
        if text := os.environ.get(variable, "").strip():
            is_list = variable == "CONTENT_SAFETY_BLOCKLISTS"
            found[setting.partition(".")[2]] = [name.strip() for name in text.split(",")] if is_list else text
    return found


def _check_content_safety(config: DeployConfig) -> None:
    """Check the settings of content safety against each other."""
    asked = config.content_safety
    if not asked.is_on:
        return
    if asked.endpoint is None and asked.account_name is None:
        raise ConfigError("CONTENT_SAFETY_ENDPOINT", "content safety is on, and this does not say where it is")
    if asked.key is None and asked.client_id is None:
        raise ConfigError("CONTENT_SAFETY_KEY", "content safety needs this key, or a managed identity in UAI_CLIENT_ID")
    if asked.key is not None and not re.fullmatch("[!-~]+", asked.key.get_secret_value()):
        raise ConfigError("CONTENT_SAFETY_KEY", "must be printable ASCII text without spaces")
    if asked.key is None and not asked.url.startswith("https:"):
        raise ConfigError("CONTENT_SAFETY_ENDPOINT", "must be https:// where a managed identity is used")
    if config.limits.max_prompt_chars > MAX_MODERATED_CHARS:
        raise ConfigError("limits.max_prompt_chars", f"must be at most {MAX_MODERATED_CHARS} with content safety")


def _check_ranks(config: DeployConfig) -> None:
    """Check what cannot work with several devices per replica, whatever the machine."""
    if config.tensor_parallel == 1:
        return
    if config.parallelism == "tensor" and config.engine == "deepspeed":
        raise ConfigError("parallelism", "DeepSpeed's kernels compute with whole weights, got 'tensor'; use 'rows'")
    if config.parallelism == "tensor" and config.lora:
        raise ConfigError("lora", "ranks that share a UNet's layers compute no LoRAs; use parallelism 'rows'")
    if config.engine == "reference":
        raise ConfigError("tensor_parallel", f"the reference engine runs on one device, got {config.tensor_parallel}; use 1")
    if config.device.startswith("cuda:"):
        raise ConfigError(
            "device", f"{config.device!r} is one GPU and {config.tensor_parallel} ranks need one each; use 'cuda'"
        )


def _refuse_misspelt_variables(model: type[BaseModel]) -> None:
    """Only names that are close to a setting's: Kubernetes sets variables that begin with the name of a service."""
    names = {name.replace(".", "__") for name in setting_names(model)} | set(model.model_fields)
    for variable in os.environ:
        name = variable.upper().removeprefix(ENV_PREFIX).lower()
        if variable.upper().startswith(ENV_PREFIX) and variable.upper() not in NOT_SETTINGS and name not in names:
            nearest = _nearest(name, names)
            if nearest is not None:
                raise ConfigError(variable, f"no such setting; did you mean {ENV_PREFIX}{nearest.upper()}?")


def _nearest(name: str, names: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, names, 1, CLOSE)), None)


def _first_problem(model: type[BaseModel], error: ValidationError) -> ConfigError:
    problem = error.errors()[0]
    setting = ".".join(str(part) for part in problem["loc"]) or "config"
    if problem["type"] == "extra_forbidden":
        nearest = _nearest(setting, setting_names(model))
        return ConfigError(setting, f"no such setting; did you mean {nearest}?" if nearest else "no such setting")
    if setting in ("content_safety", "content_safety.key"):
        return ConfigError(setting, problem["msg"])  # the value may be the key
    return ConfigError(setting, f"{problem['msg']}, got {problem['input']!r}")
