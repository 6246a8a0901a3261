"""A deployment described in DeepSpeed-MII's words, as a dict or a YAML file, translated into our settings.

`MiiSettings` is the one table: every setting of `mii.legacy` 0.3.3 with MII's own default and what becomes of it here. Where
deepspeed-mii is installed its own classes look at the description too; without it the same rules hold.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mii_serve.errors import ConfigError
from mii_serve.safe_path import safe_environment

logger = logging.getLogger(__name__)

CHECK_TIMEOUT_S = 180.0
"""For a process that imports mii, and with it torch and deepspeed."""

DEFAULT_HOSTFILE = "/job/hostfile"
DTYPES = {
    **dict.fromkeys(("torch.float16", "fp16", "float16", "half"), "fp16"),
    **dict.fromkeys(("torch.float32", "fp32", "float32", "float"), "fp32"),
    **dict.fromkeys(("torch.bfloat16", "bf16", "bfloat16", "bfloat"), "bf16"),
    **dict.fromkeys(("torch.int8", "int8"), "int8"),
}
"""DeepSpeed's names for a precision, and ours."""

_GROUPS = ("model_conf", "model_config", "mii_config")
_NOT_SHOWN = frozenset({"hf_auth_token", "pipeline_kwargs", "ds_config", "checkpoint_dict"})
"""May hold secrets, or be long."""


@dataclass(frozen=True, slots=True)
class Taken:
    """`as_` says what it becomes."""

    as_: str


@dataclass(frozen=True, slots=True)
class Ignored:
    """Whatever it says, it changes nothing here; one that is not MII's default is logged."""

    why: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Anything but MII's default is an error."""

    why: str


Fate: TypeAlias = Taken | Ignored | Refused
_Port = Annotated[int, Field(ge=0, le=65535)]
_Count = Annotated[int, Field(ge=1)]


class MiiSettings(BaseModel):
    """MII's `MIIConfig` and `ModelConfig`, flat."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    deployment_name: Annotated[str, Taken("deployment_name")] = Field(min_length=1, max_length=64)
    deployment_type: Annotated[
        Literal["local", "aml", "non-persistent"],
        Refused("only 'local' is a server on this machine; for Azure ML, run mii_serve deploy in the container"),
    ] = "local"
    port_number: Annotated[_Port, Taken("grpc_port")] = 50050
    enable_restful_api: Annotated[bool, Taken("http_port: restful_api_port, or any free port without it")] = False
    restful_api_port: Annotated[_Port, Taken("http_port, with enable_restful_api")] = 51080
    hostfile: Annotated[str, Refused("one deployment runs on one machine; start one on each")] = DEFAULT_HOSTFILE
    version: Annotated[int, Ignored("it is for MII's Azure ML scripts")] = 1
    instance_type: Annotated[str, Ignored("it is for MII's Azure ML scripts")] = "Standard_NC12s_v3"

    model: Annotated[str, Taken("model; also written model_name_or_path")] = Field(min_length=1)
    task: Annotated[Literal["text-to-image"], Taken("the only task served here")]
    dtype: Annotated[str, Taken("dtype; left out, fp32 without enable_deepspeed, else auto")] = "torch.float32"
    model_path: Annotated[str, Taken("model, if it is a folder with a model; else the hub's cache")] = ""
    tensor_parallel: Annotated[_Count, Taken("tensor_parallel")] = 1
    replica_num: Annotated[_Count, Taken("replicas")] = 1
    enable_deepspeed: Annotated[bool, Taken("engine: auto, or native if false")] = True
    replace_with_kernel_inject: Annotated[bool, Taken("engine: auto, or native if false")] = True
    enable_cuda_graph: Annotated[bool, Taken("nothing: CUDA graphs are captured wherever the engine has them")] = False
    hf_auth_token: Annotated[str | None, Taken("HF_TOKEN in the environment of the server")] = Field(None, repr=False)
    load_with_sys_mem: Annotated[bool, Refused("MII refuses it for Stable Diffusion, too")] = False
    meta_tensor: Annotated[bool, Ignored("weights are read once, onto their device")] = False
    skip_model_check: Annotated[bool, Ignored("the model's own files are checked, and no list on the hub")] = False
    max_tokens: Annotated[int, Ignored("a prompt has as many tokens as the text encoder takes")] = 1024
    profile_model_time: Annotated[bool, Ignored("times are always measured; see /metrics")] = False
    torch_dist_port: Annotated[int, Ignored("replicas need no common port")] = 29500
    deploy_rank: Annotated[list[int] | None, Refused("choose the devices with CUDA_VISIBLE_DEVICES")] = None
    replica_configs: Annotated[list[Any], Refused("say how many with replica_num")] = []
    trust_remote_code: Annotated[bool, Refused("code that comes with a model is never run")] = False
    pipeline_kwargs: Annotated[dict[str, Any], Refused("the model is loaded by this server's own rules")] = {}
    enable_zero: Annotated[bool, Refused("there is no ZeRO-Inference here")] = False
    ds_config: Annotated[dict[str, Any], Refused("there is no ZeRO-Inference here")] = {}
    checkpoint_dict: Annotated[dict[str, Any] | None, Refused("say where the model is with model or model_path")] = None

    @field_validator("deployment_type", "task", mode="before")
    @classmethod
    def _plain(cls, given: object) -> object:
        """MII's enumerations are text with a name around it."""
        return getattr(given, "value", given)

    @field_validator("dtype", mode="before")
    @classmethod
    def _known_dtype(cls, given: object) -> str:
        name = given if isinstance(given, str) else str(given)  # a torch.dtype calls itself torch.float16
        if name not in DTYPES:
            raise ValueError(f"must be one of {', '.join(sorted(DTYPES))}")
        return name

    @field_validator("deploy_rank", mode="before")
    @classmethod
    def _one_or_more(cls, given: object) -> object:
        return given if not given or isinstance(given, list) else [given]

    @model_validator(mode="after")
    def _one_rank_for_each_part(self) -> MiiSettings:
        if self.deploy_rank is not None and len(self.deploy_rank) != self.tensor_parallel:
            raise ValueError(f"deploy_rank must name as many devices as tensor_parallel, {self.tensor_parallel}")
        return self


