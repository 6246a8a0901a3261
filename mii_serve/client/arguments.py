"""What a call is given: the names of its arguments, and what is refused before anything is sent.

The rules of a request are the server's to check. Here a value is refused only where no message could carry it.
"""

from __future__ import annotations

import inspect
import io
import math
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, Literal, TypeAlias, TypeVar, get_type_hints

from PIL import Image

from mii_serve.errors import InvalidRequestError
from mii_serve.types import (
    EMBEDS,
    FP16,
    FP32,
    LORAS_HELP,
    OWN_STEPS,
    PARAMETER_NAMES,
    PARAMETERS,
    STRENGTH,
    GenerationKwargs,
    GenerationRequest,
    ImageFormat,
    OutputOptions,
    Priority,
    PromptEmbeds,
    RequestedParams,
)

OutputFormat: TypeAlias = Literal["png", "jpeg", "webp", "raw_rgb"]
PriorityName: TypeAlias = Literal["high", "normal", "low", "batch"]

_LONGEST_TIMEOUT_S = 365 * 86400.0


class GenerateOptions(GenerationKwargs, total=False):
    """The keyword arguments of `generate`: the parameters of the request, and those of the call."""

    image: Image.Image | bytes | None
    mask_image: Image.Image | bytes | None
    prompt_embeds: Any
    negative_prompt_embeds: Any
    output_format: OutputFormat
    quality: int | None
    embed_metadata: bool
    priority: PriorityName | None
    idempotency_key: str | None
    timeout: float | None


class StreamOptions(GenerateOptions, total=False):
    """The keyword arguments of `stream`."""

    preview_every: int | None


_DEFAULTS: Mapping[str, Any] = {
    **dict.fromkeys(get_type_hints(StreamOptions)),
    "output_format": OutputOptions().format.value,
    "embed_metadata": OutputOptions().embed_metadata,
}

_HELPS = {
    **{parameter.name: parameter.help for parameter in PARAMETERS},
    "image": "start from this image: of Pillow, or the content of a PNG, JPEG or WebP file; without height and width, the"
    " result has its size, rounded down to multiples of 8",
    "mask_image": "an image of the same size: where it is light, the image is repainted, where it is dark, it stays",
    "prompt_embeds": "embeddings in the place of the prompt: an array of numpy or a tensor of torch, tokens × text width",
    "negative_prompt_embeds": "the same for the negative prompt",
    **{parameter.name: parameter.help for parameter in (STRENGTH, *OWN_STEPS)},
    "loras": LORAS_HELP,
}

Method = TypeVar("Method", bound=Callable[..., Any])
Member = TypeVar("Member", bound=Enum)


def lists_options(options: type[GenerateOptions]) -> Callable[[Method], Method]:
    """For a method that takes these options as `**options`: `inspect.signature` and `help` name each of them."""

    def decorate(method: Method) -> Method:
        signature = inspect.signature(method)
        *own, _ = signature.parameters.values()
        named = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=_DEFAULTS[name], annotation=hint)
            for name, hint in get_type_hints(options).items()
        ]
        helps = "\n".join(f"    {name}: {text}" for name, text in _HELPS.items())
        described: Any = method
        described.__signature__ = signature.replace(parameters=[*own, *named])
        described.__doc__ = f"{inspect.getdoc(method) or ''}\n\nParameters of the request:\n{helps}"
        return method

    return decorate


def check_names(method: str, prompt: str | None, given: Mapping[str, object], options: type[GenerateOptions]) -> None:
    """Refuse what the method does not know, and a call without a prompt or embeddings, as Python does.

    Raises:
        TypeError: naming the argument.
    """
    for name in given:
        if name not in options.__annotations__:
            raise TypeError(f"{method}() got an unexpected keyword argument {name!r}")
    if prompt is None and given.get("prompt_embeds") is None:
        raise TypeError(f"{method}() missing 1 required positional argument: 'prompt'")


