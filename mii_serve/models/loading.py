"""A checked folder becomes a diffusers pipeline on its device, every part in one precision.

The parts are loaded one by one and not by `StableDiffusionPipeline.from_pretrained`, which fills tensors that are missing in a
file with random numbers and only logs it, and with transformers 5 leaves some parts in the precision they were stored in.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer

from mii_serve.errors import ConfigError, ModelError
from mii_serve.models.check import CheckedFolder, Part
from mii_serve.models.tensor_parallel import TensorShard, keep_shard, load_shard

if TYPE_CHECKING:
    from mii_serve.models import Precision

TORCH_DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_MODEL_CLASSES: dict[str, Any] = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "safety_checker": StableDiffusionSafetyChecker,
}
_VAE_CLASSES: dict[str, Any] = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
_OTHER_CLASSES: dict[str, Any] = {"tokenizer": CLIPTokenizer, "feature_extractor": CLIPImageProcessor}

_logger = logging.getLogger(__name__)


def check_device(device: str) -> torch.device:
    """The device, if it is there.

    Raises:
        ConfigError
    """
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError("device", f"must be cpu, cuda or cuda:N, got {device!r}") from None
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (found.index or 0) >= count:
            raise ConfigError("device", f"{device} is not there: torch sees {count} CUDA devices")
    return found


def load_pipeline(
    checked: CheckedFolder, *, dtype: Precision, device: torch.device, shard: TensorShard | None = None
) -> StableDiffusionPipeline:
    """Load every part; with `shard`, only a rank's part of the UNet.

    Raises:
        ModelError: naming the part.
        ConfigError: so many ranks cannot share the UNet.
    """
    parts = {
        name: _load(part, TORCH_DTYPES[dtype], device, shard if name == "unet" else None)
        for name, part in checked.parts.items()
    }
    _embed_added_tokens(parts["tokenizer"], parts["text_encoder"], checked)
    _check_tokens(parts["tokenizer"], parts["text_encoder"], checked)
    return make_pipeline(parts)


def make_pipeline(parts: dict[str, Any]) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline(
        **{"safety_checker": None, "feature_extractor": None, **parts},
        requires_safety_checker="safety_checker" in parts,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_part(part: Part, *, dtype: Precision, device: torch.device) -> Any:
    """One part by itself.

    Raises:
        ModelError: naming it.
    """
    return _load(part, TORCH_DTYPES[dtype], device, None)


def _load(part: Part, dtype: torch.dtype, device: torch.device, shard: TensorShard | None) -> Any:
    try:
        if part.name in _MODEL_CLASSES:
            return _load_weights(part, dtype, device, shard)
        cls = _OTHER_CLASSES.get(part.name) or _scheduler_class(part)
        return cls.from_pretrained(str(part.folder), local_files_only=True)
    except (ModelError, ConfigError):
        raise
    except Exception as error:
        reason = str(error).strip()[:500] or type(error).__name__
        raise ModelError(f"{part.name} in {part.folder} cannot be loaded: {reason}") from error


def _load_weights(part: Part, dtype: torch.dtype, device: torch.device, shard: TensorShard | None) -> Any:
    assert part.weights is not None
    if shard is not None and not part.weights.is_pickle:
        module, found = load_shard(part.folder, part.weights.files, shard=shard, dtype=dtype, device=device)
    else:
        cls = _VAE_CLASSES[part.class_name] if part.name == "vae" else _MODEL_CLASSES[part.name]
        module, found = cls.from_pretrained(
            str(part.folder),
            torch_dtype=dtype,  # the name that every supported version of both libraries knows
            variant=part.weights.variant,
            use_safetensors=not part.weights.is_pickle,
            local_files_only=True,
            output_loading_info=True,
        )
        if shard is not None:
            keep_shard(module, shard)
    missing = sorted(found["missing_keys"])
    if missing:
        raise ModelError(
            f"{part.name}: {len(missing)} tensors of a {part.class_name} are missing in {part.folder}, for example"
            f" {missing[0]}. They are of another model, or damaged; fetch the model again"
        )
    if found["unexpected_keys"]:
        unknown = sorted(found["unexpected_keys"])
        _logger.warning("%s: %d tensors are not used, for example %s", part.folder, len(unknown), unknown[0])
    return module.to(device=device, dtype=dtype).requires_grad_(False).eval()


def _scheduler_class(part: Part) -> Any:
    cls = getattr(diffusers, part.class_name, None)
    needed = getattr(cls, "_backends", ())  # of the stand-in that diffusers exports where a package is not there
    if missing := " ".join(name for name in needed if importlib.util.find_spec(name) is None):
        raise ModelError(f"scheduler in {part.folder}: {part.class_name} needs {missing}; pip install {missing}")
    if not (isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)):
        raise ModelError(
            f"scheduler in {part.folder}: diffusers {diffusers.__version__} has no {part.class_name}. Name another in"
            " model_index.json, or install a diffusers that has it"
        )
    return cls


def _embed_added_tokens(tokenizer: Any, text_encoder: Any, checked: CheckedFolder) -> None:
    """Give the tokens that were added to the tokenizer alone, as textual inversion does, the embedding of unknown words."""
    num_known = text_encoder.config.vocab_size
    added = sorted(token for token, number in tokenizer.get_added_vocab().items() if number >= num_known)
    if not added or len(tokenizer) != num_known + len(added):
        return
    _logger.warning(
        "%s: the text_encoder has no embedding for %s, which the tokenizer knows. In prompts they mean nothing, unless"
        " --embedding TOKEN=PATH gives one",
        checked.folder,
        ", ".join(added[:3]) + (", …" if len(added) > 3 else ""),
    )
    unknown = text_encoder.get_input_embeddings().weight[tokenizer.unk_token_id].clone()
    table = text_encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False).requires_grad_(False)
    table.weight[num_known:] = unknown


def _check_tokens(tokenizer: Any, text_encoder: Any, checked: CheckedFolder) -> None:
    """A token without a row in the encoder's embedding would crash the device at the first prompt that contains it."""
    config = text_encoder.config
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"{checked.folder}: the tokenizer knows {len(tokenizer)} tokens, the text_encoder only {config.vocab_size}."
            " They are of different models"
        )
    if tokenizer.model_max_length > config.max_position_embeddings:
        raise ModelError(
            f"{checked.folder}: the tokenizer makes up to {tokenizer.model_max_length} tokens (model_max_length), the"
            f" text_encoder takes {config.max_position_embeddings}. Correct tokenizer/tokenizer_config.json"
        )
