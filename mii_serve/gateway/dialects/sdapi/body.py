"""The bodies of `txt2img` and `img2img`: which members are served, which change nothing here, and which must be neutral.

Clients send every member they know. One that would change the picture and is not served must have a value that changes
nothing; with any other value the request is refused, by the member's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field

from mii_serve.errors import InvalidRequestError
from mii_serve.gateway.dialects.sdapi.prompts import refuse_scheduled, without_loras
from mii_serve.gateway.json_body import JsonObject, WholeNumber, one_of, shown, validated

MAX_TASK_ID_CHARS = 200
MAX_BLUR_PX = 256
OVERRIDE = "override_settings"

NOT_KEPT = frozenset({"url", "auth"})
"""SillyTavern sends its own settings along, the password among them: they are not given back either."""

WITHOUT_EFFECT = NOT_KEPT | {
    *("save_images", "do_not_save_samples", "do_not_save_grid"),  # nothing is kept on this server
    *("override_settings_restore_afterwards", "subseed", "seed_enable_extras", "image_cfg_scale", "refiner_switch_at"),
    *("comments", "user", "script_args"),
}
OF_HIRES = frozenset({"hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y"})
NEUTRAL_IN_HIRES: Mapping[str, tuple[Any, ...]] = {
    "firstphase_width": (0,),
    "firstphase_height": (0,),
    "hr_checkpoint_name": ("", "Use same checkpoint"),
    "hr_sampler_name": ("", "Use same sampler"),
    "hr_scheduler": ("", "Use same scheduler"),
    "hr_prompt": ("",),
    "hr_negative_prompt": ("",),
    "hr_additional_modules": ([], ["Use same choices"]),
}
"""Members that mean something with `enable_hr` only; these and those of `OF_HIRES`."""
WITHOUT_HIRES = OF_HIRES | NEUTRAL_IN_HIRES.keys() | {"hr_cfg"}

DENOISING_STRENGTH = 0.75
"""Of a request that names none."""

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "restore_faces": (False,),
    "tiling": (False,),
    "disable_extra_networks": (False,),
    "styles": ([],),
    "subseed_strength": (0,),
    "seed_resize_from_h": (-1, 0),
    "seed_resize_from_w": (-1, 0),
    "s_min_uncond": (0,),
    "s_churn": (0,),
    "s_tmax": (0,),
    "s_tmin": (0,),
    "s_noise": (1,),
    "refiner_checkpoint": ("", "None"),
    "script_name": ("", "None"),
    "infotext": ("",),
    "extra_generation_params": ({},),
    "initial_noise_multiplier": (1,),
}
"""What members may be; the first is what leaving them out means. null is the same as left out."""

NEUTRAL_SETTINGS: Mapping[str, tuple[Any, ...]] = {
    "sd_vae": ("Automatic", "None", ""),
    "sd_hypernetwork": ("None", ""),
    "eta_noise_seed_delta": (0,),
    "ddim_discretize": ("uniform",),
    "img2img_fix_steps": (False,),
    "img2img_color_correction": (False,),
    "img2img_background_color": ("#ffffff",),
    "inpainting_mask_weight": (1,),
    "initial_noise_multiplier": (1,),
    "comma_padding_backtrack": (20,),
    "token_merging_ratio": (0,),
    "randn_source": ("CPU",),
    "return_grid": (False,),
    "forge_additional_modules": ([],),
}
"""The same for settings."""

SETTINGS_WITHOUT_EFFECT = frozenset({"samples_save", "grid_save", "save_images_add_number", "face_restoration_model"})

FORMATS = ("png", "jpg", "jpeg", "webp")

Flag = Annotated[bool, BeforeValidator(lambda value: bool(value) if value in (0, 1) else value)]
Switch = Annotated[int, BeforeValidator(lambda value: int(value) if isinstance(value, bool) else value), Field(ge=0, le=1)]


class _Object(JsonObject):
    @classmethod
    def prepared(cls, members: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in members.items() if value is not None}


class Settings(_Object):
    """What `override_settings` may say."""

    sd_model_checkpoint: str = ""
    samples_format: Annotated[str, one_of(FORMATS)] = "png"
    CLIP_stop_at_last_layers: Annotated[WholeNumber, Field(ge=0)] | None = None
    jpeg_quality: Annotated[WholeNumber, Field(ge=1, le=100)] | None = None
    live_previews_enable: Flag | None = None
    show_progress_every_n_steps: Annotated[WholeNumber, Field(ge=-1)] | None = None

    @property
    def preview_every(self) -> int | None:
        """Steps between previews; None where none were asked for."""
        every = max(0, self.show_progress_every_n_steps or 0)
        if self.live_previews_enable is False or not (self.live_previews_enable or every):
            return None
        return max(1, every)


class CommonBody(_Object):
    """The members that have an effect on `txt2img` and on `img2img`."""

    prompt: str = ""
    negative_prompt: str | None = None
    seed: WholeNumber = -1
    steps: WholeNumber | None = None
    cfg_scale: float | None = None
    width: WholeNumber | None = None
    height: WholeNumber | None = None
    batch_size: Annotated[WholeNumber, Field(ge=1)] = 1
    n_iter: Annotated[WholeNumber, Field(ge=1)] = 1
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str = ""
    eta: float | None = None
    denoising_strength: float | None = None
    clip_skip: Annotated[WholeNumber, Field(ge=0)] | None = None
    send_images: Flag = True
    force_task_id: Annotated[str, Field(max_length=MAX_TASK_ID_CHARS)] | None = None
    override_settings: dict[str, Any] = Field(default_factory=dict)
    alwayson_scripts: dict[str, Any] = Field(default_factory=dict)

    @property
    def num_images(self) -> int:
        return self.batch_size * self.n_iter


class TextBody(CommonBody):
    """The members of `txt2img` that have an effect; those after `enable_hr` with it only."""

    enable_hr: Flag = False
    hr_scale: float = 2.0
    hr_upscaler: str = "Latent"
    hr_second_pass_steps: WholeNumber = 0
    hr_resize_x: WholeNumber = 0
    hr_resize_y: WholeNumber = 0


class ImageBody(CommonBody):
    """The members of `img2img` that have an effect; those after `mask` with a mask only."""

    init_images: list[str] = Field(default_factory=list)
    resize_mode: WholeNumber = 0
    include_init_images: Flag = False
    mask: str | None = None
    mask_blur: Annotated[float, Field(ge=0, le=MAX_BLUR_PX)] = 4
    mask_blur_x: Annotated[float, Field(ge=0, le=MAX_BLUR_PX)] | None = None
    mask_blur_y: Annotated[float, Field(ge=0, le=MAX_BLUR_PX)] | None = None
    mask_round: Flag = True
    inpainting_mask_invert: Switch = 0
    inpainting_fill: WholeNumber = 0
    inpaint_full_res: Flag = False
    inpaint_full_res_padding: WholeNumber = 0


Body = TypeVar("Body", bound=CommonBody)


def text_body(value: object) -> TextBody:
    """What a body of `txt2img` asks for.

    Raises:
        InvalidRequestError: naming the member and the rule.
    """
    if isinstance(value, dict) and value.get("enable_hr"):
        served = _served(value, "body", {**NEUTRAL, **NEUTRAL_IN_HIRES}, WITHOUT_EFFECT)
    else:
        served = _served(value, "body", NEUTRAL, WITHOUT_EFFECT | WITHOUT_HIRES)
    return _checked(validated(TextBody, served))


def image_body(value: object) -> ImageBody:
    """What a body of `img2img` asks for.

    Raises:
        InvalidRequestError: naming the member and the rule.
    """
    neutral = {**NEUTRAL, "enable_hr": (False,)}
    body = _checked(validated(ImageBody, _served(value, "body", neutral, WITHOUT_EFFECT | WITHOUT_HIRES)))
    if len(body.init_images) != 1:
        raise InvalidRequestError("init_images", "must have one image", str(len(body.init_images)))
    if body.resize_mode not in (0, 1):
        raise InvalidRequestError("resize_mode", "must be 0 (resize) or 1 (crop and resize)", shown(body.resize_mode))
    if body.mask is None:
        return body
    if body.inpaint_full_res:
        rule = "must be false: the whole picture is repainted around the mask, not a part of it at a larger size"
        raise InvalidRequestError("inpaint_full_res", rule, "true")
    if body.inpainting_fill not in (0, 1):
        raise InvalidRequestError("inpainting_fill", "must be 0 (fill) or 1 (original)", shown(body.inpainting_fill))
    if not body.mask_round:
        raise InvalidRequestError("mask_round", "must be true: a part of the picture is repainted or stays", "false")
    return body


def settings_of(body: CommonBody) -> Settings:
    """What the body's `override_settings` say.

    Raises:
        InvalidRequestError: naming the setting and the rule.
    """
    served = _served(body.override_settings, OVERRIDE, NEUTRAL_SETTINGS, SETTINGS_WITHOUT_EFFECT)
    try:
        return validated(Settings, served)
    except InvalidRequestError as error:
        raise InvalidRequestError(f"{OVERRIDE}.{error.field}", str(error).removeprefix(f"{error.field}: ")) from None


def num_skipped_layers(body: CommonBody, settings: Settings) -> int | None:
    """Layers of the text encoder to skip; there, 1 is none, and the setting counts before the member (SD.Next's)."""
    given = body.clip_skip if settings.CLIP_stop_at_last_layers is None else settings.CLIP_stop_at_last_layers
    return None if given is None or given <= 1 else given - 1


def _served(
    value: object, whole: str, neutral: Mapping[str, tuple[Any, ...]], without_effect: frozenset[str]
) -> dict[str, Any]:
    """The members that have an effect; those that must be neutral are."""
    if not isinstance(value, dict):
        raise InvalidRequestError(whole, "must be a JSON object", shown(value))
    served = {}
    for name, given in value.items():
        if name in without_effect or given is None:
            continue
        if name not in neutral:
            served[name] = given
        elif not any(_is_same(given, one) for one in neutral[name]):
            path = name if whole == "body" else f"{whole}.{name}"
            allowed = " or ".join(shown(one) if not isinstance(one, list | dict) else "empty" for one in neutral[name])
            raise InvalidRequestError(path, f"is not served here: it must be {allowed} or left out", shown(given))
    return served


def _is_same(given: Any, neutral: Any) -> bool:
    """Numbers by value; true and false are 1 and 0 to many clients."""
    if isinstance(neutral, str | list | dict):
        return type(given) is type(neutral) and bool(given == neutral)
    return isinstance(given, int | float) and bool(given == neutral)


def _checked(body: Body) -> Body:
    """The rules between members."""
    for name in ("prompt", "negative_prompt"):
        text = getattr(body, name) or ""
        refuse_scheduled(text, name)
        _, loras = without_loras(text, name)
        if loras and name == "negative_prompt":
            raise InvalidRequestError(name, "must not name a LoRA: that is for the prompt", repr(next(iter(loras))[:60]))
    for name, script in body.alwayson_scripts.items():
        given = script.get("args") if isinstance(script, dict) else script
        if given and not (isinstance(given, list) and given[0] is False):
            raise InvalidRequestError(f"alwayson_scripts.{name[:60]}", "is not served here: there are no scripts")
    return body
