"""Optimisation shared by every training stage: Muon for matrices, gradients averaged over single-thread ranks.

Two single-thread processes joined by gloo use two CPU cores better than two threads in one process do.
Muon orthogonalises the momentum of each weight matrix (K. Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/);
at this scale it needs several times fewer steps than AdamW alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

NamedParameter = tuple[str, torch.nn.Parameter]


def _orthogonalise(matrix: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Newton-Schulz iteration towards the nearest matrix with singular values near one."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(rounds):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon:
    """Muon for the parameters `is_matrix` picks, AdamW for the others; one object, one step."""

    def __init__(
        self,
        parameters: Sequence[NamedParameter],
        is_matrix: Callable[[str, torch.nn.Parameter], bool],
        *,
        lr: float,
        adam_lr: float,
        adam_betas: tuple[float, float] = (0.9, 0.98),
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        self._matrices = [p for name, p in parameters if is_matrix(name, p)]
        self._others = [p for name, p in parameters if not is_matrix(name, p)]
        self._momenta = [torch.zeros_like(p) for p in self._matrices]
        self._adam = torch.optim.AdamW(self._others, lr=adam_lr, betas=adam_betas, weight_decay=1e-4)
        self._lr, self._adam_lr = lr, adam_lr
        self._momentum, self._weight_decay = momentum, weight_decay

    def zero_grad(self) -> None:
        for parameter in (*self._matrices, *self._others):
            parameter.grad = None

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Take one step with both learning rates scaled by `factor`."""
        for group in self._adam.param_groups:
            group["lr"] = self._adam_lr * factor
        self._adam.step()
        lr = self._lr * factor
        for parameter, update in zip(self._matrices, self._updates(), strict=True):
            scale = max(1.0, update.size(0) / update.size(1)) ** 0.5
            parameter.mul_(1 - lr * self._weight_decay).add_(update.view_as(parameter), alpha=-lr * scale)

    def _updates(self) -> list[torch.Tensor]:
        """Orthogonalised momenta; the work is shared out over the ranks, largest matrices balanced."""
        rank, load = dist.get_rank(), [0] * dist.get_world_size()
        flat = torch.zeros(sum(p.numel() for p in self._matrices))
        views, offset = [], 0
        for parameter, momentum in zip(self._matrices, self._momenta, strict=True):
            gradient = parameter.grad
            assert gradient is not None
            view = flat[offset : offset + parameter.numel()].view(parameter.size(0), -1)
            views.append(view)
            offset += parameter.numel()
            owner = load.index(min(load))
            short, long = sorted(view.shape)
            load[owner] += short * short * long
            momentum.lerp_(gradient, 1 - self._momentum)
            if owner == rank:
                view.copy_(_orthogonalise(gradient.lerp(momentum, self._momentum).view(view.shape)))
        dist.all_reduce(flat)
        return views


class GradientAverage:
    """Averages gradients, and one number to report, over the ranks in a single reduction."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._buffer = torch.zeros(sum(p.numel() for p in self._parameters) + 1)

    def __call__(self, report: float) -> float:
        offset = 0
        for parameter in self._parameters:
            part = self._buffer[offset : offset + parameter.numel()]
            part.zero_() if parameter.grad is None else part.copy_(parameter.grad.reshape(-1))
            offset += parameter.numel()
        self._buffer[-1] = report
        dist.all_reduce(self._buffer)
        self._buffer /= dist.get_world_size()
        offset = 0
        for parameter in self._parameters:
            parameter.grad = self._buffer[offset : offset + parameter.numel()].view_as(parameter).clone()
            offset += parameter.numel()
        return float(self._buffer[-1])


def learning_rate(step: int, total: int, *, warmup: int = 40, hold: float = 0.0) -> float:
    """Linear warm-up, flat until `hold` of the run, then a cosine down to 2 %."""
    progress = min(1.0, step / total)
    decay = 1.0 if progress < hold else 0.5 * (1 + math.cos(math.pi * (progress - hold) / (1 - hold)))
    return min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * decay)
