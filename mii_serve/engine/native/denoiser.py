"""One UNet call for many samples: everything between "these samples make their next step" and their new state.

On CUDA the declared sizes of the lattice are captured as graphs, and a turn that fits one is a single replay; other turns are
made kernel by kernel and counted. What the graph replays, `_make`, is the same code that runs without one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mii_serve.engine.native.lattice import TurnSize, choose
from mii_serve.engine.native.slots import SlotBank
from mii_serve.engine.native.turn import Move, Turn, size_of
from mii_serve.engine.native.unet import RowUNet
from mii_serve.samplers.update import step

logger = logging.getLogger(__name__)

Shape = tuple[int, int]
Made = tuple[torch.Tensor, torch.Tensor]
"""What the UNet got and what it predicted after guidance, both N × channels × height × width in float32."""

NUM_PRACTICE_RUNS = 2
"""Before a capture: libraries choose their kernels and take their workspace in the first calls."""


class Denoiser:
    """Holds the samplers' state of every latent shape in use, and steps it."""

    def __init__(
        self,
        unet: RowUNet,
        *,
        max_slots: int,
        num_channels: int,
        dtype: torch.dtype,
        key_values: torch.Tensor,
        time_projections: torch.Tensor,
        lattice: Sequence[TurnSize] = (),
        max_cells_per_call: int | None = None,
    ) -> None:
        """`key_values` and `time_projections` are the banks that the moves point into.

        `max_cells_per_call` is the largest call the kernels have room for; one sample always fits.
        """
        self._unet = unet
        self._max_slots = max_slots
        self._num_channels = num_channels
        self._dtype = dtype
        self._device = key_values.device
        self._key_values = key_values
        self._time_projections = time_projections
        self._lattice = lattice
        self._banks: dict[Shape, SlotBank] = {}
        self._prepared: dict[TurnSize, Callable[[Sequence[Move]], Made]] = {}
        self._pool: Any = None
        self.max_cells_per_call = max_cells_per_call
        self.num_graph_misses = 0

    def bank(self, shape: Shape) -> SlotBank:
        """The state of the samples of a latent shape."""
        if (bank := self._banks.get(shape)) is None:
            bank = self._banks[shape] = SlotBank(self._max_slots, (self._num_channels, *shape), self._device)
        return bank

    def tidy(self, shape: Shape) -> None:
        """Free the state of a shape that nobody has any more; captured graphs keep theirs."""
        if self._banks[shape].is_empty and not any((size.height, size.width) == shape for size in self._lattice):
            del self._banks[shape]

    def prepare(self) -> None:
        """Make every declared size ready. One that does not fit into memory is left out, and bounds the calls to come."""
        for size in self._lattice:
            if size in self._prepared or size.num_cells > (self.max_cells_per_call or size.num_cells):
                continue
            try:
                self._prepared[size] = self._capture(size)
            except torch.OutOfMemoryError:
                self._shrink(size.num_cells - 1)

    def step(self, moves: Sequence[Move], shape: Shape) -> Made:
        """Step the samples in as few UNet calls as memory allows, halving them until it does.

        Raises:
            torch.OutOfMemoryError: not even one sample fits.
        """
        made: list[Made] = []
        done = 0
        while done < len(moves):
            now = self._first_call(moves[done:], shape)
            try:
                made.append(self._call(now, shape))
            except torch.OutOfMemoryError:
                if len(now) == 1:
                    raise
                self._shrink(size_of(now[: len(now) // 2], *shape).num_cells)
                continue
            done += len(now)
        return made[0] if len(made) == 1 else (torch.cat([m[0] for m in made]), torch.cat([m[1] for m in made]))

    def _first_call(self, moves: Sequence[Move], shape: Shape) -> Sequence[Move]:
        count = len(moves)
        while count > 1 and self.max_cells_per_call and size_of(moves[:count], *shape).num_cells > self.max_cells_per_call:
            count -= 1
        return moves[:count]

    def _call(self, moves: Sequence[Move], shape: Shape) -> Made:
        size = size_of(moves, *shape)
        if (declared := choose(self._prepared, size)) is not None:
            made = self._prepared[declared](moves)
            return made[0][: len(moves)], made[1][: len(moves)]
        self.num_graph_misses += bool(self._lattice)
        turn = Turn(size, self._num_channels, self._device)
        turn.fill(moves, self.bank(shape).padding_slot)
        return self._make(turn)

    def _make(self, turn: Turn) -> Made:
        """The turn itself: reads and writes tensors on the device, nothing else."""
        state = self._banks[turn.size.height, turn.size.width].state
        before = state[turn.slots]
        model_input = before[:, 0] * turn.input_scale[:, None, None, None]
        shares = turn.size.num_rows > turn.size.num_samples
        answer = self._unet(
            model_input.to(self._dtype, memory_format=torch.channels_last),
            self._time_projections[turn.times],
            self._key_values[turn.prompts],
            turn.sample_of_row if shares else None,
        ).float()
        prediction = answer[: turn.size.num_samples]
        if shares:
            uncond = answer[turn.uncond_row]
            prediction = uncond + turn.guidance_scale[:, None, None, None] * (prediction - uncond)
        state[turn.slots] = step(before, prediction, turn.noise, turn.matrices)
        return model_input, prediction

    def _capture(self, size: TurnSize) -> Callable[[Sequence[Move]], Made]:
        """A function that makes a turn of this size. What it returns is the caller's own, not the graph's to overwrite."""
        bank, turn = self.bank((size.height, size.width)), Turn(size, self._num_channels, self._device)
        turn.fill((), bank.padding_slot)
        replay, made = self._record(turn)

        def make(moves: Sequence[Move]) -> Made:
            turn.fill(moves, bank.padding_slot)
            replay()
            return made[0].clone(), made[1].clone()

        return make

    def _record(self, turn: Turn) -> tuple[Callable[[], None], Made]:
        """What makes the turn again, always into the same tensors. On a CPU there is no graph, and the tensors are kept all
        the same: what is wrong with sharing them shows there too.
        """
        if self._device.type != "cuda":
            kept = torch.zeros_like(turn.noise), torch.zeros_like(turn.noise)

            def make_again() -> None:
                for tensor, fresh in zip(kept, self._make(turn), strict=True):
                    tensor.copy_(fresh)

            return make_again, kept

        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(NUM_PRACTICE_RUNS):
                self._make(turn)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=stream):
            made = self._make(turn)
        return graph.replay, made

    def _shrink(self, max_cells: int) -> None:
        self.max_cells_per_call = min(max_cells, self.max_cells_per_call or max_cells)
        self._prepared = {size: make for size, make in self._prepared.items() if size.num_cells <= self.max_cells_per_call}
        logger.warning("out of memory; UNet calls are now at most %d rows × cells", self.max_cells_per_call)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