def build_request(prompt: str | None, options: Mapping[str, Any]) -> GenerationRequest:
    """The request that a prompt and these `StreamOptions` ask for.

    Raises:
        InvalidRequestError: naming the argument and the rule.
    """
    if isinstance(prompt, list | tuple):
        raise InvalidRequestError("prompt", "must be one text; make one call for each prompt", type(prompt).__name__)
    if prompt is None and options.get("prompt_embeds") is not None:
        prompt = ""
    if not isinstance(prompt, str):
        raise InvalidRequestError("prompt", "must be text", type(prompt).__name__)
    given = {**_DEFAULTS, **options}
    others = {name: given[name] for name in (*PARAMETER_NAMES, "strength", "loras") if name != "prompt"}
    others |= {name: _embeds_of(name, given[name]) for name in EMBEDS}
    others |= {one.name: _numbers(given[one.name]) for one in OWN_STEPS}
    image, mask_image = (_file_of(name, given[name]) for name in ("image", "mask_image"))
    return GenerationRequest(
        params=RequestedParams(prompt=prompt, image=image, mask_image=mask_image, **others),
        output=OutputOptions.checked(
            format=_member(ImageFormat, "output_format", given["output_format"]),
            quality=given["quality"],
            embed_metadata=given["embed_metadata"],
            preview_every=given["preview_every"],
        ),
        priority=Priority.NORMAL if given["priority"] is None else _member(Priority, "priority", given["priority"]),
    )


def _file_of(name: str, image: Image.Image | bytes | None) -> bytes | None:
    """An image of Pillow as a PNG file: its pixels as they are, which is how diffusers takes them."""
    if image is None or isinstance(image, bytes):
        return image
    if not isinstance(image, Image.Image):
        raise InvalidRequestError(name, "must be an image of Pillow, or the bytes of a file", type(image).__name__)
    file = io.BytesIO()
    try:
        image.save(file, "png", compress_level=1)
    except (OSError, ValueError, SyntaxError) as error:
        raise InvalidRequestError(name, f"cannot be written as PNG ({error})", image.mode) from None
    return file.getvalue()


def _embeds_of(name: str, given: Any) -> PromptEmbeds | None:
    """Anything with a shape and a dtype that becomes an array of numpy; neither numpy nor torch is imported for it."""
    if given is None or isinstance(given, PromptEmbeds):
        return given
    try:
        if hasattr(given, "detach"):
            given = given.detach().cpu()
            given = (given.float() if "bfloat16" in str(given.dtype) else given).numpy()
        shape = tuple(given.shape)
        num_tokens, width = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
        dtype = FP16 if str(given.dtype) == "float16" else FP32
        data = given.astype("<f2" if dtype == FP16 else "<f4").tobytes()
    except (AttributeError, TypeError, ValueError):
        rule = "must be an array of numpy or a tensor of torch, tokens × text width"
        raise InvalidRequestError(name, rule, str(getattr(given, "shape", type(given).__name__))[:80]) from None
    return PromptEmbeds(num_tokens=num_tokens, width=width, dtype=dtype, data=data)


def _numbers(values: Any) -> Any:
    """Numbers in a tuple, those of numpy and torch as Python's; anything else as it is, for the codec to refuse."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    return tuple(values) if isinstance(values, list | range) else values


def _member(members: type[Member], name: str, value: object) -> Member:
    try:
        return members(value)
    except ValueError:
        names = ", ".join(member.value for member in members)
        raise InvalidRequestError(name, f"must be one of {names}", repr(value)[:80]) from None


def check_timeout(timeout: float | None) -> float | None:
    """The seconds to give gRPC; a year stands for anything longer.

    Raises:
        InvalidRequestError: not a finite number above 0.
    """
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise InvalidRequestError("timeout", "must be a number of seconds or None", type(timeout).__name__)
    if not math.isfinite(timeout) or timeout <= 0:
        raise InvalidRequestError("timeout", "must be a finite number of seconds above 0 or None", str(timeout))
    return min(float(timeout), _LONGEST_TIMEOUT_S)


def check_bound(timeout: float) -> float:
    """`check_timeout` for a wait that must end.

    Raises:
        InvalidRequestError: not a finite number above 0.
    """
    bound = check_timeout(timeout)
    if bound is None:
        raise InvalidRequestError("timeout", "must be a finite number of seconds above 0", "None")
    return bound
