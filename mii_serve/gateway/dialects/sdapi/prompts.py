"""What a prompt of that API says beside its text: `<lora:NAME:SCALE>`, and what is refused because it is another kind of
prompt: parts that come or go at a step (`[a:b:0.5]`), that alternate (`[a|b]`), and several prompts in one (`AND`).
"""

from __future__ import annotations

import math
import re

from mii_serve.errors import InvalidRequestError

_NETWORK = re.compile(r"<(lora|lyco|hypernet):([^<>]{1,300})>", re.IGNORECASE)


_SQUARE = re.compile(r"(?<!\\)\[([^\[\]]*)\]")
_NUMBER = re.compile(r"\s*[.\d]+\s*", re.ASCII)
_AND = re.compile(r"\bAND\b")


def refuse_scheduled(prompt: str, field: str) -> None:
    """Raises:
    InvalidRequestError: the prompt is not one text for all steps.
    """
    for inside in _SQUARE.findall(prompt):
        _, colon, last = inside.rpartition(":")
        if "|" in inside or (colon and _NUMBER.fullmatch(last)):
            rule = "must be the same in all steps: [from:to:when] and [a|b] are not served"
            raise InvalidRequestError(field, rule, repr(f"[{inside[:60]}]"))
    if _AND.search(prompt):
        raise InvalidRequestError(field, "must be one prompt: several, joined by AND, are not served")


def without_loras(prompt: str, field: str) -> tuple[str, dict[str, float]]:
    """The text without its LoRAs, and their scales by name.

    Raises:
        InvalidRequestError: a LoRA is named twice, or its scale is no number; or the text names another kind of network.
    """
    loras: dict[str, float] = {}
    for kind, rest in _NETWORK.findall(prompt):
        name, *scales = (part.strip() for part in rest.split(":"))
        if kind.lower() == "hypernet":
            raise InvalidRequestError(field, "must not name a hypernetwork: there are none here", repr(name[:60]))
        if not name or name in loras:
            raise InvalidRequestError(field, "must name each LoRA once", repr(name[:60]))
        loras[name] = _scale(scales, field, name)
    return _NETWORK.sub("", prompt), loras


def _scale(texts: list[str], field: str, name: str) -> float:
    """There, the text encoder's scale comes first and the UNet's second; here they are one."""
    if not texts:
        return 1.0
    try:
        [scale] = {float(text) for text in texts}
    except ValueError:  # none of them, or not all the same
        raise InvalidRequestError(field, f"must give the LoRA {name[:60]!r} one scale, a number") from None
    if not math.isfinite(scale):
        raise InvalidRequestError(field, f"must give the LoRA {name[:60]!r} a finite scale")
    return scale
