"""Our own kernel set for a UNet that is sharded over the ranks of a group (tensor parallelism).

Every rank holds its part of the weights (`models/tensor_parallel.py`) and makes the same calls in the same order. Activations
between the blocks are whole and equal on all ranks, to the bit; inside a block a rank computes its own heads or channels. The
layer at the end of each block takes in those alone, so that its outputs are partial sums: an all-reduce adds them, one in a
residual block, three in a transformer block. What is kept of prompts and timesteps is the rank's part too, and takes no
communication.

A call does not wait for the device, so it can be captured as a CUDA graph if `SummingGroup.all_reduce` can. **It has not been
captured, nor run on a GPU at all, yet.**
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from mii_serve.engine.kernels.native import NativeKernels
from mii_serve.errors import EngineError


class SummingGroup(Protocol):
    """The ranks of one replica, which make the same calls in the same order, with tensors of the same shapes and dtypes."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous tensor by its sum over the ranks, in place; each rank gets the same bits.

        On CUDA the work goes to the current stream, and the host does not wait for it.
        """
        ...


class ShardedKernels(NativeKernels):
    """Implements `mii_serve.engine.kernels.KernelSet` for one rank; `predict_noise` is a call of all ranks together.

    A rank on which `predict_noise` fails has left the group's order: the others wait for it, and the group cannot go on.
    """

    def __init__(self, unet: Any, group: SummingGroup, *, max_latent_pixels_per_call: int | None = None) -> None:
        """`unet` is this rank's shard of a UNet for which `why_unsupported` returns None; it is changed in place.

        The group need not be connected before the first call. NCCL makes its communicator in the first collective, which must
        not be a captured one.

        Raises:
            EngineError: the UNet is not sharded over so many ranks.
        """
        super().__init__(unet, max_latent_pixels_per_call=max_latent_pixels_per_call)
        width = unet.up_blocks[0].resnets[-1].conv2.in_channels * group.size
        if width != unet.config.block_out_channels[-1]:
            raise EngineError(f"the UNet is not sharded over {group.size} ranks")
        for module in list(unet.modules()):
            match module:
                case BasicTransformerBlock():
                    for attention in (module.attn1, module.attn2):
                        attention.to_out[0] = _SummedLayer(attention.to_out[0], group)
                    module.ff.net[2] = _SummedLayer(module.ff.net[2], group)
                case ResnetBlock2D():
                    module.conv2 = _SummedLayer(module.conv2, group)

    @property
    def lora_layout(self) -> None:
        """A rank has only some of the inputs or outputs of the layers that LoRAs change."""


class _SummedLayer(nn.Module):
    """A linear layer or convolution of which each rank holds some of the inputs. The first rank adds the bias."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, group: SummingGroup) -> None:
        super().__init__()
        if group.rank > 0:
            layer.bias = None
        self._layer = layer
        self._group = group

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        partial = self._layer(inputs)
        if partial.dim() == 4 and partial.is_contiguous(memory_format=torch.channels_last):
            in_order = partial.permute(0, 2, 3, 1)
        else:
            in_order = partial = partial.contiguous()
        self._group.all_reduce(in_order)
        return partial
