"""`import mii_serve.compat.mii as mii`: what a script written for DeepSpeed-MII calls, on this server.

    mii.deploy(task="text-to-image", model="CompVis/stable-diffusion-v1-4", deployment_name="sd", mii_config={"dtype": "fp16"})
    result = mii.mii_query_handle("sd").query({"prompt": "a red circle"}, num_inference_steps=20, seed=5)
    result.images[0].save("out.png")
    mii.terminate("sd")

As with MII, a deployment outlives the script that started it. Text to image only; what else MII had is refused by name.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import grpc
from PIL import Image

from mii_serve.client.calls import OPTIONS, typed_error
from mii_serve.compat.mii_config import translate
from mii_serve.compat.registry import Entry, Process
from mii_serve.config import DeployConfig
from mii_serve.errors import ConfigError, InvalidRequestError, MiiServeError, UnavailableError
from mii_serve.proto.mii_codec import MII_PACKAGES, decode_mii_reply, encode_mii_request
from mii_serve.safe_path import safe_environment

__all__ = ["DeploymentType", "ImageResponse", "MIIClient", "TaskType", "deploy", "mii_query_handle", "terminate"]

API_KEY_VARIABLE = "MII_SERVE_API_KEY"
_SERVICE = f"/{MII_PACKAGES[0]}.ModelResponse"
_INVALID = 2
"""What `mii_serve deploy` exits with when a setting is wrong."""
_LOOK_S = 0.1
_SPARE_S = 30.0
"""Beyond the server's own bound on its start."""

_children: dict[int, subprocess.Popen[bytes]] = {}
"""Deployments started by this process; kept so that their ends are collected."""


class DeploymentType(StrEnum):
    """MII's. Only LOCAL is served."""

    LOCAL = "local"
    AML = "aml"
    NON_PERSISTENT = "non-persistent"


class TaskType(StrEnum):
    """MII's. Only TEXT2IMG is served."""

    TEXT_GENERATION = "text-generation"
    TEXT_CLASSIFICATION = "text-classification"
    QUESTION_ANSWERING = "question-answering"
    FILL_MASK = "fill-mask"
    TOKEN_CLASSIFICATION = "token-classification"
    TEXT2IMG = "text-to-image"
    ZERO_SHOT_IMAGE_CLASSIFICATION = "zero-shot-image-classification"
    INPAINTING = "text-to-image-inpainting"


@dataclass(frozen=True, slots=True)
class ImageResponse:
    """`time_taken` is the server's, in seconds. As with MII, no safety checker means False throughout."""

    images: list[Image.Image]
    nsfw_content_detected: list[bool]
    time_taken: float


def deploy(
    deployment_name: str | None = None,
    model_config: Mapping[str, Any] | None = None,
    mii_config: Mapping[str, Any] | None = None,
    *,
    task: str | None = None,
    model: str | None = None,
    deployment_type: str | None = None,
    model_path: str | None = None,
    enable_deepspeed: bool | None = None,
    enable_zero: bool | None = None,
    ds_config: Mapping[str, Any] | None = None,
    version: int | None = None,
) -> None:
    """Start a server in the background, and return when it has made its first picture.

    Raises:
        ConfigError: naming the setting, MII's or ours, and the rule; or the name is in use.
        UnavailableError: it did not get ready in time.
        MiiServeError: it ended instead; the text says where its log is.
    """
    if not isinstance(model_config, Mapping | None) or not isinstance(mii_config, Mapping | None):
        raise ConfigError("deploy", "takes its arguments by name: deploy(task=..., model=..., deployment_name=...)")
    given = {
        "deployment_name": deployment_name,
        "task": task,
        "model": model,
        "deployment_type": deployment_type,
        "model_path": model_path,
        "enable_deepspeed": enable_deepspeed,
        "enable_zero": enable_zero,
        "ds_config": ds_config,
        "version": version,
        "model_config": model_config,
        "mii_config": mii_config,
    }
    translated = translate({name: value for name, value in given.items() if value is not None})
    config = DeployConfig.load({}, written=translated.settings)
    entry = Entry(config.deployment_name)
    with entry.starting():
        _write_private(entry.settings, json.dumps(translated.settings, indent=1))
        child = _spawn(entry, translated.environment)
        try:
            is_tls = config.tls_cert is not None
            entry.note(Process.of(child.pid, is_tls=is_tls, drain_timeout_s=config.drain_timeout_s))
            _wait_ready(entry, child, config.startup_timeout_s + _SPARE_S)
        except BaseException:  # an interrupt, too: a caller who gave up the wait wants no server
            _end(child)
            entry.forget()
            raise
        _children[child.pid] = child


def mii_query_handle(deployment_name: str) -> MIIClient:
    """A client of a deployment that `deploy` has started, in whatever process of this user.

    Raises:
        UnavailableError: it does not run, or is not ready.
    """
    process, address = Entry(deployment_name).running()
    if process.is_tls:
        raise ConfigError("tls_cert", f"this deployment speaks TLS and MII's clients do not; use mii_serve.client on {address}")
    return _Handle(deployment_name, address)


