"""A kernel set that computes each UNet call on several ranks, each some of its rows, with any kernel set on each rank.

A guided sample alone is split into its two rows, which others call classifier-free guidance parallelism; with many samples each
rank computes some of them, which is data parallelism. The weights are whole on every rank. After each call one all-gather gives
every rank all predictions, so that all of them hold the same bits before and after.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from mii_serve.engine.kernels import KernelSet
from mii_serve.engine.kernels.loras import CallLoras
from mii_serve.engine.kernels.shares import Share, shares
from mii_serve.models.architecture import INPAINTING_CHANNELS, LATENT_CHANNELS
from mii_serve.types import EngineName


class GatheringGroup(Protocol):
    """The ranks of one replica, which make the same calls in the same order, with tensors of the same shapes and dtypes."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks one after the other along the first dimension; each rank gets the same bits."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """This rank's part of a call of N samples and R rows, as indices on the device.

    `num_sent` predictions are sent by each rank, the last ones as padding where its share is smaller. `place_of_row` says where
    each of the R rows is among all that were sent.
    """

    num_own: int
    num_sent: int
    rows: torch.Tensor
    samples: torch.Tensor
    sample_of_row: torch.Tensor | None
    place_of_row: torch.Tensor


class RowParallelKernels:
    """Implements `mii_serve.engine.kernels.KernelSet` for one rank of a group. All ranks make the same calls in the same order.

    The guided samples of a call come first, see `shares`. Which rows are this rank's depends on the number of samples and rows
    alone, so a captured call is right for every batch of its shape.
    """

    def __init__(self, kernels: KernelSet, group: GatheringGroup) -> None:
        """`kernels` compute this rank's rows, and are closed with this."""
        self._kernels = kernels
        self._group = group
        self._calls: dict[tuple[int, int], _Call] = {}
        self.name: EngineName = kernels.name
        self.sampler = kernels.sampler
        self.prompt_width = kernels.prompt_width
        self.timestep_width = kernels.timestep_width
        self.lora_layout = kernels.lora_layout
        self.max_latent_pixels_per_call = kernels.max_latent_pixels_per_call

    def project_prompts(self, prompt_embeds: torch.Tensor) -> torch.Tensor:
        return self._kernels.project_prompts(prompt_embeds)

    def embed_timesteps(self, timesteps: torch.Tensor, guidance: torch.Tensor | None = None) -> torch.Tensor:
        return self._kernels.embed_timesteps(timesteps, guidance)

    def predict_noise(
        self,
        model_input: torch.Tensor,
        timestep_embeds: torch.Tensor,
        prompts: torch.Tensor,
        sample_of_row: torch.Tensor | None = None,
        loras: CallLoras | None = None,
    ) -> torch.Tensor:
        """See `KernelSet`; one all-gather. `sample_of_row` is what `shares` says, and is not read."""
        call = self._call(len(model_input), len(prompts), model_input.device)
        _, num_channels, *size = model_input.shape
        if num_channels == INPAINTING_CHANNELS:  # of which the UNet predicts the latents' part
            num_channels = LATENT_CHANNELS
        sent = model_input.new_zeros(call.num_sent, num_channels, *size)
        if call.num_own:
            sent[: call.num_own] = self._kernels.predict_noise(
                model_input[call.samples].contiguous(memory_format=torch.channels_last),
                timestep_embeds[call.samples],
                prompts[call.rows],
                call.sample_of_row,
                None if loras is None else loras.taken(call.samples),
            )
        return self._group.all_gather(sent)[call.place_of_row]

    def close(self) -> None:
        self._kernels.close()

    def _call(self, num_samples: int, num_rows: int, device: torch.device) -> _Call:
        """Kept: the runs before a capture make it, and the capture copies nothing from the host."""
        if (known := self._calls.get((num_samples, num_rows))) is None:
            of_ranks = shares(num_samples, num_rows, self._group.size)
            known = self._calls[num_samples, num_rows] = _call(of_ranks, self._group.rank, num_rows, device)
        return known


def _call(of_ranks: tuple[Share, ...], rank: int, num_rows: int, device: torch.device) -> _Call:
    own, num_sent = of_ranks[rank], max(len(share.rows) for share in of_ranks)
    places = {row: i * num_sent + k for i, share in enumerate(of_ranks) for k, row in enumerate(share.rows)}
    has_pairs = len(own.rows) > len(own.samples)
    return _Call(
        num_own=len(own.rows),
        num_sent=num_sent,
        rows=torch.tensor(own.rows, dtype=torch.int64, device=device),
        samples=torch.tensor(own.samples, dtype=torch.int64, device=device),
        sample_of_row=torch.tensor(own.sample_of_row, dtype=torch.int64, device=device) if has_pairs else None,
        place_of_row=torch.tensor([places[row] for row in range(num_rows)], dtype=torch.int64, device=device),
    )
