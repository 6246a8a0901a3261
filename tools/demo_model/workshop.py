"""What the stages share: the working folder, the ranks, the pictures on disk and progress lines."""

from __future__ import annotations

import os
import pickle
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.multiprocessing.spawn import spawn

from .world import Scene, render_array, sample_scene

VAE_SCALING_FACTOR = 0.18215
"""Stable Diffusion v1's; the VAE is rescaled after training so that this very number is right for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Step counts of the full recipe. `scaled` shortens all of them for a smoke test."""

    num_pictures: int = 48_000
    num_decoded: int = 8_192
    text_steps: int = 450
    vae_steps: int = 6_500
    decoder_steps: int = 1_500
    unet_steps: int = 7_000
    safety_steps: int = 4_000

    def scaled(self, factor: float) -> Recipe:
        return Recipe(**{name: max(64, int(getattr(self, name) * factor)) for name in self.__slots__})


@dataclass(frozen=True, slots=True)
class Workshop:
    """One rank's view of the run: its folder of intermediate results and its seat among the ranks."""

    folder: Path
    recipe: Recipe
    rank: int
    num_ranks: int

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed * 1000 + self.rank)

    def random(self, seed: int) -> random.Random:
        return random.Random(seed * 1000 + self.rank)

    def is_first(self) -> bool:
        return self.rank == 0

    def pictures(self) -> np.ndarray:
        """All training pictures, uint8, N × 64 × 64 × 3, memory-mapped."""
        return np.load(self.folder / "pictures.npy", mmap_mode="r")

    def scenes(self) -> list[Scene]:
        scenes: list[Scene] = pickle.loads((self.folder / "scenes.pkl").read_bytes())
        return scenes

    def gather_arrays(self, name: str, part: np.ndarray) -> None:
        """Write every rank's part of an array, in rank order, as one file `name`.npy."""
        np.save(self.folder / f"{name}.{self.rank}.npy", part)
        dist.barrier()
        if self.is_first():
            parts = [self.folder / f"{name}.{rank}.npy" for rank in range(self.num_ranks)]
            np.save(self.folder / f"{name}.npy", np.concatenate([np.load(path) for path in parts]))
            for path in parts:
                path.unlink()
        dist.barrier()

    def share(self, count: int) -> range:
        """This rank's consecutive share of `count` pictures."""
        per_rank = count // self.num_ranks
        return range(self.rank * per_rank, (self.rank + 1) * per_rank)


class Progress:
    """Prints a line now and then, from the first rank only, with a moving average of the loss."""

    def __init__(self, shop: Workshop, stage: str, total: int, every_s: float = 30.0) -> None:
        self._quiet, self._stage, self._total, self._every_s = not shop.is_first(), stage, total, every_s
        self._start = self._last = time.monotonic()
        self._loss: float | None = None

    def __call__(self, step: int, loss: float, note: str = "") -> None:
        self._loss = loss if self._loss is None else 0.98 * self._loss + 0.02 * loss
        now = time.monotonic()
        if self._quiet or (now - self._last < self._every_s and step + 1 < self._total):
            return
        self._last = now
        print(f"{self._stage} {step + 1}/{self._total} {now - self._start:.0f} s loss {self._loss:.4f} {note}", flush=True)


def as_images(pictures: np.ndarray) -> torch.Tensor:
    """uint8 N × H × W × 3 to float32 N × 3 × H × W in [-1, 1]."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def as_pictures(images: torch.Tensor) -> np.ndarray:
    """The inverse of `as_images`, clamped and rounded."""
    array: np.ndarray = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    return array


def make_pictures(shop: Workshop) -> None:
    """Stage `data`: draw the training pictures and remember their scenes."""
    rng = shop.random(7)
    scenes = [sample_scene(rng) for _ in shop.share(shop.recipe.num_pictures)]
    shop.gather_arrays("pictures", np.stack([render_array(scene, rng) for scene in scenes]))
    all_scenes: list[list[Scene]] = [[] for _ in range(shop.num_ranks)]
    dist.all_gather_object(all_scenes, scenes)
    if shop.is_first():
        (shop.folder / "scenes.pkl").write_bytes(pickle.dumps([scene for part in all_scenes for scene in part]))


def contact_sheet(pictures: list[Image.Image], columns: int, path: Path, zoom: int = 2) -> None:
    """Paste equally large pictures into one PNG."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", (width * columns, height * -(-len(pictures) // columns)), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.Resampling.NEAREST).save(path)


def run_ranks(stage: Callable[[Workshop], None], folder: Path, recipe: Recipe, num_ranks: int) -> None:
    """Run one stage on `num_ranks` single-thread processes joined by gloo, and wait for all of them."""
    rendezvous = folder / f"rendezvous.{os.getpid()}"
    rendezvous.unlink(missing_ok=True)
    spawn(_rank_main, (stage, folder, recipe, num_ranks, rendezvous), nprocs=num_ranks)
    rendezvous.unlink(missing_ok=True)


def _rank_main(
    rank: int, stage: Callable[[Workshop], None], folder: Path, recipe: Recipe, num_ranks: int, rendezvous: Path
) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_ranks)
    try:
        stage(Workshop(folder, recipe, rank, num_ranks))
        dist.barrier()
    finally:
        dist.destroy_process_group()
