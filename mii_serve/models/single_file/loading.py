"""A checked single file becomes a diffusers pipeline on its device, every part in one precision."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from mii_serve.errors import ConfigError, ModelError
from mii_serve.models.loading import make_pipeline
from mii_serve.models.single_file.check import CheckedFile
from mii_serve.models.single_file.names import Source, Sources, clip_sources, open_clip_sources, unet_sources, vae_sources
from mii_serve.models.tensor_parallel import TensorShard, keep_shard

_logger = logging.getLogger(__name__)


def load_file(
    checked: CheckedFile, *, dtype: torch.dtype, device: torch.device, shard: TensorShard | None = None
) -> StableDiffusionPipeline:
    """
    Raises:
        ModelError: naming the part.
        ConfigError: so many ranks cannot share the UNet.
    """
    configs, names = checked.configs, list(checked.weights.shapes)
    where = str(checked.weights.path)
    unet_names = unet_sources(names, layers_per_block=configs.unet["layers_per_block"])
    vae_names = vae_sources(names, num_levels=len(configs.vae["block_out_channels"]))
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(checked.tokenizer), local_files_only=True, **configs.tokenizer)
        scheduler = getattr(diffusers, configs.scheduler_class).from_config(dict(configs.scheduler))
        with checked.weights.opened() as content:
            unet = filled(UNet2DConditionModel, configs.unet, unet_names, content, dtype, where)
            vae = filled(AutoencoderKL, configs.vae, vae_names, content, dtype, where)
            text_encoder = _text_encoder(checked, content, dtype, where)
    except (ModelError, ConfigError):
        raise
    except Exception as error:
        reason = str(error).strip()[:500] or type(error).__name__
        raise ModelError(f"{where} cannot be loaded: {reason}") from error
    if len(tokenizer) != text_encoder.config.vocab_size:
        raise ModelError(
            f"the tokenizer in {checked.tokenizer} knows {len(tokenizer)} tokens, the text encoder in {where}"
            f" {text_encoder.config.vocab_size}. They are of different models; give the right one with --tokenizer FOLDER"
        )
    if shard is not None:
        keep_shard(unet, shard)
    parts = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    for part in parts.values():
        part.to(device=device, dtype=dtype).requires_grad_(False).eval()
    return make_pipeline({**parts, "tokenizer": tokenizer, "scheduler": scheduler})


def filled(cls: Any, config: Mapping[str, Any], sources: Sources, content: Any, dtype: torch.dtype, where: str) -> Any:
    """A module of diffusers with the tensors of a file, on the CPU; none of them is left as it was initialised.

    Raises:
        ModelError: one is missing or has another shape.
    """
    with torch.device("meta"):
        module = cls.from_config(dict(config))
    wanted = {name: tensor.shape for name, tensor in module.state_dict().items()}
    _check_names(cls.__name__, wanted, sources, where)
    tensors = {name: _read(content, sources[name], dtype) for name in wanted}
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name]:
            raise ModelError(
                f"{where}: {sources[name].name} has the shape {list(tensor.shape)}, expected {list(wanted[name])}. It is of"
                " another model, or damaged"
            )
    module.load_state_dict(tensors, assign=True)
    return module


def _text_encoder(checked: CheckedFile, content: Any, dtype: torch.dtype, where: str) -> Any:
    config = CLIPTextConfig(**checked.configs.text_encoder)
    names = list(checked.weights.shapes)
    if checked.configs.family == "v1":
        sources = clip_sources(names)
    else:
        sources = open_clip_sources(names, num_layers=config.num_hidden_layers)
    with torch.device("meta"):
        wanted = CLIPTextModel(config).state_dict()
    bare = {name.removeprefix("text_model."): name for name in wanted}
    _check_names("CLIPTextModel", bare, sources, where)
    tensors = {bare[name]: _read(content, sources[name], dtype) for name in bare}
    return CLIPTextModel.from_pretrained(None, config=config, state_dict=tensors, torch_dtype=dtype)


def _check_names(part: str, wanted: Mapping[str, Any], sources: Sources, where: str) -> None:
    if missing := sorted(set(wanted) - set(sources)):
        raise ModelError(
            f"{where}: {len(missing)} tensors of the {part} are missing, for example {missing[0]}. The file is not whole, or of"
            " a model that is not served"
        )
    if unused := sorted(set(sources) - set(wanted) - {"embeddings.position_ids"}):
        _logger.warning("%s: %d tensors of the %s are not used, for example %s", where, len(unused), part, unused[0])


def _read(content: Any, source: Source, dtype: torch.dtype) -> torch.Tensor:
    """In memory of its own and contiguous."""
    tensor: torch.Tensor = content.get_tensor(source.name)
    if source.third is not None:
        tensor = tensor.chunk(3)[source.third]
    if source.is_flattened:
        tensor = tensor.flatten(1)
    return tensor.to(dtype, copy=True).contiguous()
