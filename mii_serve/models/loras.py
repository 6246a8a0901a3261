"""LoRAs (`--lora NAME=PATH`): low-rank changes to layers of a UNet and a text encoder, read from a file or a folder.

What may be given, in `.safetensors`:

- a file as diffusers writes it (`save_lora_weights`), or as kohya's scripts and AUTOMATIC1111 do (`lora_unet_…`, `lora_te_…`,
  with `alpha`); also a folder with one such file;
- a folder that `PeftModel.save_pretrained` wrote, of a UNet, or with folders `unet` and `text_encoder` of both.

The names are converted by diffusers. A LoRA's factor is alpha / rank, and 1 where no alpha is given. What is no LoRA, though it
goes by that name (LoHa, LoKr, DoRA), is refused, and so is one whose layers are not the model's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from mii_serve.errors import ModelError
from mii_serve.models.fingerprint import fingerprint_of_named
from mii_serve.models.single_file.files import SAFETENSORS, WeightsFile, read_file

PartName = Literal["unet", "text_encoder"]
PARTS: tuple[PartName, ...] = ("unet", "text_encoder")
FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""Looked for in a folder, in this order; otherwise it holds one file."""
ADAPTER_CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"
"""Where diffusers writes PEFT's configuration, in the header of its file."""

Tensors = Mapping[str, torch.Tensor]

_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")
_PEFT = "base_model.model."
_OTHER_KINDS = {
    r"\.hada_": "a LoHa",
    r"\.lokr_": "a LoKr",
    r"dora_scale|lora_magnitude_vector": "a DoRA",
    r"\.oft_": "an OFT",
    r"\.lora_mid\.": "a LoRA in Tucker form",
    r"\.lora_B\.bias$": "a LoRA with biases",
}
_SDXL = ("lora_te2_", "text_encoder_2.")
_TRANSFORMERS = ("transformer.", "lora_transformer_", "double_blocks", "lora_unet_double_blocks")
_TENSOR = re.compile(r"(?P<layer>.+)\.lora_(?P<side>A|B)\.weight")


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """What is added to a layer's weight: factor × `up` · `down`.

    For a linear layer `down` is rank × inputs and `up` outputs × rank; for a convolution both have the two dimensions of a
    kernel in addition, and that of `up` is 1 × 1.
    """

    down: torch.Tensor
    up: torch.Tensor
    factor: float

    @property
    def rank(self) -> int:
        return len(self.down)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoraAdapter:
    """A LoRA on the CPU, by the names of the layers of the model that it changes. `revision` is its files' fingerprint."""

    name: str
    revision: str
    unet: Mapping[str, LowRank] = field(repr=False)
    text_encoder: Mapping[str, LowRank] = field(repr=False)

    @property
    def rank(self) -> int:
        return max(one.rank for one in (*self.unet.values(), *self.text_encoder.values()))


