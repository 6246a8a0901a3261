"""What the two calls are given: one signature, and what is refused before anything is sent."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest

from mii_serve.client import AsyncClient, Client
from mii_serve.client.arguments import build_request, check_bound, check_timeout
from mii_serve.errors import InvalidRequestError
from mii_serve.proto.codec import encode_request
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.types import PARAMETER_NAMES, PARAMETERS, ImageFormat, OutputOptions, Priority

CALL_OPTIONS = {
    "image",
    "mask_image",
    "strength",
    "timesteps",
    "sigmas",
    "prompt_embeds",
    "negative_prompt_embeds",
    "output_format",
    "quality",
    "embed_metadata",
    "loras",
    "priority",
    "idempotency_key",
    "timeout",
}


def encode(prompt: Any, **options: Any) -> pb.GenerateRequest:
    return encode_request(build_request(prompt, options))


@pytest.mark.parametrize("client", [Client, AsyncClient])
@pytest.mark.parametrize(("call", "own"), [("generate", set()), ("stream", {"preview_every"})])
def test_a_call_lists_every_argument(client: type, call: str, own: set[str]) -> None:
    method = getattr(client, call)
    (_, prompt, *options) = inspect.signature(method).parameters.values()
    assert prompt.name == "prompt"
    assert {"prompt", *(option.name for option in options)} == {*PARAMETER_NAMES, *CALL_OPTIONS, *own}
    assert {option.kind for option in options} == {inspect.Parameter.KEYWORD_ONLY}
    defaults = {option.name: option.default for option in options}
    assert {name: default for name, default in defaults.items() if default is not None} == {
        "output_format": "png",
        "embed_metadata": False,
    }
    assert all(f"{parameter.name}: {parameter.help}" in inspect.getdoc(method) for parameter in PARAMETERS)


@pytest.mark.parametrize(
    ("call", "name"), [("generate", "sed"), ("stream", "guidance"), ("generate", "preview_every"), ("generate", "self_")]
)
def test_a_misspelt_name_is_a_type_error_that_names_it(call: str, name: str) -> None:
    for one in (Client("127.0.0.1:1"), AsyncClient("127.0.0.1:1")):
        with pytest.raises(TypeError, match=rf"{call}\(\) got an unexpected keyword argument '{name}'"):
            getattr(one, call)("a", **{name: 3})
        with pytest.raises(TypeError, match="prompt"):
            getattr(one, call)(seed=3)


def test_what_is_left_out_stays_absent() -> None:
    assert build_request("a", {}) == build_request("a", dict.fromkeys([*PARAMETER_NAMES[1:], "quality", "priority"]))
    message = encode("a")
    assert {field.name for field, _ in message.ListFields()} == {"prompt", "output"}
    assert message.output == pb.OutputOptions(format=pb.IMAGE_FORMAT_PNG, embed_metadata=False)


def test_what_is_said_travels_exactly() -> None:
    said = {
        "negative_prompt": "",
        "num_inference_steps": 20,
        "guidance_scale": 7.3,
        "seed": 2**64 - 1,
        "height": 512,
        "width": 640,
        "num_images_per_prompt": 3,
        "scheduler": "ddim",
    }
    message = encode("a", **said, output_format="jpeg", quality=80, priority="low", preview_every=5)
    assert {name: getattr(message, name) for name in said} == said
    assert message.HasField("negative_prompt")
    assert (message.output.format, message.output.quality) == (pb.IMAGE_FORMAT_JPEG, 80)
    assert (message.priority, message.output.preview_every) == (pb.PRIORITY_LOW, 5)


def test_the_options_are_the_servers_values() -> None:
    request = build_request("a", {"output_format": "webp", "quality": 7, "priority": "high", "timeout": 3})
    assert request.output == OutputOptions(format=ImageFormat.WEBP, quality=7)
    assert request.priority is Priority.HIGH
    assert build_request("a", {"priority": None}).priority is Priority.NORMAL
    assert build_request("a", {"embed_metadata": True}).output.embed_metadata is True


@pytest.mark.parametrize(
    ("changed", "field", "rule"),
    [
        ({"prompt": ["a", "b"]}, "prompt", "one call for each prompt"),
        ({"prompt": 3}, "prompt", "must be text"),
        ({"prompt": "\ud800"}, "prompt", "Unicode"),
        ({"num_inference_steps": "20"}, "num_inference_steps", "whole number"),
        ({"num_inference_steps": True}, "num_inference_steps", "whole number"),
        ({"seed": -1}, "seed", "64-bit"),
        ({"seed": 2**64}, "seed", "64-bit"),
        ({"output_format": "gif"}, "output_format", "png, jpeg, webp, raw_rgb"),
        ({"output_format": []}, "output_format", "png, jpeg, webp, raw_rgb"),
        ({"priority": "urgent"}, "priority", "high, normal, low"),
        ({"quality": 80}, "output.quality", "JPEG and WebP only"),
        ({"preview_every": 0}, "output.preview_every", "must be in"),
        ({"output_format": "webp", "embed_metadata": True}, "output.embed_metadata", "PNG only"),
    ],
)
def test_what_no_message_can_carry_is_refused_by_name(changed: dict[str, Any], field: str, rule: str) -> None:
    with pytest.raises(InvalidRequestError, match=rule) as caught:
        encode(**{"prompt": "a", **changed})
    assert caught.value.field == field


@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf, True, "5"])
def test_a_timeout_is_a_finite_number_above_zero(timeout: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_timeout(timeout)
    assert caught.value.field == "timeout"


def test_a_timeout_may_be_left_out_or_be_longer_than_grpc_can_count() -> None:
    assert check_timeout(None) is None
    assert check_timeout(2) == 2.0
    assert check_timeout(1e300) == 365 * 86400
    with pytest.raises(InvalidRequestError):
        check_bound(None)  # type: ignore[arg-type]


def test_embeddings_of_numpy_travel_in_their_precision() -> None:
    numbers = np.arange(6, dtype=">f8").reshape(1, 3, 2)
    message = encode(None, prompt_embeds=numbers, negative_prompt_embeds=numbers[0].astype("f2"), timesteps=np.array([9, 5]))
    assert not message.prompt and list(message.timesteps) == [9, 5]
    one, other = message.prompt_embeds, message.negative_prompt_embeds
    assert [(each.num_tokens, each.width, each.dtype) for each in (one, other)] == [(3, 2, "fp32"), (3, 2, "fp16")]
    assert (np.frombuffer(one.data, "<f4") == np.frombuffer(other.data, "<f2")).all()
    for given in ([1.0], np.zeros(3), "text", np.zeros((2, 3, 4))):
        with pytest.raises(InvalidRequestError, match="prompt_embeds: must be an array of numpy or a tensor of torch"):
            encode(None, prompt_embeds=given)
    with pytest.raises(InvalidRequestError, match="sigmas: must be a list of numbers"):
        encode("a", sigmas=["a"])
