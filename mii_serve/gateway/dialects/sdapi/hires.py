"""Hires fix, `enable_hr`: the image is drawn, made larger, and drawn again in part. The second is a request of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mii_serve.errors import InvalidRequestError
from mii_serve.gateway.dialects.sdapi.body import DENOISING_STRENGTH, TextBody
from mii_serve.gateway.json_body import shown
from mii_serve.types import Capabilities, GenerationParams, GenerationRequest, ImageReady, OutputOptions, RequestedParams

UPSCALERS = ("Lanczos", "None")
"""Both are Lanczos there, as every resizing is here."""
MAX_SCALE = 16.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hires:
    """The second request: its size, its `num_inference_steps` and its strength."""

    width: int
    height: int
    num_inference_steps: int
    strength: float
    upscaler: str

    def asked(self, first: RequestedParams, image: bytes, seed: int) -> RequestedParams:
        """The parameters that draw this image of the first request again."""
        return replace(
            first,
            image=image,
            seed=seed,
            num_images_per_prompt=1,
            width=self.width,
            height=self.height,
            num_inference_steps=self.num_inference_steps,
            strength=self.strength,
        )

    def request(self, first: RequestedParams, image: ImageReady, output: OutputOptions) -> GenerationRequest:
        return GenerationRequest(params=self.asked(first, image.encoded, image.seed), output=output)

    def facts(self) -> dict[str, Any]:
        """What texts about the image say of it, by that API's names."""
        return {
            "Hires resize": f"{self.width}x{self.height}",
            "Hires steps": self.num_inference_steps,
            "Hires upscaler": self.upscaler,
        }


def hires_of(body: TextBody, asked: RequestedParams, params: GenerationParams, capabilities: Capabilities) -> Hires | None:
    """The second request that the body asks for; None where it does not.

    Raises:
        InvalidRequestError: naming the member and the rule.
    """
    if not body.enable_hr:
        return None
    if body.hr_upscaler not in UPSCALERS:
        rule = f"must be {' or '.join(UPSCALERS)}: the image is made larger, not its latents, and by no other model"
        raise InvalidRequestError("hr_upscaler", rule, shown(body.hr_upscaler))
    if not 1 <= body.hr_scale <= MAX_SCALE:
        raise InvalidRequestError("hr_scale", f"must be in [1, {MAX_SCALE:g}]", shown(body.hr_scale))
    for name in ("hr_resize_x", "hr_resize_y", "hr_second_pass_steps"):
        if getattr(body, name) < 0:
            raise InvalidRequestError(name, "must not be negative", shown(getattr(body, name)))
    width, height = _size(body, params)
    hires = Hires(
        width=width,
        height=height,
        num_inference_steps=body.hr_second_pass_steps or params.num_inference_steps,
        strength=DENOISING_STRENGTH if body.denoising_strength is None else body.denoising_strength,
        upscaler=body.hr_upscaler,
    )
    try:
        capabilities.resolve(hires.asked(asked, b"", params.seed), fallback_seed=0)
    except InvalidRequestError as error:
        sides = [name for name in ("hr_resize_x", "hr_resize_y") if getattr(body, name)] or ["hr_scale"]
        names = {
            "width": sides[0],
            "height": sides[-1],
            "num_inference_steps": "hr_second_pass_steps",
            "strength": "denoising_strength",
        }
        raise InvalidRequestError(names.get(error.field, error.field), str(error).removeprefix(f"{error.field}: ")) from None
    return hires


def _size(body: TextBody, params: GenerationParams) -> tuple[int, int]:
    """Of the result: the sides that are named, or `hr_scale` times those of the first; one alone keeps the proportions."""
    across, down = body.hr_resize_x, body.hr_resize_y
    if not across and not down:
        return int(params.width * body.hr_scale), int(params.height * body.hr_scale)
    if across and down and across * params.height != down * params.width:
        rule = "must have the proportions of width and height, together with hr_resize_x"
        raise InvalidRequestError("hr_resize_y", rule, shown(down))
    return across or down * params.width // params.height, down or across * params.height // params.width
