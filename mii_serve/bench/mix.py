"""What the load asks for: kinds of requests by weight, drawn as a pure function of a seed and the request's index.

A mix is written inline, `3: num_inference_steps=10; 1: num_inference_steps=50, guidance_scale=1`, or as a YAML file with
`kinds` (a list of objects with parameters, and optionally `weight` and `name`) and optionally `prompts` (a list of texts).
"""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mii_serve.bench.values import PARAMETER_TYPES, PlannedRequest
from mii_serve.errors import ConfigError
from mii_serve.types import RequestedParams

PROMPTS = (
    "a red circle on a blue background",
    "a yellow star on a black background",
    "a green square on a white background",
    "a blue triangle on a yellow background",
    "a white circle on a green background",
    "a black square on a red background",
)
DEFAULT_KIND = "default"

_PARAMETERS = {name: kind for name, kind in PARAMETER_TYPES.items() if name != "seed"}
"""What a mix may set; every request has a seed of its own."""
_KEYS = (*_PARAMETERS, "weight", "name")
_WORDS = {
    "num_inference_steps": "{num_inference_steps} steps",
    "width": "{width}x{height}",
    "guidance_scale": "guidance {guidance_scale:g}",
    "scheduler": "{scheduler}",
    "num_images_per_prompt": "{num_images_per_prompt} images",
}
"""How a kind without a name is called: `10 steps, 256x256`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of request; without a prompt of its own it takes one of the mix's."""

    name: str
    weight: float
    params: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    kinds: tuple[Kind, ...]
    prompts: tuple[str, ...] = PROMPTS

    def request(self, seed: str, index: int, *, preview_every: int | None = None) -> PlannedRequest:
        """The request with this index; the same for the same seed, whatever else is drawn."""
        rng = random.Random(f"{seed}/{index}")
        [kind] = rng.choices(self.kinds, [kind.weight for kind in self.kinds])
        params = {"prompt": rng.choice(self.prompts), **kind.params, "seed": rng.randrange(2**31)}
        return PlannedRequest(index=index, kind=kind.name, asked=RequestedParams(**params), preview_every=preview_every)

    def describe(self) -> list[dict[str, Any]]:
        return [{"name": kind.name, "weight": kind.weight, **kind.params} for kind in self.kinds]


def parse_mix(text: str | None) -> Mix:
    """Read a mix, inline or the YAML file of that name; None is one kind with the model's own defaults.

    Raises:
        ConfigError: naming the key and the rule.
    """
    if text is None:
        return Mix(kinds=(Kind(name=DEFAULT_KIND, weight=1.0, params={}),))
    if text.endswith((".yaml", ".yml")):
        return _read(Path(text))
    return Mix(kinds=_kinds([_inline(part) for part in text.split(";") if part.strip()]))


def check_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a request from a mix or a trace, with their types checked. The server checks the values.

    Raises:
        ConfigError: naming the key and the rule.
    """
    checked: dict[str, Any] = {}
    for key, value in params.items():
        if key not in _PARAMETERS:
            raise _unknown(key, tuple(_PARAMETERS))
        kind = _PARAMETERS[key]
        checked[key] = _text(key, value) if kind is str else _number(key, value, kind)
    if ("height" in checked) is not ("width" in checked):
        raise ConfigError("mix", "height and width go together")
    return checked


def _read(file: Path) -> Mix:
    import yaml

    try:
        loaded = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError("--mix", f"cannot read {file}: {error}") from None
    if not isinstance(loaded, dict) or not isinstance(loaded.get("kinds"), list):
        raise ConfigError("--mix", f"{file} must be an object with a list of kinds")
    if unknown := set(loaded) - {"kinds", "prompts"}:
        raise _unknown(sorted(unknown)[0], ("kinds", "prompts"))
    kinds = loaded["kinds"]
    if not all(isinstance(kind, dict) for kind in kinds):
        raise ConfigError("--mix", f"each of the kinds in {file} must be an object")
    prompts = loaded.get("prompts", list(PROMPTS))
    if not isinstance(prompts, list) or not prompts:
        raise ConfigError("mix.prompts", "must be a list of texts, one or more")
    return Mix(kinds=_kinds(kinds), prompts=tuple(_text("prompts", prompt) for prompt in prompts))


def _inline(part: str) -> dict[str, Any]:
    """Parse `WEIGHT: key=value, key=value`; `WEIGHT:` is optional."""
    weight, colon, rest = part.partition(":")
    kind: dict[str, Any] = {}
    if colon:
        kind["weight"] = weight.strip()
    for pair in (rest if colon else part).split(","):
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError("--mix", f"must be key=value, key=value; got {pair.strip()!r}")
        if key.strip() in kind:
            raise ConfigError(f"mix.{key.strip()}", "is there twice in one kind")
        kind[key.strip()] = value.strip()
    return kind


def _kinds(written: list[dict[str, Any]]) -> tuple[Kind, ...]:
    if not written:
        raise ConfigError("--mix", "must have at least one kind")
    kinds = []
    for one in written:
        for key in one:
            if key not in _KEYS:
                raise _unknown(str(key), _KEYS)
        weight = _number("weight", one.get("weight", 1.0), float)
        if weight <= 0:
            raise ConfigError("mix.weight", f"must be above 0, got {weight:g}")
        params = check_params({key: value for key, value in one.items() if key not in ("weight", "name")})
        kinds.append(Kind(name=_text("name", one["name"]) if "name" in one else _name_of(params), weight=weight, params=params))
    if len({kind.name for kind in kinds}) < len(kinds):
        raise ConfigError("mix.name", "must be different for each kind")
    return tuple(kinds)


def _name_of(params: Mapping[str, Any]) -> str:
    words = [words.format_map(params) for key, words in _WORDS.items() if key in params]
    others = [key for key in _PARAMETERS if key in params and key not in _WORDS and key != "height"]
    words += [f"{key} {params[key][:20]!r}" if _PARAMETERS[key] is str else f"{key} {params[key]}" for key in others]
    return ", ".join(words) or DEFAULT_KIND


def _number(key: str, value: object, kind: type) -> Any:
    rule = "must be a whole number" if kind is int else "must be a finite number"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ConfigError(f"mix.{key}", f"{rule}, got {value!r}")
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        raise ConfigError(f"mix.{key}", f"{rule}, got {value!r}") from None
    if not math.isfinite(number) or (isinstance(value, float) and number != value):
        raise ConfigError(f"mix.{key}", f"{rule}, got {value!r}")
    return number


def _text(key: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"mix.{key}", f"must be a text, got {value!r}")
    return value


def _unknown(key: str, known: tuple[str, ...]) -> ConfigError:
    near = difflib.get_close_matches(key, known, 1)
    return ConfigError(
        f"mix.{key}", f"no such key; did you mean {near[0]}?" if near else f"no such key; there are {', '.join(known)}"
    )
