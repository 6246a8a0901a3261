"""The UNet with operations fused: `NativeKernels` with less traffic between the convolutions and matrix products.

What is folded into what:

- a convolution's bias, the residual, the skip connection and the time embedding are added by the next GroupNorm, which reads
  them anyway, and which writes the sum where it is needed again;
- a linear layer that ends a residual branch adds its product to the residual in place; its bias, which is the same for all
  tokens, is added by the next LayerNorm, and what is left of the biases at the end of a transformer is part of its last bias;
- the three matrices of a self-attention are one.

Only the order of float operations differs from `NativeKernels`. Images are in channels last throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn.functional import conv2d, interpolate, linear, pad

from mii_serve.engine.kernels.fused.operations import Operations, Upsampling, image_of, in_channels_last, summed, tokens_of
from mii_serve.engine.kernels.loras import CallLoras, LoraRows
from mii_serve.engine.kernels.native import LoraPass, NativeKernels
from mii_serve.engine.kernels.sampler import SamplerKernels, TorchSampler


@dataclass(slots=True, eq=False)
class Image:
    """image + bias + residual. `total` is their sum, once something has computed it."""

    image: torch.Tensor
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    total: torch.Tensor | None = None

    def value(self) -> torch.Tensor:
        if self.total is None:
            self.total = summed(self.image, self.bias, self.residual)
        return self.total


@dataclass(frozen=True, slots=True, eq=False)
class MergedBlock:
    """What is computed once of a `BasicTransformerBlock`: `biases` are those that its three LayerNorms still have to add."""

    query_key_value: torch.Tensor
    biases: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class MergedTransformer:
    """`after` is what is left to add to a transformer's output, C numbers; `left` what is left to add to its last tokens."""

    blocks: tuple[MergedBlock, ...]
    after: torch.Tensor
    left: torch.Tensor | None = None


