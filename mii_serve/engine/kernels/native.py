"""Our own kernel set: the UNet of Stable Diffusion v1.x for a batch of samples, each at its own timestep, with one or two rows.

It walks the modules of a `UNet2DConditionModel` in the order of its `forward` (diffusers/models/unets/unet_2d_condition.py) and
leaves out what need not be computed again:

- keys and values of the cross-attentions depend on the prompt alone: computed once (`project_prompts`), kept for all steps;
- the residual blocks' projections of the time embedding depend on the timestep, and in latent consistency models on the
  guidance scale: computed once (`embed_timesteps`), kept for all samples;
- the two rows of a guided sample have the same activations until the first cross-attention: computed once up to there;
- a division by an output scale of 1.0 is left out.

None of it changes what is computed, only how often.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch.nn.functional import linear, pad, scaled_dot_product_attention, silu

from mii_serve.engine.kernels.loras import CallLoras, LoraLayout
from mii_serve.engine.kernels.sampler import SamplerKernels, TorchSampler
from mii_serve.types import EngineName

NEUTRAL_OPTIONS: dict[str, object] = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "cross_attention_norm": None,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_embedding_act_fn": None,
}
"""The options of a `UNet2DConditionModel` that Stable Diffusion v1.x does not use, and that this module does not implement."""

KNOWN_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D"}


def why_unsupported(unet: Any) -> str | None:
    """What this `UNet2DConditionModel` has that `NativeKernels` does not implement; None when nothing."""
    for option, neutral in NEUTRAL_OPTIONS.items():
        if (value := getattr(unet.config, option, neutral)) != neutral:
            return f"{option}={value!r}"
    for block in (*unet.down_blocks, *_mid_blocks(unet), *unet.up_blocks):
        if (kind := type(block).__name__) not in KNOWN_BLOCKS:
            return f"a block of type {kind}"
    for module in unet.modules():
        if isinstance(module, Attention) and type(module.processor) is not AttnProcessor2_0:
            return f"an attention processor of type {type(module.processor).__name__}"
    return None


def _mid_blocks(unet: Any) -> Sequence[Any]:
    """None of them in distilled UNets such as tiny-sd's and bk-sdm-small's."""
    return [] if unet.mid_block is None else [unet.mid_block]


@dataclass(slots=True, eq=False)
class ForwardPass:
    """One pass through the UNet; the tensors are the arguments of `predict_noise`.

    `sample_of_row` becomes None when the activations have been expanded from one entry per sample to one per row. `skips` are
    the activations of the down blocks that the up blocks take in.
    """

    kernels: NativeKernels
    timestep_embeds: torch.Tensor
    prompts: torch.Tensor
    sample_of_row: torch.Tensor | None
    skips: list[torch.Tensor] = field(default_factory=list)

    def run(self, unet: Any, hidden: torch.Tensor, halvings: int) -> torch.Tensor:
        is_odd = any(size % halvings for size in hidden.shape[-2:])
        hidden = unet.conv_in(hidden)
        self.skips.append(hidden)
        for block in unet.down_blocks:
            hidden = self._down(block, hidden)
        for block in _mid_blocks(unet):
            hidden = self._resnet(block.resnets[0], hidden)
            for transformer, resnet in zip(block.attentions, block.resnets[1:], strict=True):
                hidden = self._resnet(resnet, self._transformer(transformer, hidden))
        for block in unet.up_blocks:
            hidden = self._up(block, hidden, is_odd)
        return unet.conv_out(silu(unet.conv_norm_out(hidden)))

    def _down(self, block: Any, hidden: torch.Tensor) -> torch.Tensor:
        for index, resnet in enumerate(block.resnets):
            hidden = self._resnet(resnet, hidden)
            if hasattr(block, "attentions"):
                hidden = self._transformer(block.attentions[index], hidden)
            self.skips.append(hidden)
        for downsampler in block.downsamplers or ():
            hidden = downsampler(hidden)
            self.skips.append(hidden)
        return hidden

    def _up(self, block: Any, hidden: torch.Tensor, is_odd: bool) -> torch.Tensor:
        for index, resnet in enumerate(block.resnets):
            hidden = self._resnet(resnet, torch.cat((hidden, self.skips.pop()), dim=1))
            if hasattr(block, "attentions"):
                hidden = self._transformer(block.attentions[index], hidden)
        for upsampler in block.upsamplers or ():
            hidden = upsampler(hidden, self.skips[-1].shape[-2:] if is_odd else None)
        return hidden

    def _resnet(self, resnet: ResnetBlock2D, hidden: torch.Tensor) -> torch.Tensor:
        residual = resnet.conv1(silu(resnet.norm1(hidden)))
        residual = residual + self.timestep_embeds[:, self.kernels.time_of(resnet), None, None]
        residual = resnet.conv2(silu(resnet.norm2(residual)))
        if resnet.conv_shortcut is None:
            return residual + hidden
        shortcut = self._pointwise(resnet.conv_shortcut, _channels_last(hidden).flatten(1, 2))
        return residual + shortcut.unflatten(1, hidden.shape[-2:]).permute(0, 3, 1, 2)

    def _transformer(self, transformer: Transformer2DModel, hidden: torch.Tensor) -> torch.Tensor:
        """Tokens are B × (H·W) × channels inside."""
        tokens = self._pointwise(transformer.proj_in, _channels_last(transformer.norm(hidden)).flatten(1, 2))
        for block in transformer.transformer_blocks:
            tokens, hidden = self._block(block, tokens, hidden)
        tokens = self._pointwise(transformer.proj_out, tokens)
        return tokens.unflatten(1, hidden.shape[-2:]).permute(0, 3, 1, 2) + hidden

    def _block(
        self, block: BasicTransformerBlock, tokens: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own, cross = block.attn1, block.attn2
        normed = block.norm1(tokens)
        tokens = tokens + _attend(own, own.to_q(normed), own.to_k(normed), own.to_v(normed))
        query = cross.to_q(block.norm2(tokens))
        if self.sample_of_row is not None:
            tokens, query, hidden = self._expand_to_rows(tokens, query, hidden)
        keys, values = self.prompts[..., self.kernels.keys_of(cross)], self.prompts[..., self.kernels.values_of(cross)]
        tokens = tokens + _attend(cross, query, keys, values)
        return tokens + block.ff(block.norm3(tokens)), hidden

    def _pointwise(self, layer: Any, inputs: torch.Tensor) -> torch.Tensor:
        """A linear layer, or a convolution of one pixel as one, which is faster; `inputs` have their channels last."""
        return linear(inputs, layer.weight.flatten(1), layer.bias)

    def _expand_to_rows(self, *activations: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The activations with one entry per row instead of one per sample; so is all that comes after."""
        rows, self.sample_of_row = self.sample_of_row, None
        self.timestep_embeds = self.timestep_embeds[rows]
        self.skips = [_take(skip, rows) for skip in self.skips]
        return tuple(_take(activation, rows) for activation in activations)


