"""DeepSpeed-MII's picture messages ⇄ our values, for both ends of a call. Both generations of its request are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from google.protobuf.message import DecodeError

from mii_serve.errors import InvalidRequestError
from mii_serve.proto.codec import MAX_NAMED_FIELDS, unknown_field_numbers
from mii_serve.proto.mii import pictures_pb2 as mii
from mii_serve.types import (
    PARAMETERS,
    RANDOM_SEED,
    GenerationParams,
    GenerationRequest,
    ImageFormat,
    ImageReady,
    OutputOptions,
    RequestedParams,
    ResolvedRequest,
)
from mii_serve.types.tensors import shortest_decimal

MAX_PICTURES_PER_CALL = 64
"""Prompts × images of each. MII itself knows no bound."""

MAX_REPLY_BYTES = 2**27 - 64 * 1024
"""What MII's clients take in one message, less room for everything that is no pixel."""

_MAX_KWARGS = 64

MII_KWARGS = tuple(sorted(parameter.name for parameter in PARAMETERS if parameter.name != "prompt"))
"""The query_kwargs that are taken. `seed`, `scheduler` and `prompt_syntax` are ours: MII takes no notice of them."""

REFUSED_KWARGS = frozenset(
    {
        "callback",
        "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
        "callback_steps",
        "clip_skip",
        "cross_attention_kwargs",
        "eta",
        "generator",
        "guidance_rescale",
        "ip_adapter_image",
        "ip_adapter_image_embeds",
        "latents",
        "negative_prompt_embeds",
        "output_type",
        "prompt_embeds",
        "return_dict",
        "sigmas",
        "timesteps",
    }
) - set(MII_KWARGS)
"""What diffusers' pipeline takes and we do not."""

MII_PACKAGES = ("legacymodelresponse", "modelresponse")
"""DeepSpeed-MII's, since 0.1.1 and before."""

Scalar: TypeAlias = str | int | float | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class MiiRequest:
    """What a call says, by either generation. `negative_prompts` are none, or one for each prompt."""

    prompts: Sequence[str] = field(repr=False)
    negative_prompts: Sequence[str] = field(repr=False)
    kwargs: Mapping[str, Scalar] = field(repr=False)


# ---- requests ----------------------------------------------------------------------------------------------------


def parse_mii_request(wire: bytes) -> MiiRequest:
    """Read a request of either generation.

    Up to deepspeed-mii 0.2.1 the second field was the map of query_kwargs; since then it is the negative prompts, and the map
    is the third. A call is of the old kind when it has no third field and all of the second reads as entries of a map.

    Raises:
        DecodeError: these bytes are no message.
        InvalidRequestError: naming the field and the rule.
    """
    message = mii.PictureRequest.FromString(wire)
    if unknown := unknown_field_numbers(message):
        raise InvalidRequestError(
            "request", "has fields this server does not know", f"field numbers {unknown[:MAX_NAMED_FIELDS]}"
        )
    if len(message.prompt) > MAX_PICTURES_PER_CALL:
        raise InvalidRequestError("prompt", f"must be at most {MAX_PICTURES_PER_CALL} in one call", str(len(message.prompt)))
    if not message.query_kwargs and (entries := _as_entries(message.second)) is not None:
        return MiiRequest(
            prompts=message.prompt,
            negative_prompts=(),
            kwargs={entry.key: _scalar(entry.key, entry.value) for entry in entries},
        )
    if len(message.second) not in (0, len(message.prompt)):
        got = f"{len(message.second)} for {len(message.prompt)}"
        raise InvalidRequestError("negative_prompt", "must be none, or one for each prompt", got)
    return MiiRequest(
        prompts=message.prompt,
        negative_prompts=[_decoded(i, text) for i, text in enumerate(message.second)],
        kwargs={name: _scalar(name, value) for name, value in message.query_kwargs.items()},
    )


def decode_mii_request(
    request: MiiRequest, resolve: Callable[[GenerationRequest], ResolvedRequest], *, fallback_seed: int
) -> list[ResolvedRequest]:
    """What to make for each prompt, resolved by `resolve`. Image k of the whole reply is made from seed + k.

    Raises:
        InvalidRequestError: naming what breaks a rule; of several prompts, which.
    """
    _refuse_other_kwargs(request.kwargs)
    if not request.prompts:
        raise InvalidRequestError("prompt", "must be one text or more")
    kwargs = dict(request.kwargs)
    negatives = _negative_prompts(request, kwargs.pop("negative_prompt", None))
    seed = kwargs.get("seed", RANDOM_SEED)
    if seed == RANDOM_SEED and not isinstance(seed, bool):
        kwargs["seed"] = fallback_seed
    resolved: list[ResolvedRequest] = []
    for i, (prompt, negative) in enumerate(zip(request.prompts, negatives, strict=True)):
        asked = RequestedParams(prompt=prompt, negative_prompt=negative, **kwargs)  # type: ignore[arg-type]  # resolve checks
        try:
            one = resolve(GenerationRequest(params=asked, output=OutputOptions(format=ImageFormat.RAW_RGB)))
        except InvalidRequestError as error:
            raise _of_prompt(i, error) if len(request.prompts) > 1 else error from None
        if not resolved:
            _refuse_too_much(len(request.prompts), one.params)
        resolved.append(replace(one, params=replace(one.params, seed=one.params.seed_of(i * one.params.num_images_per_prompt))))
    return resolved


