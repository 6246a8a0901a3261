"""What a prompt of that API says beside its text: `<lora:NAME:SCALE>`."""

from __future__ import annotations

import math
import re

from mii_serve.errors import InvalidRequestError

_NETWORK = re.compile(r"<(lora|lyco|hypernet):([^<>]{1,300})>", re.IGNORECASE)


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
