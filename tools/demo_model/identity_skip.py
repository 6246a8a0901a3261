"""Lets a small UNet start from "the noise is what I see", a good first guess at high noise levels.

Four channel groups of the last normalisation are reserved. Group g carries (x_g, -x_g, B, -B): its mean is zero and its
variance is nearly constant, so GroupNorm hardly changes it, and SiLU(x) - SiLU(-x) = x lets the output convolution read x_g
back exactly. The architecture stays a plain UNet2DConditionModel; only some of its weights have these values and keep them.
"""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

CONSTANT = 6.0
"""B above: large beside the latents' unit variance, small enough for float16."""


class IdentitySkip:
    """Writes the reserved weights at once; `mask_gradients` and `restore` keep them while training."""

    @torch.no_grad()
    def __init__(self, unet: UNet2DConditionModel) -> None:
        channels = unet.config.block_out_channels[0]
        size = channels // unet.config.norm_num_groups
        latent_channels = unet.config.in_channels
        assert size >= 4, "a reserved group needs four channels"
        norm, out, block = unet.conv_norm_out, unet.conv_out, unet.up_blocks[-1].resnets[-1]
        shortcut, conv = block.conv_shortcut, block.conv2
        skip_from = shortcut.weight.shape[1] - channels  # the block's input ends with conv_in's output
        rows = torch.arange(latent_channels * size)
        latent = slice(0, latent_channels)

        for parameter in (unet.conv_in.weight, unet.conv_in.bias):
            parameter[latent] = 0
        for parameter in (shortcut.weight, shortcut.bias, conv.weight, conv.bias, norm.bias):
            parameter[rows] = 0
        norm.weight[rows] = 1
        out.weight.mul_(0.1)
        out.weight[:, rows] = 0
        out.bias.zero_()
        deviation = ((2 + 2 * CONSTANT**2) / size) ** 0.5
        for g in range(latent_channels):
            first = g * size
            unet.conv_in.weight[g, g, 1, 1] = 1
            shortcut.weight[first, skip_from + g], shortcut.weight[first + 1, skip_from + g] = 1, -1
            shortcut.bias[first + 2], shortcut.bias[first + 3] = CONSTANT, -CONSTANT
            norm.weight[first : first + 2] = deviation
            out.weight[g, first, 1, 1], out.weight[g, first + 1, 1, 1] = 1, -1

        reserved = [(unet.conv_in.weight, latent), (unet.conv_in.bias, latent)]
        reserved += [(p, slice(0, len(rows))) for p in (shortcut.weight, shortcut.bias, conv.weight, conv.bias)]
        reserved += [(p, slice(0, len(rows))) for p in (norm.weight, norm.bias)]
        self._kept = [(parameter, where, parameter[where].clone()) for parameter, where in reserved]
        self._out, self._rows, self._out_kept = out.weight, rows, out.weight[:, rows].clone()

    @torch.no_grad()
    def mask_gradients(self) -> None:
        for parameter, where, _ in self._kept:
            if parameter.grad is not None:
                parameter.grad[where] = 0
        if self._out.grad is not None:
            self._out.grad[:, self._rows] = 0

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, where, value in self._kept:
            parameter[where] = value
        self._out[:, self._rows] = self._out_kept
