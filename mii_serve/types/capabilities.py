"""What a deployed model accepts and assumes: where a request is checked and its gaps are filled."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mii_serve.errors import InvalidRequestError
from mii_serve.types.declarations import PARAMETERS, STRENGTH
from mii_serve.types.limits import IMAGE_STRENGTH, MASK_STRENGTH, MAX_SCHEDULER_CHARS, GenerationDefaults, Limits
from mii_serve.types.loras import LoraInfo, checked_loras, chosen_loras
from mii_serve.types.params import GenerationParams, RequestedParams, num_steps_left


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a deployed model accepts and assumes. `schedulers` maps every accepted name to the name we answer with.

    `needs_mask`: it is an inpainting model, which can only repaint a part of an image. Requests can name the `loras`.
    """

    limits: Limits
    defaults: GenerationDefaults
    schedulers: Mapping[str, str]
    needs_mask: bool = False
    loras: Mapping[str, LoraInfo] = field(default_factory=dict)

    def resolve(self, asked: RequestedParams, *, fallback_seed: int) -> GenerationParams:
        """Fill in the defaults and check every rule.

        Raises:
            InvalidRequestError: naming the field and the rule it breaks.
        """
        values: dict[str, Any] = {}
        for parameter in PARAMETERS:
            value = getattr(asked, parameter.name)
            if value is None:
                value = fallback_seed if parameter.name == "seed" else parameter.default_in(self.defaults)
            if parameter.name == "prompt" and value == "" and asked.image is not None:  # the image says enough
                values["prompt"] = ""
                continue
            values[parameter.name] = parameter.checked(value, self)
        strength = self._strength_of(asked, values["num_inference_steps"])
        loras = checked_loras(asked.loras or {})
        choice = chosen_loras(loras, self.loras)
        has_mask = asked.mask_image is not None
        return GenerationParams(**values, strength=strength, has_mask=has_mask, loras=loras, lora_choice=choice)

    def with_mask_if_needed(self, asked: RequestedParams) -> RequestedParams:
        """A request of the server's own, to resolve only, with the images that this model cannot do without."""
        return replace(asked, image=b"image", mask_image=b"mask") if self.needs_mask else asked

    def _strength_of(self, asked: RequestedParams, num_inference_steps: int) -> float | None:
        for name in ("image", "mask_image") if self.needs_mask else ():
            if getattr(asked, name) is None:
                raise InvalidRequestError(name, "is missing: this model repaints the part of an image that a mask covers")
        if asked.image is None:
            if asked.mask_image is not None:
                raise InvalidRequestError("mask_image", "is for requests with an image only")
            if asked.strength is not None:
                raise InvalidRequestError("strength", "is for requests with an image only", str(asked.strength)[:80])
            return None
        usual = IMAGE_STRENGTH if asked.mask_image is None else MASK_STRENGTH
        strength: float = STRENGTH.checked(usual if asked.strength is None else asked.strength, self)
        if num_steps_left(num_inference_steps, strength) < 1:
            least = f"1 / num_inference_steps, here {1 / num_inference_steps:.3g}: no step would be made"
            raise InvalidRequestError("strength", f"must be at least {least}", str(strength))
        return strength

    def scheduler_named(self, name: str) -> str:
        """The name that is answered with for one of the accepted spellings.

        Raises:
            InvalidRequestError: the model has no scheduler of this name.
        """
        name = name[:MAX_SCHEDULER_CHARS]
        for spelling in (name, name.lower(), name.lower().replace(" ", "_").replace("-", "_")):
            if (known := self.schedulers.get(spelling)) is not None:
                return known
        names = sorted(set(self.schedulers.values()), key=lambda known: (known[0].isupper(), known))
        near = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[:5]
        rule = f"must be one of the {len(names)} this model has, such as {', '.join(near)}"
        raise InvalidRequestError("scheduler", rule, repr(name))
