"""The declaration of each parameter of a request: its name, type, rule, default and help.

Validation, command-line flags, the codec, the names in JSON bodies and the benchmark's mixes follow from `PARAMETERS`;
`STRENGTH` is that of requests that start from an image, and `OWN_STEPS` are lists, which not every protocol has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mii_serve.errors import InvalidRequestError
from mii_serve.types.limits import IMAGE_STRENGTH, LATENT_SCALE, MAX_SEED, MAX_SIGMA, GenerationDefaults, Limits
from mii_serve.types.prompt_syntax import PLAIN, PROMPT_SYNTAXES

if TYPE_CHECKING:
    from mii_serve.types.capabilities import Capabilities


def _text(name: str, value: str, capabilities: Capabilities) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(name, "must be valid Unicode text without lone surrogates") from None
    return value


def _prompt(name: str, value: str, capabilities: Capabilities) -> str:
    if not value.strip():
        raise InvalidRequestError(name, "must not be empty")
    return _text(name, value, capabilities)


def _scheduler(name: str, value: str, capabilities: Capabilities) -> str:
    return capabilities.scheduler_named(value)


def _syntax(name: str, value: str, capabilities: Capabilities) -> str:
    if value not in PROMPT_SYNTAXES:
        raise InvalidRequestError(name, f"must be one of {', '.join(PROMPT_SYNTAXES)}", repr(value[:40]))
    return value


def _clip_skip(name: str, value: int, capabilities: Capabilities) -> int:
    num_layers = capabilities.parts.num_text_layers
    if not 1 <= value < num_layers:
        rule = f"must be in [1, {num_layers - 1}]: the model's text encoder has {num_layers} layers"
        raise InvalidRequestError(name, rule, str(value)[:80])
    return value


def _timestep(name: str, value: int, capabilities: Capabilities) -> int:
    most = capabilities.parts.num_train_timesteps - 1
    if not 0 <= value <= most:
        raise InvalidRequestError(name, f"must each be in [0, {most}]", str(value)[:80])
    return value


def shown_list(values: Sequence[object]) -> str:
    """A list in the text of an error, which has a bound."""
    shown = ", ".join(str(value)[:20] for value in values[:8])
    return f"[{shown}{', ...' if len(values) > 8 else ''}]"


def _num_chars(limits: Limits) -> tuple[int, int]:
    return 0, limits.max_prompt_chars


def _size_px(limits: Limits) -> tuple[int, int]:
    return limits.min_size_px, limits.max_size_px


def of_kind(name: str, value: Any, kind: type) -> Any:
    """The value, if it is of this kind; a whole number is a number, too.

    Raises:
        InvalidRequestError: it is of another kind.
    """
    kinds: tuple[type, ...] = (int, float) if kind is float else (kind,)
    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, kinds):
        shown = type(value).__name__ if kind is str else repr(value)[:80]
        raise InvalidRequestError(name, f"must be {_KIND_NAMES[kind]}", shown)
    return value


_KIND_NAMES = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """The declaration of one parameter.

    `kind` is the Python type of its value: str, int or float. `bounds` gives the least and the most that a number may be, or
    the characters that a text may have; a number is also a `multiple_of`, where that is set. `check` is a further rule: it
    takes the name, a value within the bounds and the model's capabilities and returns the value, or raises
    `InvalidRequestError`. The default is the field of the same name in `GenerationDefaults` where there is one, else `default`;
    one that `is_optional` may stay left out. `help` is for command lines, forms and documentation.

    With `lengths`, the least and the most, the value is a list, and all else is of each of its numbers.
    """

    name: str
    kind: type[str] | type[int] | type[float]
    help: str
    bounds: Callable[[Limits], tuple[float, float]] | None = None
    multiple_of: int | None = None
    check: Callable[[str, Any, Capabilities], Any] | None = None
    default: Any = None
    is_optional: bool = False
    lengths: Callable[[Limits], tuple[int, int]] | None = None

    def checked(self, value: Any, capabilities: Capabilities) -> Any:
        """The value, of the parameter's kind and within its rules.

        Raises:
            InvalidRequestError: naming the parameter and the rule it breaks.
        """
        if self.lengths is None:
            return self._checked_one(value, capabilities)
        if not isinstance(value, list | tuple):
            raise InvalidRequestError(self.name, "must be a list of numbers", type(value).__name__)
        least, most = self.lengths(capabilities.limits)
        if not least <= len(value) <= most:
            raise InvalidRequestError(self.name, f"must have {least} to {most} numbers", str(len(value)))
        return tuple(self._checked_one(one, capabilities) for one in value)

    def _checked_one(self, value: Any, capabilities: Capabilities) -> Any:
        value = self.of_kind(value)
        if self.bounds is not None:
            value = self._within(value, *self.bounds(capabilities.limits))
        return value if self.check is None else self.check(self.name, value, capabilities)

    def _within(self, value: Any, least: float, most: float) -> Any:
        if self.kind is str:
            if not least <= len(value) <= most:
                raise InvalidRequestError(self.name, f"must be at most {most} characters", str(len(value)))
            return value
        if not least <= value <= most or (self.multiple_of is not None and value % self.multiple_of):
            number = "a finite number " if self.kind is float else ""
            number = f"a multiple of {self.multiple_of} " if self.multiple_of is not None else number
            bound = "2**64 - 1" if most == MAX_SEED else f"{most:g}" if self.kind is float else str(most)
            raise InvalidRequestError(self.name, f"must be {number}in [{least}, {bound}]", str(value)[:80])
        return self.kind(value)

    def default_in(self, defaults: GenerationDefaults) -> Any:
        """What a request that leaves the parameter out gets from this model."""
        return getattr(defaults, self.name, self.default)

    def of_kind(self, value: Any) -> Any:
        """The value, if it is of the parameter's kind; a whole number is a number, too.

        Raises:
            InvalidRequestError: it is of another kind.
        """
        return of_kind(self.name, value, self.kind)


PARAMETERS = (
    Parameter(name="prompt", kind=str, bounds=_num_chars, check=_prompt, help="what the image should show"),
    Parameter(
        name="negative_prompt", kind=str, bounds=_num_chars, check=_text, default="", help="what the image should not show"
    ),
    Parameter(
        name="height",
        kind=int,
        bounds=_size_px,
        multiple_of=LATENT_SCALE,
        help=f"height in pixels, a multiple of {LATENT_SCALE}",
    ),
    Parameter(
        name="width",
        kind=int,
        bounds=_size_px,
        multiple_of=LATENT_SCALE,
        help=f"width in pixels, a multiple of {LATENT_SCALE}",
    ),
    Parameter(
        name="num_inference_steps",
        kind=int,
        bounds=lambda limits: (1, limits.max_num_inference_steps),
        help="denoising steps",
    ),
    Parameter(
        name="guidance_scale",
        kind=float,
        bounds=lambda limits: (0, limits.max_guidance_scale),
        help="how closely the image follows the prompt; above 1, classifier-free guidance is on",
    ),
    Parameter(
        name="guidance_rescale",
        kind=float,
        bounds=lambda limits: (0, 1),
        default=0.0,
        help="how far guidance keeps the contrast of the prediction without it; 0.7 is usual for v-prediction models",
    ),
    Parameter(
        name="num_images_per_prompt",
        kind=int,
        bounds=lambda limits: (1, limits.max_images_per_prompt),
        default=1,
        help="number of images",
    ),
    Parameter(name="scheduler", kind=str, check=_scheduler, help="the sampler's name; the model's own scheduler by default"),
    Parameter(
        name="seed",
        kind=int,
        bounds=lambda limits: (0, MAX_SEED),
        help="image i is made from seed + i; drawn at random by default",
    ),
    Parameter(
        name="clip_skip",
        kind=int,
        check=_clip_skip,
        is_optional=True,
        help="layers of the text encoder to skip at its end, for the prompt; none by default",
    ),
    Parameter(
        name="eta",
        kind=float,
        bounds=lambda limits: (0, 1),
        default=0.0,
        help="how much noise ddim and tcd add in each step; other schedulers take none",
    ),
    Parameter(
        name="prompt_syntax",
        kind=str,
        check=_syntax,
        default=PLAIN,
        help="how prompts are read: plain, or a1111, with weights such as (word:1.2), BREAK, and prompts of any length",
    ),
)
PARAMETER_NAMES = tuple(parameter.name for parameter in PARAMETERS)

STRENGTH = Parameter(
    name="strength",
    kind=float,
    bounds=lambda limits: (0, 1),
    default=IMAGE_STRENGTH,
    help="how far the result may leave the image: the part of the steps that is made; 0.8 by default, with a mask 1",
)

OWN_STEPS = (
    Parameter(
        name="timesteps",
        kind=int,
        check=_timestep,
        is_optional=True,
        lengths=lambda limits: (1, limits.max_num_inference_steps),
        help="the timesteps of the steps, instead of num_inference_steps, for schedulers whose set_timesteps takes them",
    ),
    Parameter(
        name="sigmas",
        kind=float,
        bounds=lambda limits: (0, MAX_SIGMA),
        is_optional=True,
        lengths=lambda limits: (2, limits.max_num_inference_steps + 1),
        help="the noise levels before each step and after the last one, instead of num_inference_steps, for euler",
    ),
)
"""At most one of them; a request with one has as many steps as it says."""
