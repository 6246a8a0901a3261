"""What the ranks of a sharded UNet send each other in a call, from the UNet's configuration alone. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Of one UNet call: its all-reduces, and the bytes of the tensors they sum, on each rank."""

    num_all_reduces: int
    num_bytes: int


def traffic_of_call(
    config: Mapping[str, Any], *, num_samples: int, num_rows: int, height: int, width: int, bytes_per_value: int
) -> Traffic:
    """Of a call of `ShardedKernels.predict_noise` with latents of `height` × `width`, whatever the number of ranks.

    `config` is that of a UNet for which `why_unsupported` returns None. Up to the first cross-attention the activations have
    one entry per sample, from there on one per row.
    """
    sizes = list(_sums(config, num_samples, num_rows, height, width))
    return Traffic(num_all_reduces=len(sizes), num_bytes=sum(sizes) * bytes_per_value)


def _sums(config: Mapping[str, Any], num_samples: int, num_rows: int, height: int, width: int) -> Iterator[int]:
    """The number of values in each all-reduce, in order."""
    num_entries = num_samples
    for channels, halvings, num_transformer_blocks in _layers(config):
        num_values = channels * _halved(height, halvings) * _halved(width, halvings)
        yield num_entries * num_values  # the second convolution of the residual block
        for _ in range(num_transformer_blocks):
            yield num_entries * num_values  # self-attention
            num_entries = num_rows
            yield num_entries * num_values  # cross-attention
            yield num_entries * num_values  # feed-forward


def _layers(config: Mapping[str, Any]) -> Iterator[tuple[int, int, int]]:
    """Each residual block in order: its channels, how often the latents are halved there, the transformer blocks after it."""
    channels = config["block_out_channels"]
    last = len(channels) - 1
    resnets = _per_block(config.get("layers_per_block", 2), len(channels))
    transformers = _per_block(config.get("transformer_layers_per_block", 1), len(channels))
    for level, kind in enumerate(config["down_block_types"]):
        for _ in range(resnets[level]):
            yield channels[level], level, transformers[level] if "CrossAttn" in kind else 0
    if config.get("mid_block_type", "UNetMidBlock2DCrossAttn") is not None:
        yield channels[last], last, transformers[last]
        yield channels[last], last, 0
    for level, kind in zip(range(last, -1, -1), config["up_block_types"], strict=True):
        for _ in range(resnets[level] + 1):
            yield channels[level], level, transformers[level] if "CrossAttn" in kind else 0


def _per_block(value: int | Sequence[int], num_blocks: int) -> Sequence[int]:
    return [value] * num_blocks if isinstance(value, int) else value


def _halved(side: int, times: int) -> int:
    """A convolution with stride 2 rounds up."""
    for _ in range(times):
        side = -(-side // 2)
    return side