@dataclass(slots=True, eq=False)
class FusedPass:
    """One pass through the UNet; the tensors are those of `NativeKernels.predict_noise`.

    `sample_of_row` becomes None when the activations have been expanded from one entry per sample to one per row.
    """

    kernels: FusedKernels
    timestep_embeds: torch.Tensor
    prompts: torch.Tensor
    sample_of_row: torch.Tensor | None

    def run(self, unet: Any, latents: torch.Tensor, halvings: int) -> torch.Tensor:
        is_odd = any(size % halvings for size in latents.shape[-2:])
        hidden = convolved(unet.conv_in, latents)
        skips = [hidden]
        for block in unet.down_blocks:
            for index, resnet in enumerate(block.resnets):
                hidden = self._resnet(resnet, hidden)
                if hasattr(block, "attentions"):
                    hidden = self._transformer(block.attentions[index], hidden, skips)
                skips.append(hidden)
            for downsampler in block.downsamplers or ():
                value = hidden.value()
                hidden = convolved(downsampler.conv, value if downsampler.padding else pad(value, (0, 1, 0, 1)))
                skips.append(hidden)
        if (middle := unet.mid_block) is not None:
            hidden = self._resnet(middle.resnets[0], hidden)
            for transformer, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
                hidden = self._resnet(resnet, self._transformer(transformer, hidden, skips))
        for block in unet.up_blocks:
            for index, resnet in enumerate(block.resnets):
                hidden = self._resnet(resnet, hidden, skips.pop().value())
                if hasattr(block, "attentions"):
                    hidden = self._transformer(block.attentions[index], hidden, skips)
            for upsampler in block.upsamplers or ():
                if is_odd:
                    larger = interpolate(hidden.value(), size=skips[-1].image.shape[-2:], mode="nearest")
                    hidden = convolved(upsampler.conv, larger)
                else:
                    hidden = upsampled(self.kernels.operations, self.kernels.upsampling_of(upsampler), upsampler, hidden)
        normed, _ = normalized(self.kernels.operations, hidden, unet.conv_norm_out, is_silu=True)
        return unet.conv_out(normed)

    def _resnet(self, resnet: ResnetBlock2D, hidden: Image, skip: torch.Tensor | None = None) -> Image:
        bias = self.timestep_embeds[:, self.kernels.time_of(resnet)]
        return residual_block(self.kernels.operations, resnet, hidden, bias, self.kernels.end_bias_of(resnet), skip)

    def _transformer(self, transformer: Transformer2DModel, hidden: Image, skips: list[Image]) -> Image:
        operations, merged = self.kernels.operations, self.kernels.merged(transformer)
        normed, total = normalized(
            operations, hidden, transformer.norm, is_silu=False, after=merged.after, keeps_total=True
        )  # fmt: skip
        assert total is not None
        tokens = self._product(transformer.proj_in, tokens_of(normed), len(total), transformer.proj_in.bias)
        tokens, total = self._blocks(transformer, merged, tokens, total, skips)
        self._project_out(transformer, merged, tokens, total)
        return Image(total)

    def _blocks(
        self,
        transformer: Transformer2DModel,
        merged: MergedTransformer,
        tokens: torch.Tensor,
        total: torch.Tensor,
        skips: list[Image],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the transformer's blocks make of the tokens; `total`, to which it is added, has one entry per row afterwards."""
        num_tokens = total.shape[2] * total.shape[3]
        for block, of_block in zip(transformer.transformer_blocks, merged.blocks, strict=True):
            tokens, total = self._block(block, of_block, tokens, total, num_tokens, skips)
        return tokens, total

    def _block(
        self,
        block: BasicTransformerBlock,
        merged: MergedBlock,
        tokens: torch.Tensor,
        total: torch.Tensor,
        num_tokens: int,
        skips: list[Image],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        operations, own, cross = self.kernels.operations, block.attn1, block.attn2
        projected = self._query_key_value(own, merged, operations.layer_norm(tokens, block.norm1, merged.biases[0]), len(total))
        projected = projected.view(-1, num_tokens, 3, own.heads, projected.shape[1] // 3 // own.heads)
        attended = operations.attention(projected[:, :, 0], projected[:, :, 1], projected[:, :, 2])
        self._accumulate(own.to_out[0], attended.view(len(tokens), -1), tokens, len(total))
        query = self._product(cross.to_q, operations.layer_norm(tokens, block.norm2, merged.biases[1]), len(total))
        if self.sample_of_row is not None:
            total, tokens, query = self._expand_to_rows(total, skips, tokens, query)
        query, keys, values = (
            one.unflatten(-1, (cross.heads, -1))
            for one in (
                query.view(-1, num_tokens, query.shape[1]),
                self.prompts[..., self.kernels.keys_of(cross)],
                self.prompts[..., self.kernels.values_of(cross)],
            )
        )
        attended = operations.attention(query, keys, values)
        self._accumulate(cross.to_out[0], attended.view(len(tokens), -1), tokens, len(total))
        self._feed_forward(block, operations.layer_norm(tokens, block.norm3, merged.biases[2]), tokens, len(total))
        return tokens, total

    def _query_key_value(self, own: nn.Module, merged: MergedBlock, normed: torch.Tensor, num_entries: int) -> torch.Tensor:
        """Tokens × (3 · channels). `num_entries` are the samples, or rows, whose tokens are next to each other."""
        return linear(normed, merged.query_key_value)

    def _feed_forward(self, block: BasicTransformerBlock, normed: torch.Tensor, tokens: torch.Tensor, num_entries: int) -> None:
        """In place: it is added to the tokens."""
        widened = block.ff.net[0].proj
        tokens.addmm_(self.kernels.operations.linear_geglu(normed, widened.weight, widened.bias), block.ff.net[2].weight.t())

    def _product(
        self, layer: nn.Module, inputs: torch.Tensor, num_entries: int, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The layer's outputs, with this bias."""
        return linear(inputs, layer.weight.flatten(1), bias)  # type: ignore[operator]

    def _accumulate(self, layer: nn.Module, inputs: torch.Tensor, into: torch.Tensor, num_entries: int) -> None:
        """Add the layer's outputs without its bias, in place."""
        into.addmm_(inputs, layer.weight.flatten(1).t())  # type: ignore[operator]

    def _project_out(
        self, transformer: Transformer2DModel, merged: MergedTransformer, tokens: torch.Tensor, total: torch.Tensor
    ) -> None:
        """Add the transformer's outputs to `total`, in place. What the tokens lack is in `merged.after` already."""
        self._accumulate(transformer.proj_out, tokens, tokens_of(total), len(total))

    def _expand_to_rows(self, total: torch.Tensor, skips: list[Image], *tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The activations with one entry per row instead of one per sample; so is all that comes after."""
        rows, self.sample_of_row = self.sample_of_row, None
        assert rows is not None
        num_samples = len(self.timestep_embeds)

        def taken(one: torch.Tensor) -> torch.Tensor:
            return one.reshape(num_samples, -1).index_select(0, rows).view(-1, one.shape[-1])

        self.timestep_embeds = self.timestep_embeds.index_select(0, rows)
        for skip in skips:
            value = skip.value()
            skip.image = skip.total = image_of(taken(tokens_of(value)), value)
        return image_of(taken(tokens_of(total)), total), *map(taken, tokens)


class FusedKernels(NativeKernels):
    """Implements `mii_serve.engine.kernels.KernelSet`. It takes the UNet's attention weights into one tensor for each block.

    A subclass may compute the blocks of the transformers in another way (`fused_pass`, `_merge`).
    """

    fused_pass: type[FusedPass] = FusedPass

    def __init__(
        self,
        unet: Any,
        operations: Operations,
        *,
        sampler: SamplerKernels | None = None,
        max_latent_pixels_per_call: int | None = None,
    ) -> None:
        """`unet` is in channels last, and `why_not_fusible` returns None for it."""
        super().__init__(unet, max_latent_pixels_per_call=max_latent_pixels_per_call)
        self.operations = operations
        self.sampler = sampler or TorchSampler()
        self._transformers = {one: self._merge(one) for one in unet.modules() if isinstance(one, Transformer2DModel)}
        self._first_biases = torch.cat([resnet.conv1.bias for resnet in self._resnets])
        self._end_biases = {resnet: end_bias(resnet) for resnet in self._resnets}
        upsamplers = (one for one in unet.modules() if isinstance(one, Upsample2D))
        self._upsamplings = {one: Upsampling(one.conv.weight) for one in upsamplers}

    def embed_timesteps(self, timesteps: torch.Tensor, guidance: torch.Tensor | None = None) -> torch.Tensor:
        """See `KernelSet`: with the bias of the convolution before it."""
        return super().embed_timesteps(timesteps, guidance) + self._first_biases

    def predict_noise(
        self,
        model_input: torch.Tensor,
        timestep_embeds: torch.Tensor,
        prompts: torch.Tensor,
        sample_of_row: torch.Tensor | None = None,
        loras: CallLoras | None = None,
    ) -> torch.Tensor:
        """See `KernelSet`."""
        forward_pass: FusedPass | LoraPass
        if loras is None:
            forward_pass = self.fused_pass(self, timestep_embeds, prompts, sample_of_row)
        elif isinstance(loras, LoraRows):
            from mii_serve.engine.kernels.fused.loras import FusedLoraPass  # it extends what is defined here

            forward_pass = FusedLoraPass(self, timestep_embeds, prompts, sample_of_row, loras=loras)
        else:  # not fused: its convolutions change, and add their own biases
            forward_pass = LoraPass(self, timestep_embeds - self._first_biases, prompts, sample_of_row, loras=loras)
        return forward_pass.run(self._unet, model_input, self._halvings)

    def _merge(self, transformer: Transformer2DModel) -> MergedTransformer:
        blocks: list[MergedBlock] = []
        bias: torch.Tensor | None = None
        for block in transformer.transformer_blocks:
            own, cross = block.attn1, block.attn2
            weights = torch.cat((own.to_q.weight, own.to_k.weight, own.to_v.weight))
            for layer, part in zip((own.to_q, own.to_k, own.to_v), weights.chunk(3), strict=True):
                layer.weight = nn.Parameter(part, requires_grad=False)  # the same memory, not twice
            first = bias
            second = _added(first, own.to_out[0].bias)
            third = _added(second, cross.to_out[0].bias)
            bias = _added(third, block.ff.net[2].bias)
            blocks.append(MergedBlock(weights, (first, second, third)))
        out = transformer.proj_out
        assert bias is not None
        return MergedTransformer(tuple(blocks), out.weight.flatten(1).float() @ bias + out.bias.float(), bias)

    def merged(self, transformer: Transformer2DModel) -> MergedTransformer:
        return self._transformers[transformer]

    def upsampling_of(self, upsampler: Upsample2D) -> Upsampling:
        return self._upsamplings[upsampler]

    def end_bias_of(self, resnet: ResnetBlock2D) -> torch.Tensor:
        return self._end_biases[resnet]


def normalized(
    operations: Operations, hidden: Image, norm: Any, **how: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """The GroupNorm of an image, whatever is still to be added to it."""
    if hidden.total is not None:
        return operations.group_norm(hidden.total, norm, **how)
    return operations.group_norm(hidden.image, norm, bias=hidden.bias, residual=hidden.residual, **how)


def residual_block(
    operations: Operations,
    resnet: ResnetBlock2D,
    hidden: Image,
    bias: torch.Tensor,
    last_bias: torch.Tensor,
    skip: torch.Tensor | None = None,
) -> Image:
    """`bias` follows the first convolution, C or N × C numbers; `last_bias` is what `end_bias` returns.

    The sum that `hidden` stands for is kept in it: it may be a skip connection.
    """
    normed, total = normalized(operations, hidden, resnet.norm1, is_silu=True, other=skip, keeps_total=True)
    assert total is not None
    if skip is None:
        hidden.total = total
    image = convolved_twice(operations, resnet, normed, bias)
    if resnet.conv_shortcut is None:
        return Image(image, last_bias, total)
    tokens_of(image).addmm_(tokens_of(total), resnet.conv_shortcut.weight.flatten(1).t())
    return Image(image, last_bias)


def convolved_twice(operations: Operations, resnet: ResnetBlock2D, normed: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A residual block without its first norm, its second bias and its residual."""
    image = convolved(resnet.conv1, normed).image
    normed, _ = operations.group_norm(image, resnet.norm2, is_silu=True, bias=bias)
    return convolved(resnet.conv2, normed).image


def end_bias(resnet: ResnetBlock2D) -> torch.Tensor:
    """What is the same for all pixels in a residual block's sum."""
    bias = resnet.conv2.bias.to(torch.float32, copy=True)
    return bias if resnet.conv_shortcut is None else bias + resnet.conv_shortcut.bias


def convolved(layer: nn.Conv2d, image: torch.Tensor) -> Image:
    """Its bias is still to be added."""
    made = conv2d(image, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return Image(in_channels_last(made), layer.bias)


def upsampled(operations: Operations, layer: Upsampling, upsampler: Upsample2D, hidden: Image) -> Image:
    """An image twice as high and wide, whatever is still to be added to it, and convolved."""
    if hidden.total is not None:
        return Image(operations.upsample(hidden.total, layer), upsampler.conv.bias)
    return Image(operations.upsample(hidden.image, layer, hidden.bias, hidden.residual), upsampler.conv.bias)


def why_not_fusible(unet: Any) -> str | None:
    """What `FusedKernels` does not implement of a UNet that `NativeKernels` does; None when nothing."""
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock):
            if any(one.to_q.bias is not None or one.to_k.bias is not None for one in (module.attn1, module.attn2)):
                return "its attentions' projections have biases"
            if type(module.ff.net[0]).__name__ != "GEGLU":
                return f"a feed-forward part of type {type(module.ff.net[0]).__name__}"
        if isinstance(module, ResnetBlock2D) and not has_plain_shortcut(module):
            return "a shortcut that is no linear layer of the channels"
        if isinstance(module, Upsample2D) and not is_plain_upsampler(module):
            return "an upsampling that is not a plain one"
    return None


def is_plain_upsampler(upsampler: Upsample2D) -> bool:
    """Each pixel four times, then a convolution of 3 × 3."""
    layer = upsampler.conv
    is_usual = upsampler.norm is None and not upsampler.use_conv_transpose and upsampler.interpolate
    return (
        is_usual and type(layer) is nn.Conv2d and (layer.kernel_size, layer.padding, layer.stride) == ((3, 3), (1, 1), (1, 1))
    )


def has_plain_shortcut(resnet: ResnetBlock2D) -> bool:
    """A linear layer of the channels, or none."""
    layer = resnet.conv_shortcut
    return layer is None or (layer.kernel_size == (1, 1) and layer.bias is not None)


def _added(bias: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    other = other.to(torch.float32, copy=True)
    return other if bias is None else bias + other