def encode_mii_request(
    prompts: Sequence[str], negative_prompts: Sequence[str], kwargs: Mapping[str, object]
) -> mii.PictureRequest:
    """Write a request of the newer generation.

    Raises:
        InvalidRequestError: a value that the wire cannot carry.
    """
    try:
        message = mii.PictureRequest(prompt=prompts, second=[text.encode() for text in negative_prompts])
    except (TypeError, ValueError, AttributeError):  # a UnicodeError is a ValueError
        raise InvalidRequestError("prompt", "must be valid Unicode text, and so must negative_prompt") from None
    kinds = {str: "svalue", int: "ivalue", float: "fvalue", bool: "bvalue"}
    for name, value in kwargs.items():
        if (kind := kinds.get(type(value))) is None:
            raise InvalidRequestError(name, "must be text, a number, true or false", type(value).__name__)
        try:
            setattr(message.query_kwargs[name], kind, value)
        except ValueError:
            raise InvalidRequestError(name, "must be valid Unicode text or fit into 64 bits") from None
    return message


def decode_mii_reply(wire: bytes) -> mii.ImageReply:
    return mii.ImageReply.FromString(wire)


def _as_entries(wires: Iterable[bytes]) -> list[mii.KwargEntry] | None:
    """The entries of a map that these are; None when there are none, or one is something else."""
    entries: list[mii.KwargEntry] = []
    for wire in wires:
        try:
            entry = mii.KwargEntry.FromString(wire)
        except DecodeError:
            return None
        if not entry.key or not entry.HasField("value") or unknown_field_numbers(entry) or len(entries) == _MAX_KWARGS:
            return None
        entries.append(entry)
    return entries or None


def _decoded(index: int, text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise InvalidRequestError(f"negative_prompt[{index}]", "must be valid UTF-8 text") from None


def _scalar(name: str, value: mii.Value) -> Scalar:
    match value.WhichOneof("oneof_values"):
        case "svalue":
            return value.svalue
        case "ivalue":
            return value.ivalue
        case "fvalue":
            return shortest_decimal(value.fvalue)
        case "bvalue":
            return value.bvalue
        case _:
            raise InvalidRequestError("query_kwargs", "must each have a value", f"none for {_quoted([name])}")


def _refuse_other_kwargs(kwargs: Mapping[str, Scalar]) -> None:
    if unknown := sorted(kwargs.keys() - set(MII_KWARGS) - REFUSED_KWARGS):
        raise InvalidRequestError("query_kwargs", f"must be among {', '.join(MII_KWARGS)}", _quoted(unknown))
    if refused := sorted(kwargs.keys() & REFUSED_KWARGS):
        raise InvalidRequestError(
            "query_kwargs", "must not hold parameters of diffusers that this server does not take", _quoted(refused)
        )
    scheduler = kwargs.get("scheduler", "")
    if not isinstance(scheduler, str):
        raise InvalidRequestError("scheduler", "must be text", repr(scheduler)[:80])


def _quoted(names: Sequence[str]) -> str:
    """Short and plain enough for a status text, which is metadata and has a bound."""
    return ", ".join(ascii(name[:40]) for name in names[:5])[:400] + (", ..." if len(names) > 5 else "")


def _negative_prompts(request: MiiRequest, for_all: Scalar | None) -> Sequence[str | None]:
    if for_all is None:
        return request.negative_prompts or [None] * len(request.prompts)
    if any(request.negative_prompts):
        raise InvalidRequestError("negative_prompt", "must not be in query_kwargs too")
    if not isinstance(for_all, str):
        raise InvalidRequestError("negative_prompt", "must be text", repr(for_all)[:80])
    return [for_all] * len(request.prompts)


def _of_prompt(index: int, error: InvalidRequestError) -> InvalidRequestError:
    """The same error saying which prompt's it is, where it is about a text."""
    if error.field not in ("prompt", "negative_prompt"):
        return error
    return InvalidRequestError(f"{error.field}[{index}]", str(error).removeprefix(f"{error.field}: "))


def _refuse_too_much(num_prompts: int, params: GenerationParams) -> None:
    num_pictures = num_prompts * params.num_images_per_prompt
    if num_pictures > MAX_PICTURES_PER_CALL:
        rule = f"times the number of prompts must be at most {MAX_PICTURES_PER_CALL} in one call"
        raise InvalidRequestError("num_images_per_prompt", rule, str(num_pictures))
    num_that_fit = MAX_REPLY_BYTES // (params.height * params.width * 3)
    if num_pictures > num_that_fit:
        size = f"{params.width}x{params.height}"
        rule = f"times the number of prompts must be at most {num_that_fit} at {size}: a reply of MII's holds 128 MiB"
        raise InvalidRequestError("num_images_per_prompt", rule, str(num_pictures))


# ---- answers -----------------------------------------------------------------------------------------------------


_IMAGES_TAG = bytes([mii.ImageReply.IMAGES_FIELD_NUMBER << 3 | 2])


def encode_mii_reply(images: Sequence[ImageReady], seconds: float) -> bytes:
    """An `ImageReply` with the raw pictures in this order, as it goes on the wire.

    MII has no value for "not checked" and sends False then; so does this. The pixels are put in place by hand: protobuf
    copies them more often, and the front does nothing else meanwhile.
    """
    first = images[0]
    rest = mii.ImageReply(
        nsfw_content_detected=[bool(image.nsfw_content_detected) for image in images],
        mode="RGB",
        size_w=first.width,
        size_h=first.height,
        time_taken=seconds,
    )
    wire: list[bytes] = []
    for image in images:
        wire += (_IMAGES_TAG, _varint(len(image.encoded)), image.encoded)
    return b"".join((*wire, rest.SerializeToString()))


def _varint(number: int) -> bytes:
    """https://protobuf.dev/programming-guides/encoding/#varints"""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