def terminate(deployment_name: str) -> None:
    """Let a deployment finish what it has in work, and end it.

    Raises:
        UnavailableError: it does not run.
    """
    entry = Entry(deployment_name)
    process = entry.process()
    if process is None or not process.stop():
        raise UnavailableError(f"no deployment {deployment_name!r} of this user runs on this machine")
    if (child := _children.pop(process.pid, None)) is not None:
        child.wait()
    entry.forget()


class MIIClient:
    """MII's client, for any server that speaks MII's wire and from any thread. `MII_SERVE_API_KEY` is its API key."""

    def __init__(self, task: str = TaskType.TEXT2IMG, host: str = "localhost", port: int = 50050) -> None:
        """Connect with the first call.

        Raises:
            ConfigError: a task that is not served.
        """
        if task not in (TaskType.TEXT2IMG, TaskType.TEXT2IMG.value):
            raise ConfigError("task", f"must be 'text-to-image', got {getattr(task, 'value', task)!r}")
        self._connect(f"{host}:{port}")

    def _connect(self, target: str) -> None:
        self.target = target
        self._channel = grpc.insecure_channel(target, OPTIONS)
        key = os.environ.get(API_KEY_VARIABLE)
        self._metadata = (("authorization", f"Bearer {key}"),) if key else ()

    def query(self, request_dict: Mapping[str, Any], **query_kwargs: Any) -> ImageResponse:
        """The pictures of `request_dict`'s prompt, a text or a list of them; of its negative_prompt, too, where it has one.

        Raises:
            InvalidRequestError: naming what breaks a rule.
            MiiServeError: what became of it.
        """
        asked = dict(request_dict)
        prompt = asked.pop("prompt" if "prompt" in asked else "query", None)  # "query" was the older name
        negative = asked.pop("negative_prompt", None)
        if asked:
            raise InvalidRequestError("request", "must have prompt and negative_prompt only", ", ".join(map(repr, asked)))
        kwargs = {name: value for name, value in query_kwargs.items() if value is not None}
        prompts, negatives = _texts("prompt", prompt), _texts("negative_prompt", negative)
        request = encode_mii_request(prompts, negatives, kwargs)
        reply = decode_mii_reply(self._call("Txt2ImgReply", request.SerializeToString()))
        size = (reply.size_w, reply.size_h)
        images = [Image.frombytes(reply.mode, size, pixels) for pixels in reply.images]
        return ImageResponse(images, list(reply.nsfw_content_detected), reply.time_taken)

    def terminate(self) -> None:
        """Ask the server to end. Most are configured to refuse that.

        Raises:
            PermissionDeniedError: this one is.
        """
        self._call("Terminate", b"")

    def close(self) -> None:
        self._channel.close()

    def _call(self, method: str, request: bytes) -> bytes:
        call: Any = self._channel.unary_unary(f"{_SERVICE}/{method}")
        try:
            return bytes(call(request, metadata=self._metadata))
        except grpc.RpcError as error:
            raise typed_error(error, self.target) from error


class _Handle(MIIClient):
    """Of a deployment known by its name."""

    def __init__(self, name: str, target: str) -> None:
        self._name = name
        self._connect(target)

    def terminate(self) -> None:
        terminate(self._name)


def _texts(name: str, given: object) -> Sequence[str]:
    texts = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise InvalidRequestError(name, "must be text or a list of texts", type(given).__name__)
    return texts


def _spawn(entry: Entry, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Its log is a file: a script's own output may be a pipe, whose reader would wait for the server's end."""
    command = [sys.executable, "-m", "mii_serve", "deploy", "--config", str(entry.settings), "--log-level", "warning"]
    with entry.stdout.open("wb") as stdout, entry.log.open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=log,
            env=safe_environment({**os.environ, **environment}),
            start_new_session=True,  # Ctrl-C in the script's terminal is not for the server
        )


def _wait_ready(entry: Entry, child: subprocess.Popen[bytes], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while entry.address() is None:
        if child.poll() is not None:
            raise _why_it_ended(entry, child.returncode)
        if time.monotonic() > deadline:
            raise UnavailableError(f"{entry.name!r} was not ready within {timeout_s:g} s; its log is {entry.log}")
        time.sleep(_LOOK_S)


def _why_it_ended(entry: Entry, code: int) -> MiiServeError:
    said = [line for line in entry.log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
    text = said[-1].removeprefix("error: ") if said else f"it ended with {code}"
    setting, found, rule = text.partition(": ")
    if code == _INVALID and found:
        return ConfigError(setting, rule)
    return MiiServeError(f"{entry.name!r} did not start: {text}; its log is {entry.log}")


def _end(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _write_private(file: Path, text: str) -> None:
    file.unlink(missing_ok=True)
    file.touch(mode=0o600, exist_ok=False)
    file.write_text(text)