@dataclass(frozen=True, slots=True, eq=False)
class LayerShapes:
    """The weights' shapes of the layers that a LoRA may change, by name; taken before an engine changes the modules."""

    unet: Mapping[str, tuple[int, ...]]
    text_encoder: Mapping[str, tuple[int, ...]]
    layers_per_block: int

    @classmethod
    def of(cls, pipeline: Any) -> LayerShapes:
        def shapes(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
            layers = torch.nn.Linear, torch.nn.Conv2d
            return {name: tuple(one.weight.shape) for name, one in module.named_modules() if isinstance(one, layers)}

        blocks = pipeline.unet.config.layers_per_block
        return cls(shapes(pipeline.unet), shapes(pipeline.text_encoder), blocks if isinstance(blocks, int) else blocks[0])


def load_loras(paths: Mapping[str, Path], pipeline: Any) -> dict[str, LoraAdapter]:
    """Those of a pipeline's operator, by name.

    Raises:
        ModelError: as `load_lora`.
    """
    shapes = LayerShapes.of(pipeline)
    return {name: load_lora(name, path, shapes) for name, path in paths.items()}


def load_lora(name: str, path: Path, shapes: LayerShapes) -> LoraAdapter:
    """Read and check a LoRA for a model with layers of these shapes.

    Raises:
        ModelError: it cannot be read, is something else, or is for another model.
    """
    path = path.expanduser().absolute()
    try:
        files = {role: read_file(file, allow_pickle=False) for role, file in _files(path).items()}
        parts = _merged(_read(role, file, shapes) for role, file in files.items())
        revision = fingerprint_of_named({role: file.path for role, file in files.items()})
    except OSError as error:
        raise ModelError(f"lora: {path} cannot be read: {error}") from error
    except ModelError as error:
        text = str(error)
        raise ModelError(text if text.startswith("lora: ") else f"lora: {text}") from error
    found = {part: _checked(parts[part], getattr(shapes, part), part, path) for part in PARTS}
    if not any(found.values()):
        raise ModelError(f"lora: {path} holds no LoRA. It has none of the tensors lora_A and lora_B, or lora_down and lora_up")
    return LoraAdapter(name=name, revision=revision, unet=found["unet"], text_encoder=found["text_encoder"])


def _files(path: Path) -> dict[str, Path]:
    """By what they hold: a part's name, or "all"."""
    if path.is_file():
        if path.suffix != SAFETENSORS:
            raise ModelError(f"{path} is not a {SAFETENSORS} file. Convert it once where that is safe")
        return {"all": path}
    if not path.is_dir():
        raise ModelError(f"there is no file or folder {path}")
    by_part = {part: path / part / FILES[1] for part in PARTS if (path / part / FILES[1]).is_file()}
    if by_part:
        return {str(part): file for part, file in by_part.items()}
    named = next((path / name for name in FILES if (path / name).is_file()), None)
    found = [named] if named else sorted(path.glob(f"*{SAFETENSORS}"))
    if len(found) != 1:
        what = f"several {SAFETENSORS} files: {', '.join(one.name for one in found[:5])}" if found else f"no {SAFETENSORS} file"
        raise ModelError(f"{path} holds {what}. Give the LoRA's file")
    return {"all": found[0]}


@dataclass(slots=True)
class _Part:
    """The tensors of one part of the model by PEFT's names, and the alphas that are known."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


def _merged(read: Iterator[dict[PartName, _Part]]) -> dict[PartName, _Part]:
    parts: dict[PartName, _Part] = {part: _Part() for part in PARTS}
    for one in read:
        parts |= {part: found for part, found in one.items() if found.tensors}
    return parts


def _read(role: str, file: WeightsFile, shapes: LayerShapes) -> dict[PartName, _Part]:
    _refuse_other_kinds(file)
    with file.opened() as content:
        tensors: dict[str, torch.Tensor] = {name: content.get_tensor(name) for name in file.shapes}
    if all(name.startswith(_PEFT) for name in tensors):
        return _from_peft(role, file, tensors, shapes)
    from diffusers.loaders import StableDiffusionLoraLoaderMixin
    from diffusers.utils.state_dict_utils import StateDictType, convert_state_dict_to_peft, convert_unet_state_dict_to_peft

    if all(name.startswith(_KOHYA) for name in tensors):
        for name in tensors:
            if f"{name.partition('.')[0]}.lora_down.weight" not in tensors:
                raise ModelError(f"{file.path} has a tensor that is no LoRA's: {name}")
    try:
        state, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(tensors, unet_config=_Blocks(shapes.layers_per_block))
    except (ValueError, KeyError, IndexError) as error:
        raise ModelError(f"{file.path} cannot be converted, it is damaged or for another kind of model: {error}") from error
    if not any(name.startswith(tuple(f"{part}." for part in PARTS)) for name in state):
        state = {f"unet.{name}": tensor for name, tensor in state.items()}  # as `unet.save_attn_procs` wrote it
    metadata = _metadata(file)
    found: dict[PartName, _Part] = {}
    for part in PARTS:
        prefix = f"{part}."
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        named = {_as_down(name.removeprefix(prefix)): one for name, one in (alphas or {}).items() if name.startswith(prefix)}
        if part == "unet":
            own, named = convert_unet_state_dict_to_peft(own), convert_unet_state_dict_to_peft(named)
        else:
            own, named = (convert_state_dict_to_peft(one, StateDictType.DIFFUSERS_OLD) for one in (own, named))
        config = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
        found[part] = _Part(own, {_layer(name): float(alpha) for name, alpha in named.items()}, config or None)
    others = sorted(name for name in state if not name.startswith(tuple(f"{part}." for part in PARTS)))
    if others:
        raise ModelError(f"{file.path} changes parts that this model does not have, for example {others[0]}")
    return found


@dataclass(frozen=True, slots=True)
class _Blocks:
    """What diffusers reads of a UNet's configuration."""

    layers_per_block: int


def _from_peft(role: str, file: WeightsFile, tensors: Tensors, shapes: LayerShapes) -> dict[PartName, _Part]:
    own = {name.removeprefix(_PEFT): tensor for name, tensor in tensors.items()}
    part: PartName = "text_encoder" if role == "text_encoder" else "unet"
    if role == "all" and not any(_layer(name) in shapes.unet for name in own):
        part = "text_encoder"
    try:
        config = json.loads((file.path.parent / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file.path}: its {ADAPTER_CONFIG} cannot be read: {error}") from error
    if config.get("peft_type", "LORA") != "LORA" or config.get("use_dora"):
        raise ModelError(f"{file.path} is of kind {config.get('peft_type')}, expected a plain LoRA")
    return {part: _Part(own, {}, config)}


def _refuse_other_kinds(file: WeightsFile) -> None:
    for pattern, kind in _OTHER_KINDS.items():
        if any(re.search(pattern, name) for name in file.shapes):
            raise ModelError(f"{file.path} is {kind}, and only plain LoRAs are served")
    if any(name.startswith(_SDXL) for name in file.shapes):
        raise ModelError(f"{file.path} is a LoRA of Stable Diffusion XL, which has two text encoders")
    if any(name.startswith(_TRANSFORMERS) for name in file.shapes):
        raise ModelError(f"{file.path} is a LoRA of a diffusion transformer, as in Stable Diffusion 3 and FLUX")


def _metadata(file: WeightsFile) -> Mapping[str, Any]:
    if (text := file.metadata.get(METADATA)) is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ModelError(f"{file.path}: {METADATA} in its header is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _as_down(alpha_name: str) -> str:
    """The name of the `down` tensor beside an alpha, so that both are converted alike."""
    bare = alpha_name.removesuffix(".alpha")
    return bare if bare.endswith(".down.weight") else f"{bare}.lora.down.weight"


def _layer(name: str) -> str:
    return name.partition(".lora_A.")[0].partition(".lora_B.")[0]


def _checked(part: _Part, shapes: Mapping[str, tuple[int, ...]], name: PartName, path: Path) -> dict[str, LowRank]:
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for tensor_name, tensor in part.tensors.items():
        if (match := _TENSOR.fullmatch(tensor_name)) is None:
            raise ModelError(f"lora: {path} has a tensor that is no LoRA's: {name}.{tensor_name}")
        sides.setdefault(match["layer"], {})[match["side"]] = tensor
    found: dict[str, LowRank] = {}
    for layer, pair in sides.items():
        if len(pair) != 2:
            raise ModelError(f"lora: {path} is not whole: {name}.{layer} has only one of its two tensors")
        own_name = next((known for known in _spellings(layer) if known in shapes), None)
        if own_name is None:
            raise ModelError(f"lora: {path} is for another model: it changes {name}.{layer}, which this model does not have")
        where = f"{path} is for another model: {name}.{layer}"
        found[own_name] = _low_rank(pair["A"], pair["B"], shapes[own_name], part, layer, where)
    return found


def _spellings(layer: str) -> Iterator[str]:
    """CLIP's text model is a module of its own in older versions of transformers."""
    yield layer
    yield layer.removeprefix("text_model.")
    yield f"text_model.{layer}"


def _low_rank(down: torch.Tensor, up: torch.Tensor, weight: tuple[int, ...], part: _Part, layer: str, where: str) -> LowRank:
    if down.dim() < 2 or up.dim() < 2:
        raise ModelError(f"lora: {where} has tensors of fewer than two dimensions")
    rank = len(down)
    if len(weight) == 2:
        down, up = (one.flatten(1) if one.dim() == 4 and one.shape[2:] == (1, 1) else one for one in (down, up))
    elif down.dim() == 2 and weight[2:] == (1, 1):
        down, up = down[..., None, None], up[..., None, None]
    expected = (rank, *weight[1:]), (weight[0], rank, *(1 for _ in weight[2:]))
    if (tuple(down.shape), tuple(up.shape)) != expected:
        shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
        raise ModelError(f"lora: {where} has tensors of shape {shapes}, and the model's weight is {weight}")
    if not (bool(torch.isfinite(down).all()) and bool(torch.isfinite(up).all())):
        raise ModelError(f"lora: {where.partition(' is for')[0]} has values that are not finite, in {layer}")
    return LowRank(down, up, _factor(part, layer, rank))


def _factor(part: _Part, layer: str, rank: int) -> float:
    if layer in part.alphas:
        return part.alphas[layer] / rank
    if part.config is None:
        return 1.0
    patterns = part.config.get("alpha_pattern") or {}
    match = next((key for key in patterns if re.match(rf"(.*\.)?({key})$", layer)), None)
    alpha = part.config.get("lora_alpha", rank) if match is None else patterns[match]
    return float(alpha) / (math.sqrt(rank) if part.config.get("use_rslora") else rank)
