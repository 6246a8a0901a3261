"""The LoRAs of a request: which names and scales may be asked for, and which samples can share a UNet call with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mii_serve.errors import InvalidRequestError

MAX_LORAS = 8
"""Of one request."""
MAX_LORA_SCALE = 10.0
"""A scale is in [-MAX_LORA_SCALE, MAX_LORA_SCALE]; 1 is the LoRA as it was trained."""
MAX_SHARED_LORA_RANK = 64
"""Of a combination whose samples share UNet calls with others; with more they share calls with each other only."""
MAX_LORA_NAME_CHARS = 64
LORA_NAME = rf"^\w[\w.-]{{0,{MAX_LORA_NAME_CHARS - 1}}}$"
LORAS_HELP = "names of the server's LoRAs, each with its scale; none by default"
MAX_SHOWN_NAMES = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraInfo:
    """A LoRA that requests can name. `revision` is the fingerprint of its files.

    `shares_calls`: samples with it can be in one UNet call with samples that have other LoRAs or none; `note` says why not.
    """

    name: str
    revision: str
    rank: int
    shares_calls: bool = True
    note: str = ""


LoraParts = tuple[tuple[str, float], ...]
"""Revisions and scales, sorted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraChoice:
    """What the LoRAs of a request come to. Equal choices make equal changes to the model.

    `parts` leaves out LoRAs with a scale of 0, which change nothing.
    """

    parts: LoraParts = ()
    shares_calls: bool = True

    def __bool__(self) -> bool:
        return bool(self.parts)


NO_LORAS = LoraChoice()


def checked_loras(asked: Any) -> dict[str, float]:
    """Names with their scales, in the order of the names.

    Raises:
        InvalidRequestError: it is something else, too many, or a scale is out of range.
    """
    if not isinstance(asked, Mapping):
        raise InvalidRequestError("loras", "must be names of LoRAs with their scales", type(asked).__name__)
    if len(asked) > MAX_LORAS:
        raise InvalidRequestError("loras", f"must be at most {MAX_LORAS}", str(len(asked)))
    for name, scale in asked.items():
        if not isinstance(name, str):
            raise InvalidRequestError("loras", "must be names of LoRAs with their scales", repr(name)[:80])
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= MAX_LORA_SCALE:
            rule = f"must be a finite number in [{-MAX_LORA_SCALE:g}, {MAX_LORA_SCALE:g}]"
            raise InvalidRequestError(f"loras.{name[:MAX_LORA_NAME_CHARS]}", rule, repr(scale)[:80])
    return {name: float(asked[name]) for name in sorted(asked)}


def parsed_loras(text: str) -> dict[str, float]:
    """Of NAME[:SCALE], separated by commas; a scale that is left out is 1.

    Raises:
        InvalidRequestError: a scale is no number, or a name is there twice.
    """
    found: dict[str, float] = {}
    for one in text.split(","):
        name, _, scale = one.strip().partition(":")
        if not name or name in found:
            raise InvalidRequestError("loras", "must be NAME or NAME:SCALE, each name once", repr(text)[:80])
        try:
            found[name] = float(scale) if scale else 1.0
        except ValueError:
            raise InvalidRequestError(f"loras.{name[:MAX_LORA_NAME_CHARS]}", "must be a number", repr(scale)[:80]) from None
    return found


def chosen_loras(asked: Mapping[str, float], known: Mapping[str, LoraInfo]) -> LoraChoice:
    """What these names and scales come to on a server that has the `known` LoRAs.

    Raises:
        InvalidRequestError: a name is not among them.
    """
    for name in asked:
        if name not in known:
            raise InvalidRequestError("loras", f"must be names of {_listed(known)}", repr(name[:MAX_LORA_NAME_CHARS]))
    used = [known[name] for name, scale in asked.items() if scale]
    rank = sum(info.rank for info in used)
    return LoraChoice(
        parts=tuple(sorted((info.revision, asked[info.name]) for info in used)),
        shares_calls=all(info.shares_calls for info in used) and rank <= MAX_SHARED_LORA_RANK,
    )


def _listed(known: Mapping[str, LoraInfo]) -> str:
    if not known:
        return "LoRAs of this server, and it has none"
    names = sorted(known)
    return f"the {len(names)} LoRAs of this server: {', '.join(names[:MAX_SHOWN_NAMES])}" + ", …" * (
        len(names) > MAX_SHOWN_NAMES
    )
