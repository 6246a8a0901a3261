"""The VAE's decoder with operations fused, in the place of the decoder of a diffusers `AutoencoderKL`.

Folded as in `forward.py`, and in channels last. What the decoder computes in another precision, as for an image that overflows
in float16, is computed by its own modules.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from torch.nn.functional import linear

from mii_serve.engine.kernels.fused.forward import (
    Image,
    convolved,
    convolved_twice,
    end_bias,
    has_plain_shortcut,
    is_plain_upsampler,
    normalized,
    residual_block,
    upsampled,
)
from mii_serve.engine.kernels.fused.operations import Operations, Upsampling, in_channels_last, tokens_of

KNOWN_BLOCKS = {"UpDecoderBlock2D"}


def why_vae_not_fusible(vae: Any) -> str | None:
    """What `FusedDecoder` does not implement of a VAE; None when nothing."""
    decoder = vae.decoder
    if type(decoder) is not Decoder:
        return f"a decoder of type {type(decoder).__name__}"
    for block in decoder.up_blocks:
        if (kind := type(block).__name__) not in KNOWN_BLOCKS:
            return f"a block of type {kind}"
    for module in decoder.modules():
        if isinstance(module, ResnetBlock2D) and not _is_plain_resnet(module):
            return "a residual block that is not a plain one"
        if isinstance(module, Upsample2D) and not is_plain_upsampler(module):
            return "an upsampling that is not a plain one"
        if isinstance(module, Attention) and not _is_plain_attention(module):
            return "an attention that is not a plain one"
    if type(decoder.conv_norm_out) is not nn.GroupNorm or type(decoder.conv_act) is not nn.SiLU:
        return f"a last norm of type {type(decoder.conv_norm_out).__name__}"
    return None


def _is_plain_resnet(resnet: ResnetBlock2D) -> bool:
    is_silu = type(resnet.nonlinearity) is nn.SiLU
    return is_silu and resnet.time_emb_proj is None and resnet.output_scale_factor == 1.0 and has_plain_shortcut(resnet)


def _is_plain_attention(attention: Attention) -> bool:
    has_norm_and_residual = attention.group_norm is not None and attention.residual_connection
    is_usual = type(attention.processor) is AttnProcessor2_0 and attention.rescale_output_factor == 1.0
    return has_norm_and_residual and is_usual and attention.to_q.bias is not None


class FusedDecoder(nn.Module):
    """Takes the place of `AutoencoderKL.decoder`."""

    def __init__(self, decoder: Any, operations: Operations) -> None:
        """`decoder` is of a VAE for which `why_vae_not_fusible` returns None, in channels last and in half precision."""
        super().__init__()
        self.decoder = decoder
        self.dtype = decoder.conv_in.weight.dtype
        self._operations = operations
        # Kept out of the module's parameters: they stay as they are where those are cast.
        self._constants: dict[nn.Module, Any] = {}
        for module in decoder.modules():
            if isinstance(module, ResnetBlock2D):
                self._constants[module] = end_bias(module)
            elif isinstance(module, Upsample2D):
                self._constants[module] = Upsampling(module.conv.weight)
            elif isinstance(module, Attention):
                layers = module.to_q, module.to_k, module.to_v
                self._constants[module] = torch.cat([layer.weight for layer in layers]), torch.cat([one.bias for one in layers])

    def forward(self, sample: torch.Tensor, latent_embeds: torch.Tensor | None = None) -> torch.Tensor:
        """As the decoder's own: N × channels × H/8 × W/8 to N × 3 × H × W."""
        if sample.dtype != self.dtype or latent_embeds is not None:
            return self.decoder(sample, latent_embeds)
        decoder = self.decoder
        hidden = convolved(decoder.conv_in, in_channels_last(sample))
        hidden = self._resnet(decoder.mid_block.resnets[0], hidden)
        for attention, resnet in zip(decoder.mid_block.attentions, decoder.mid_block.resnets[1:], strict=True):
            if attention is not None:
                hidden = self._attention(attention, hidden)
            hidden = self._resnet(resnet, hidden)
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                hidden = self._resnet(resnet, hidden)
            for upsampler in block.upsamplers or ():
                hidden = upsampled(self._operations, self._constants[upsampler], upsampler, hidden)
        normed, _ = normalized(self._operations, hidden, decoder.conv_norm_out, is_silu=True)
        return decoder.conv_out(normed)

    def _resnet(self, resnet: ResnetBlock2D, hidden: Image) -> Image:
        """Where nothing but a bias is still to be added to its input, it is left to what comes after the block."""
        last_bias = self._constants[resnet]
        if hidden.bias is None or hidden.residual is not None:
            return residual_block(self._operations, resnet, hidden, resnet.conv1.bias, last_bias)
        normed, _ = self._operations.group_norm(hidden.image, resnet.norm1, is_silu=True, bias=hidden.bias)
        image = convolved_twice(self._operations, resnet, normed, resnet.conv1.bias)
        if resnet.conv_shortcut is None:
            return Image(image, last_bias + hidden.bias.float(), hidden.image)
        weight = resnet.conv_shortcut.weight.flatten(1)
        tokens_of(image).addmm_(tokens_of(hidden.image), weight.t())
        return Image(image, torch.addmv(last_bias, weight.float(), hidden.bias.float()))

    def _attention(self, attention: Attention, hidden: Image) -> Image:
        out = attention.to_out[0]
        normed, total = normalized(
            self._operations, hidden, attention.group_norm, is_silu=False, after=out.bias, keeps_total=True
        )
        assert total is not None
        weight, bias = self._constants[attention]
        query, key, value = (
            linear(tokens_of(normed), weight, bias)
            .view(len(normed), -1, 3, attention.heads, len(weight) // 3 // attention.heads)
            .unbind(2)
        )
        attended = self._operations.attention(query, key, value)
        tokens_of(total).addmm_(attended.view(-1, len(weight) // 3), out.weight.t())
        return Image(total)
