"""Which member a caller probably meant who wrote a name that is not known, because it is misspelt or another server's.

The same for every dialect: an unknown name is refused with this hint, and never read as the other.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

CLOSE = 0.75
"""How alike two names are, of 1, for one to be taken for the other misspelt."""
_LONGEST_NAME = 60

_SYNONYMS = {
    "num_inference_steps": "steps n_steps num_steps sampling_steps inference_steps sample_steps ddim_steps denoising_steps"
    " num_inference_step num_diffusion_steps iterations",
    "guidance_scale": "cfg_scale cfg guidance scale cfg_strength guidance_strength classifier_free_guidance_scale",
    "scheduler": "sampler sampler_name sampler_index sampling_method sample_method scheduler_name scheduler_type",
    "seed": "random_seed noise_seed manual_seed generator seeds",
    "negative_prompt": "negative neg_prompt negative_text exclude uc negative_prompts",
    "prompt inputs": "text input inputs prompt prompts text_prompts description",
    "num_images_per_prompt n": "n num_images num_outputs n_samples num_samples samples batch_size n_iter num_generations"
    " number_of_images image_count count num_images_per_prompt",
    "width size": "width w image_width",
    "height size": "height h image_height",
    "size": "resolution dimensions image_size aspect_ratio target_size",
    "output_format": "format image_format file_format output_type mime_type",
    "output_compression": "compression jpeg_quality output_quality",
    "parameters": "params",
    "inputs": "input_data",
}


def _plain(name: str) -> str:
    """The name without its spelling: `cfgScale`, `cfg-scale` and `CFG_SCALE` are one."""
    return re.sub(r"[^a-z0-9]", "", name[:_LONGEST_NAME].casefold())


_MEANT: dict[str, list[str]] = {}
for _ours, _theirs in _SYNONYMS.items():
    for _name in _theirs.split():
        _MEANT.setdefault(_plain(_name), []).extend(_ours.split())


def meant(name: str, known: Collection[str]) -> str | None:
    """The known name that an unknown one probably stands for."""
    plain = _plain(name)
    same = [one for one in known if _plain(one) == plain] or [one for one in _MEANT.get(plain, ()) if one in known]
    close: list[str] = difflib.get_close_matches(name[:_LONGEST_NAME].casefold(), known, 1, CLOSE)
    return next(iter((*same, *close)), None)


def unknown_member_rule(name: str, known: Collection[str]) -> str:
    """What the refusal of an unknown member says, with the known name that was probably meant."""
    hint = f"; did you mean {nearest}?" if (nearest := meant(name, known)) is not None else ";"
    return f"is not known here{hint} known are {', '.join(sorted(known))}"
