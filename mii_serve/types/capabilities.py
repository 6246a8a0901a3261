"""What a deployed model accepts and assumes: where a request is checked and its gaps are filled."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mii_serve.errors import InvalidRequestError
from mii_serve.types.declarations import OWN_STEPS, PARAMETERS, STRENGTH
from mii_serve.types.embeddings import EMBEDS
from mii_serve.types.limits import IMAGE_STRENGTH, MASK_STRENGTH, MAX_SCHEDULER_CHARS, GenerationDefaults, Limits, ModelParts
from mii_serve.types.loras import LoraInfo, checked_loras, chosen_loras
from mii_serve.types.params import GenerationParams, RequestedParams, num_steps_left
from mii_serve.types.prompt_syntax import A1111, PLAIN, parse_a1111


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a deployed model accepts and assumes. `schedulers` maps every accepted name to the name we answer with.

    `needs_mask`: it is an inpainting model, which can only repaint a part of an image. Requests can name the `loras`.
    """

    limits: Limits
    defaults: GenerationDefaults
    schedulers: Mapping[str, str]
    parts: ModelParts = field(default_factory=ModelParts)
    needs_mask: bool = False
    loras: Mapping[str, LoraInfo] = field(default_factory=dict)

    def resolve(self, asked: RequestedParams, *, fallback_seed: int) -> GenerationParams:
        """Fill in the defaults and check every rule.

        Raises:
            InvalidRequestError: naming the field and the rule it breaks.
        """
        values: dict[str, Any] = self._own_steps(asked)
        own_number = None
        if values:
            own_number = len(values["timesteps"]) if "timesteps" in values else len(values["sigmas"]) - 1
        embeds = self._embeds(asked)
        for parameter in PARAMETERS:
            value = getattr(asked, parameter.name)
            if parameter.name == "prompt" and "prompt_embeds" in embeds:
                values["prompt"] = ""
                continue
            if value is None:
                value = fallback_seed if parameter.name == "seed" else parameter.default_in(self.defaults)
            if parameter.name == "num_inference_steps" and own_number is not None:
                value = own_number
            if parameter.name == "prompt" and value == "" and asked.image is not None:  # the image says enough
                values["prompt"] = ""
                continue
            if value is not None or not parameter.is_optional:
                values[parameter.name] = parameter.checked(value, self)
        if values["prompt_syntax"] == A1111:
            for name in ("prompt", "negative_prompt"):
                parse_a1111(name, values[name])
        loras = checked_loras(asked.loras or {})
        params = GenerationParams(
            **values,
            **embeds,
            strength=self._strength_of(asked, values["num_inference_steps"]),
            has_mask=asked.mask_image is not None,
            embeds_guidance=self.parts.embeds_guidance,
            loras=loras,
            lora_choice=chosen_loras(loras, self.loras),
        )
        self._check_lengths(params)
        return params

    def with_mask_if_needed(self, asked: RequestedParams) -> RequestedParams:
        """A request of the server's own, to resolve only, with the images that this model cannot do without."""
        return replace(asked, image=b"image", mask_image=b"mask") if self.needs_mask else asked

    def _embeds(self, asked: RequestedParams) -> dict[str, Any]:
        """The request's embeddings, by the rules of diffusers' `check_inputs`."""
        given: dict[str, Any] = {}
        for name in EMBEDS:
            if (embeds := getattr(asked, name)) is None:
                continue
            given[name] = embeds.checked(name, self.parts)
            if getattr(asked, text := name.removesuffix("_embeds")):
                raise InvalidRequestError(text, f"must be left out with {name}")
            if asked.prompt_syntax not in (None, PLAIN):
                raise InvalidRequestError("prompt_syntax", f"cannot go with {name}: no text is read", repr(asked.prompt_syntax))
        if "prompt_embeds" in given and asked.clip_skip is not None:
            raise InvalidRequestError("clip_skip", "cannot go with prompt_embeds: no text is read", str(asked.clip_skip)[:80])
        return given

    def _check_lengths(self, params: GenerationParams) -> None:
        if not params.is_guided:
            return
        num_tokens, negative = (
            self.parts.num_text_tokens if embeds is None else embeds.num_tokens
            for embeds in (params.prompt_embeds, params.negative_prompt_embeds)
        )
        if num_tokens != negative:
            rule = f"must have as many tokens as the prompt, {num_tokens}, where there is guidance"
            raise InvalidRequestError("negative_prompt_embeds", rule, str(negative))

    def _own_steps(self, asked: RequestedParams) -> dict[str, Any]:
        """The request's own timesteps or sigmas, where it has some."""
        given = {one.name: one.checked(value, self) for one in OWN_STEPS if (value := getattr(asked, one.name)) is not None}
        if len(given) > 1:
            raise InvalidRequestError("sigmas", "cannot go with timesteps: either says what the steps are")
        for name, steps in given.items():
            number = len(steps) - (name == "sigmas")
            if asked.num_inference_steps not in (None, number):
                rule = f"must be left out, or {number}, with these {name}"
                raise InvalidRequestError("num_inference_steps", rule, str(asked.num_inference_steps)[:80])
        return given

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
