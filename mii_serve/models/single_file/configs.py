"""The configuration of each part of a checkpoint: sizes from the shapes of its tensors, the rest from its family.

What no tensor shows is read from where people keep it: a YAML file of the checkpoint's name beside it, as the original code and
AUTOMATIC1111's web UI have them, or the metadata of the safetensors file (`modelspec.*`). Without either, a v2 checkpoint is
taken for one of 768 pixels with v-prediction, as diffusers takes it, but an inpainting one for what is published: one of 512
pixels without it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from mii_serve.errors import ModelError
from mii_serve.models.families import SD_V1_4, SD_V2_1
from mii_serve.models.single_file.contents import CLIP, CONV_IN, INPAINTING_CHANNELS, OPEN_CLIP, UNET, VAE, Family, Shapes

Prediction = Literal["epsilon", "v_prediction"]

HEAD_CHANNELS = 64
"""Of every attention head of the text encoders and of v2's UNet; v1's UNet has eight heads everywhere."""
_BASE_SIZE = 64
"""In latent pixels: what models without v-prediction are made for."""
_FAMILIES = {"v1": SD_V1_4, "v2": SD_V2_1}
_SCHEDULERS = {"v1": "PNDMScheduler", "v2": "DDIMScheduler"}
_PAD_TOKENS = {"v1": "<|endoftext|>", "v2": "!"}
_PREDICTIONS: Mapping[object, Prediction] = {"v": "v_prediction", "eps": "epsilon", "epsilon": "epsilon"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FileConfigs:
    """As diffusers and transformers take them; `tokenizer` are its options beside the vocabulary."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    family: Family

    @property
    def scheduler_class(self) -> str:
        return _SCHEDULERS[self.family]


def configs_of(shapes: Shapes, family: Family, where: str, *, prediction: Prediction | None = None) -> FileConfigs:
    """Read the sizes off the shapes; `prediction` None is the family's.

    Raises:
        ModelError: tensors that a checkpoint of the family has are missing, or its parts do not make up a UNet.
    """
    known = _FAMILIES[family]
    if prediction is None and shapes[CONV_IN][1] == INPAINTING_CHANNELS:
        prediction = "epsilon"
    predicts = prediction or known.scheduler.get("prediction_type", "epsilon")
    is_base = family == "v1" or predicts == "epsilon"
    sample_size = _BASE_SIZE if is_base else known.unet["sample_size"]
    try:
        return FileConfigs(
            unet={**known.unet, **_unet(shapes, family), "sample_size": sample_size},
            vae={**known.vae, **vae_sizes(shapes), "sample_size": 8 * sample_size},
            text_encoder={**known.text_encoder, **(_clip(shapes) if family == "v1" else _open_clip(shapes))},
            scheduler={**known.scheduler, "prediction_type": predicts},
            tokenizer={"pad_token": _PAD_TOKENS[family], "model_max_length": known.text_encoder["max_position_embeddings"]},
            family=family,
        )
    except KeyError as error:
        raise ModelError(f"{where} is not whole: it has no {error.args[0]}. Fetch or copy it again") from None
    except ValueError as error:
        raise ModelError(f"{where} has a UNet that this release cannot read from a single file: {error}") from None


def prediction_beside(file: Path) -> tuple[Prediction | None, Path | None]:
    """What the YAML file of the same name says the UNet predicts, and that file; None where there is none.

    Raises:
        ModelError
    """
    for beside in (file.with_suffix(".yaml"), file.with_suffix(".yml")):
        if beside.is_file():
            try:
                content = yaml.safe_load(beside.read_text(encoding="utf-8"))
                said = content["model"]["params"].get("parameterization", "eps")
            except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"{beside} cannot be read as the configuration of a checkpoint: {error}") from error
            if said not in _PREDICTIONS:
                raise ModelError(f"{beside}: model.params.parameterization must be 'eps' or 'v', got {said!r}")
            return _PREDICTIONS[said], beside
    return None, None


def prediction_in(metadata: Mapping[str, str]) -> Prediction | None:
    return _PREDICTIONS.get(metadata.get("modelspec.prediction_type"))


def write_configs(configs: FileConfigs, tokenizer: Path, folder: Path) -> None:
    """As a diffusers folder without weights: what `StableDiffusionPipeline.from_single_file(FILE, config=FOLDER)` takes."""
    classes = {
        "unet": ("diffusers", "UNet2DConditionModel", "config.json"),
        "vae": ("diffusers", "AutoencoderKL", "config.json"),
        "text_encoder": ("transformers", "CLIPTextModel", "config.json"),
        "scheduler": ("diffusers", configs.scheduler_class, "scheduler_config.json"),
    }
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "tokenizer": ["transformers", "CLIPTokenizer"]}
    for part, (library, class_name, name) in classes.items():
        index[part] = [library, class_name]
        (folder / part).mkdir(parents=True)
        config = {"_class_name": class_name, **getattr(configs, part)}
        if part == "text_encoder":
            config |= {"model_type": "clip_text_model", "architectures": [class_name]}
        (folder / part / name).write_text(json.dumps(config), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "tokenizer").mkdir()
    for file in tokenizer.iterdir():
        if file.suffix in (".json", ".txt") and file.is_file():
            (folder / "tokenizer" / file.name).write_bytes(file.read_bytes())
    options = folder / "tokenizer" / "tokenizer_config.json"
    said = json.loads(options.read_text(encoding="utf-8")) if options.is_file() else {}
    options.write_text(json.dumps({**said, **configs.tokenizer}), encoding="utf-8")


