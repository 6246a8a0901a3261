#!/usr/bin/env python3
"""What the fused kernels take of a GPU's registers and shared memory, compiled for it on a machine that has none.

    python benchmarks/kernel_resources.py        a minute on a CPU

A trace of a turn and of a decode at full size gives every launch with its shapes; each different one is compiled for compute
capabilities 8.0 (A100) and 9.0 (H100, H200). A spill is a register that did not fit and went to memory.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import traced_turns
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mii_serve.bench import environment
from mii_serve.engine.kernels.fused.tiles import Tile
from mii_serve.engine.kernels.fused.triton_operations import TritonBeforeConvolution

RESULTS = Path(__file__).parent / "results" / "kernel-resources.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MAX_SHARED_BYTES = {80: 166_912, 90: 232_448}
"""What a block may ask for, by compute capability."""
REGISTERS_PER_SM = 65_536
THREADS_PER_WARP = 32
TYPES = {torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64"}
ALIGNMENT = 16
"""Bytes of a pointer, and what a number is divisible by, that Triton compiles a kernel of its own for."""


@dataclass(frozen=True, slots=True)
class Compilation:
    """All that decides what a launch is compiled to: as Triton does at run time, from the arguments of the launch."""

    kernel: Any
    tile: Tile
    signature: tuple[tuple[str, str], ...]
    aligned: frozenset[int]
    constants: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def num_options(self) -> int:
        return sum(value is True for _, value in self.constants)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """`spilled_bytes` are of a thread's local memory."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


def compilation(
    kernel: Any, tile: Tile, tensors: Sequence[torch.Tensor | None], numbers: Sequence[float], options: Mapping[str, Any]
) -> Compilation:
    there = next(tensor for tensor in tensors if tensor is not None)
    given = [*(there if tensor is None else tensor for tensor in tensors), *numbers]
    signature, aligned, constants = {}, set(), {**dict(tile.sizes), **options}
    for index, (name, argument) in enumerate(zip(kernel.arg_names, given, strict=False)):
        if isinstance(argument, torch.Tensor):
            signature[name] = f"*{TYPES[argument.dtype]}"
            is_aligned = argument.storage_offset() * argument.element_size() % ALIGNMENT == 0
        elif isinstance(argument, int):
            signature[name], is_aligned = "i32", argument % ALIGNMENT == 0
            if argument == 1:
                constants[name] = 1
        else:
            signature[name], is_aligned = "fp32", False
        if is_aligned:
            aligned.add(index)
    signature |= dict.fromkeys(constants, "constexpr")
    ordered = tuple((name, signature[name]) for name in kernel.arg_names)
    return Compilation(kernel, tile, ordered, frozenset(aligned), tuple(sorted(constants.items())))


def of_full_size(num_samples: Iterable[int] = (1, 8)) -> list[Compilation]:
    """Every different one of turns and of a decode."""
    found: dict[Compilation, None] = {}

    def launch(kernel: Any, grid: Any, tile: Tile, tensors: Any, numbers: Any, options: Any, flops: int = 0) -> None:
        found[compilation(kernel, tile, tensors, numbers, options)] = None

    for count in num_samples:
        traced_turns.native_turn(count, launch)
    traced_turns.native_decode(launch)
    traced_turns.native_decode(launch, TritonBeforeConvolution)
    return sorted(found, key=lambda one: (one.name, str(one.tile), str(one.constants)))


def one_of_each_tile(compilations: Iterable[Compilation]) -> list[Compilation]:
    """For each kernel and tile, the one that does most."""
    chosen: dict[tuple[str, Tile], Compilation] = {}
    for one in compilations:
        known = chosen.get((one.name, one.tile))
        if known is None or known.num_options < one.num_options:
            chosen[one.name, one.tile] = one
    return list(chosen.values())


def compiled(one: Compilation, capability: int) -> Resources:
    source = ASTSource(
        fn=one.kernel,
        signature=dict(one.signature),
        constexprs=dict(one.constants),
        attrs={(index,): [["tt.divisibility", ALIGNMENT]] for index in one.aligned},
    )
    options = {"num_warps": one.tile.num_warps, "num_stages": one.tile.num_stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, THREADS_PER_WARP), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return Resources(registers=registers, spilled_bytes=stack + local, shared_bytes=made.metadata.shared)


def excess(one: Compilation, capability: int, taken: Resources) -> str | None:
    """What it takes too much of; None when nothing."""
    if taken.spilled_bytes:
        return f"{taken.spilled_bytes} bytes spilled"
    if taken.shared_bytes > MAX_SHARED_BYTES[capability]:
        return f"{taken.shared_bytes} bytes of shared memory"
    if taken.registers * one.tile.num_warps * THREADS_PER_WARP > REGISTERS_PER_SM:
        return f"{taken.registers} registers for each of {one.tile.num_warps} warps"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--all", action="store_true", help="every launch, not one for each tile")
    arguments = parser.parse_args()
    rows = []
    found = of_full_size()
    for one in found if arguments.all else one_of_each_tile(found):
        for capability in MAX_SHARED_BYTES:
            taken = compiled(one, capability)
            problem = excess(one, capability, taken)
            sizes = dict(one.tile.sizes)
            rows.append({"kernel": one.name, "capability": capability, "warps": one.tile.num_warps, **sizes, **asdict(taken)})
            print(json.dumps(rows[-1]), f"TOO MUCH: {problem}" if problem else "", flush=True)
    about = environment.circumstances((*environment.PACKAGES, "triton"))
    if not arguments.all:
        arguments.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
        print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