@dataclass(slots=True, eq=False)
class LoraPass(ForwardPass):
    """A pass through the UNet with what `loras` add, which have one entry per sample at first."""

    loras: CallLoras = field(kw_only=True)

    def run(self, unet: Any, hidden: torch.Tensor, halvings: int) -> torch.Tensor:
        handles = [layer.register_forward_hook(self._add) for layer in self.loras.layers]
        try:
            return ForwardPass.run(self, unet, hidden, halvings)
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, layer: Any, inputs: tuple[torch.Tensor, ...], outputs: torch.Tensor) -> torch.Tensor:
        return self.loras.added(layer, inputs[0], outputs)

    def _pointwise(self, layer: Any, inputs: torch.Tensor) -> torch.Tensor:
        return self.loras.added(layer, inputs, ForwardPass._pointwise(self, layer, inputs))

    def _expand_to_rows(self, *activations: torch.Tensor) -> tuple[torch.Tensor, ...]:
        assert self.sample_of_row is not None
        self.loras = self.loras.taken(self.sample_of_row)
        return ForwardPass._expand_to_rows(self, *activations)


class NativeKernels:
    """Implements `mii_serve.engine.kernels.KernelSet` with the UNet's own modules and weights.

    A subclass may keep something else of a prompt (`project_prompts`, `prompt_width`) and compute the transformer blocks in
    another way (`forward_pass`).
    """

    name: EngineName = "native"
    forward_pass: type[ForwardPass] = ForwardPass
    sampler: SamplerKernels = TorchSampler()

    def __init__(self, unet: Any, *, max_latent_pixels_per_call: int | None = None) -> None:
        """`unet` is a `UNet2DConditionModel` for which `why_unsupported` returns None."""
        self._unet = unet
        self._dtype = unet.dtype  # diffusers walks all modules to tell it
        self.max_latent_pixels_per_call = max_latent_pixels_per_call
        self._halvings = 2 ** sum(block.upsamplers is not None for block in unet.up_blocks)
        self._resnets = [module for module in unet.modules() if isinstance(module, ResnetBlock2D)]
        self._cross = [module.attn2 for module in unet.modules() if isinstance(module, BasicTransformerBlock)]
        self._time_of, self.timestep_width = _slices(
            self._resnets, [resnet.time_emb_proj.out_features for resnet in self._resnets]
        )
        self._text_of, half_width = _slices(self._cross, [attention.to_k.out_features for attention in self._cross])
        self.prompt_width = 2 * half_width

    @functools.cached_property
    def lora_layout(self) -> LoraLayout | None:
        """See `KernelSet`."""
        return LoraLayout(self._unet)

    def project_prompts(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        """See `KernelSet`: the keys, then the values, of all cross-attentions."""
        keys = [attention.to_k(prompt_embeds) for attention in self._cross]
        return torch.cat((*keys, *(attention.to_v(prompt_embeds) for attention in self._cross)), dim=-1)

    def embed_timesteps(self, timesteps: torch.Tensor, guidance: torch.Tensor | None = None) -> torch.Tensor:
        """See `KernelSet`: what each residual block adds at these timesteps."""
        frequencies = self._unet.time_proj(timesteps).to(self._dtype)
        condition = None
        if guidance is not None:
            condition = _embed_guidance(guidance, self._unet.config.time_cond_proj_dim).to(self._dtype)
        embedding = silu(self._unet.time_embedding(frequencies, condition))
        return torch.cat([resnet.time_emb_proj(embedding) for resnet in self._resnets], dim=-1)

    def predict_noise(
        self,
        model_input: torch.Tensor,
        timestep_embeds: torch.Tensor,
        prompts: torch.Tensor,
        sample_of_row: torch.Tensor | None = None,
        loras: CallLoras | None = None,
    ) -> torch.Tensor:
        """See `KernelSet`."""
        if loras is None:
            forward_pass = self.forward_pass(self, timestep_embeds, prompts, sample_of_row)
        else:
            forward_pass = LoraPass(self, timestep_embeds, prompts, sample_of_row, loras=loras)
        return forward_pass.run(self._unet, model_input, self._halvings)

    def close(self) -> None:
        pass

    def time_of(self, resnet: ResnetBlock2D) -> slice:
        return self._time_of[resnet]

    def keys_of(self, attention: Attention) -> slice:
        return self._text_of[attention]

    def values_of(self, attention: Attention) -> slice:
        keys, shift = self._text_of[attention], self.prompt_width // 2
        return slice(keys.start + shift, keys.stop + shift)


def _embed_guidance(guidance: torch.Tensor, width: int) -> torch.Tensor:
    """N × `width`, as `StableDiffusionPipeline.get_guidance_scale_embedding` has it."""
    half = width // 2
    exponents = torch.log(torch.tensor(10000.0)) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -exponents).to(guidance.device)
    angles = (guidance * 1000.0)[:, None] * frequencies[None, :]
    return pad(torch.cat([torch.sin(angles), torch.cos(angles)], dim=1), (0, width % 2))


def _channels_last(image: torch.Tensor) -> torch.Tensor:
    return image.permute(0, 2, 3, 1)


def _take(activation: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """Rows of an activation, in the memory format it has."""
    taken = activation[rows]
    if activation.dim() == 4 and activation.is_contiguous(memory_format=torch.channels_last):
        return taken.contiguous(memory_format=torch.channels_last)
    return taken


def _attend(attention: Attention, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    query, keys, values = (x.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in (query, keys, values))
    attended = scaled_dot_product_attention(query, keys, values)
    return attention.to_out[0](attended.transpose(1, 2).flatten(2))


def _slices(modules: Sequence[Any], widths: Sequence[int]) -> tuple[dict[Any, slice], int]:
    """For each module its slice of the concatenation of all modules' outputs, and the width of that concatenation."""
    slices, start = {}, 0
    for module, width in zip(modules, widths, strict=True):
        slices[module] = slice(start, start + width)
        start += width
    return slices, start