def vae_sizes(shapes: Shapes, prefix: str = VAE) -> dict[str, Any]:
    """
    Raises:
        KeyError: a tensor that every VAE has is missing.
    """
    num_levels = _count(shapes, f"{prefix}encoder.down.")
    encoder = f"{prefix}encoder.down"
    return {
        "block_out_channels": [shapes[f"{encoder}.{level}.block.0.conv2.weight"][0] for level in range(num_levels)],
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
        "layers_per_block": _count(shapes, f"{encoder}.0.block."),
        "latent_channels": shapes[f"{prefix}decoder.conv_in.weight"][1],
    }


def _unet(shapes: Shapes, family: Family) -> dict[str, Any]:
    blocks, outputs = _count(shapes, f"{UNET}input_blocks."), _count(shapes, f"{UNET}output_blocks.")
    down: list[list[tuple[int, bool]]] = [[]]  # of each level, of each residual block: its channels, and is there attention
    for block in range(1, blocks):
        name = f"{UNET}input_blocks.{block}"
        if f"{name}.0.op.weight" in shapes:
            down.append([])
        else:
            down[-1].append((shapes[f"{name}.0.in_layers.2.weight"][0], _attends(shapes, name)))
    per_level = {len(level) for level in down}
    layers = len(down[0])
    if per_level != {layers} or any(len(set(level)) > 1 for level in down):
        raise ValueError(f"its levels have {', '.join(str(len(level)) for level in down)} blocks")
    has_attention = [level[0][1] for level in down]
    up = [_attends(shapes, f"{UNET}output_blocks.{block}") for block in range(outputs)]
    if up != [attends for attends in reversed(has_attention) for _ in range(layers + 1)]:
        raise ValueError("its output blocks do not mirror its input blocks")
    mid = f"{UNET}middle_block.1."
    text_width = shapes[f"{mid}transformer_blocks.0.attn2.to_k.weight"][1]
    channels = [level[0][0] for level in down]
    return {
        "in_channels": shapes[f"{UNET}input_blocks.0.0.weight"][1],
        "out_channels": shapes[f"{UNET}out.2.weight"][0],
        "block_out_channels": channels,
        "layers_per_block": layers,
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in has_attention],
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(has_attention)],
        "cross_attention_dim": text_width,
        "use_linear_projection": len(shapes[f"{mid}proj_in.weight"]) == 2,
        "attention_head_dim": 8 if family == "v1" else [each // HEAD_CHANNELS for each in channels],
    }


def _attends(shapes: Shapes, block: str) -> bool:
    return f"{block}.1.proj_in.weight" in shapes


def _clip(shapes: Shapes) -> dict[str, Any]:
    text = f"{CLIP}text_model." if any(name.startswith(f"{CLIP}text_model.") for name in shapes) else CLIP
    layer = f"{text}encoder.layers."
    return _text(
        shapes[f"{text}embeddings.token_embedding.weight"],
        shapes[f"{text}embeddings.position_embedding.weight"],
        intermediate_size=shapes[f"{layer}0.mlp.fc1.weight"][0],
        num_hidden_layers=_count(shapes, layer),
    )


def _open_clip(shapes: Shapes) -> dict[str, Any]:
    layer = f"{OPEN_CLIP}transformer.resblocks."
    return _text(
        shapes[f"{OPEN_CLIP}token_embedding.weight"],
        shapes[f"{OPEN_CLIP}positional_embedding"],
        intermediate_size=shapes[f"{layer}0.mlp.c_fc.weight"][0],
        num_hidden_layers=_count(shapes, layer) - 1,
    )


def _text(tokens: Any, positions: Any, **sizes: int) -> dict[str, Any]:
    vocab_size, width = tokens
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "max_position_embeddings": positions[0],
        "num_attention_heads": max(1, width // HEAD_CHANNELS),
        **sizes,
    }


def _count(shapes: Shapes, prefix: str) -> int:
    """One more than the largest number that follows the prefix."""
    numbered = re.compile(re.escape(prefix) + r"(\d+)\.")
    numbers = [int(match[1]) for name in shapes if (match := numbered.match(name))]
    if not numbers:
        raise KeyError(f"{prefix}0")
    return max(numbers) + 1