def fates() -> dict[str, Fate]:
    """What becomes of each setting, by MII's name."""
    return {
        name: next(fate for fate in one.metadata if isinstance(fate, Taken | Ignored | Refused))
        for name, one in MiiSettings.model_fields.items()
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """Settings of `DeployConfig`; and what goes into the server's environment, because it is no setting or a secret."""

    settings: dict[str, Any]
    environment: dict[str, str] = field(repr=False)


def translate(given: Mapping[str, Any]) -> Translation:
    """What a description in MII's words asks for here.

    `given` has MII's settings side by side, or in the groups `model_conf`, `model_config` or `mii_config`.

    Raises:
        ConfigError: naming the setting and the rule, MII's or ours.
    """
    flat = _flat(given)
    try:
        said = MiiSettings(**flat)
    except ValidationError as error:
        raise _first_problem(error) from None
    _refuse_and_tell(said)
    _ask_mii(flat)
    dtype = DTYPES[said.dtype] if "dtype" in flat else "fp32" if not said.enable_deepspeed else "auto"
    if dtype == "int8":
        raise ConfigError("dtype", "there is no int8 here; use fp16, bf16 or fp32")
    model, environment = said.model, {}
    if said.hf_auth_token:
        environment["HF_TOKEN"] = said.hf_auth_token
    if said.model_path and (Path(said.model_path) / "model_index.json").is_file():
        model = said.model_path
    elif said.model_path:
        environment["HF_HUB_CACHE"] = said.model_path
    return Translation(
        settings={
            "model": model,
            "deployment_name": said.deployment_name,
            "grpc_port": said.port_number,
            # MII has no HTTP port unless it is asked for one, and two deployments must not meet at ours.
            "http_port": said.restful_api_port if said.enable_restful_api else 0,
            "dtype": dtype,
            "engine": "auto" if said.enable_deepspeed and said.replace_with_kernel_inject else "native",
            "replicas": said.replica_num,
            "tensor_parallel": said.tensor_parallel,
        },
        environment=environment,
    )


def read_mii_file(file: Path) -> dict[str, Any]:
    """What a YAML file says.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--mii-config", f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = "" if where is None else f" at line {where.line + 1}"
        raise ConfigError("--mii-config", f"{file} is not YAML{line}") from None  # not quoted: it may hold a token
    if not isinstance(read, dict) or not all(isinstance(name, str) for name in read):
        raise ConfigError("--mii-config", f"{file} must hold MII's settings by name")
    return read


def _flat(given: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in given.items():
        if name in _GROUPS:
            if not isinstance(value, Mapping):
                raise ConfigError(name, f"must hold settings by name, got {type(value).__name__}")
            inner = _flat(value)
        else:
            inner = {"model" if name == "model_name_or_path" else name: value}
        for key, one in inner.items():
            if key in flat and flat[key] != one:
                raise ConfigError(key, "is given twice, with different values")
            flat[key] = one
    return flat


def _first_problem(error: ValidationError) -> ConfigError:
    problem = error.errors()[0]
    name, value = str((*problem["loc"], "deploy_rank")[0]), problem["input"]
    if problem["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(name, MiiSettings.model_fields, 1, 0.8)
        return ConfigError(name, "MII has no such setting" + (f"; did you mean {nearest[0]}?" if nearest else ""))
    if problem["type"] == "missing":
        return ConfigError(name, "is missing")
    is_shown = name not in _NOT_SHOWN and isinstance(value, str | int | float) and problem["loc"]
    return ConfigError(name, problem["msg"].removeprefix("Value error, ") + (f", got {value!r:.80}" if is_shown else ""))


def _refuse_and_tell(said: MiiSettings) -> None:
    for name, fate in fates().items():
        if name == "deploy_rank" and said.deploy_rank == list(range(said.tensor_parallel)):
            continue  # what MII itself makes of none
        if getattr(said, name) == MiiSettings.model_fields[name].default:
            continue
        if isinstance(fate, Refused):
            raise ConfigError(name, f"is not for this server: {fate.why}")
        if isinstance(fate, Ignored):
            logger.warning("MII's setting %s is ignored: %s", name, fate.why)


def _ask_mii(flat: Mapping[str, Any]) -> None:
    """Let deepspeed-mii's own classes look at it, where there are any."""
    if importlib.util.find_spec("mii") is None:
        return
    plain = {name: value for name, value in flat.items() if name not in _NOT_SHOWN}
    plain = {name: getattr(value, "value", value) for name, value in plain.items()}
    # MII's own defaults fail where Azure ML's variable is set.
    environment = {name: value for name, value in os.environ.items() if name != "AZUREML_MODEL_DIR"}
    command = [sys.executable, str(Path(__file__).with_name("mii_check.py"))]
    try:
        ran = subprocess.run(
            command,
            input=json.dumps(plain, default=str),
            capture_output=True,
            text=True,
            timeout=CHECK_TIMEOUT_S,
            env=safe_environment(environment),
            check=True,
        )
        verdict = json.loads(ran.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        logger.warning("deepspeed-mii is installed and cannot be imported; its settings are checked by our rules alone")
        return
    if verdict is not None:
        raise ConfigError(verdict["setting"], f"deepspeed-mii says: {verdict['rule']}")
    logger.info("deepspeed-mii has accepted the description")
