"""From latents to pictures: VAE, safety checker, bytes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from mii_serve.engine.decode import Decoded, decode, is_finite
from mii_serve.engine.sample_errors import not_finite
from mii_serve.engine.stage_timer import StageTimer
from mii_serve.engine.turns import TurnResult
from mii_serve.engine.upload import upload
from mii_serve.safety.checker import checker_input, flags_of, to_rgb
from mii_serve.types import Picture, SampleProgress

Place = Literal["host", "device"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Undecoded:
    """A sample whose latents are to become a picture. `progress` is what its last turn achieved.

    The dropped texts are those of `Picture`.
    """

    progress: SampleProgress
    is_preview: bool
    dropped_prompt: str
    dropped_negative_prompt: str


class Decoding:
    """A batch of latents of one shape on their way to pictures, in parts that use the device and the host by turns.

    `run_part` is called until `next_place` is None, from one thread at a time, in inference mode.
    """

    def __init__(
        self, pipeline: Any, wanted: Sequence[Undecoded], latents: torch.Tensor, sampled: torch.Tensor | None = None
    ) -> None:
        """`latents`, N × channels × height × width in float32, show the samples; of previews, `sampled` are their true ones."""
        self.tensors = (latents,) if sampled is None else (latents, sampled)
        self.next_place: Place | None = "device"
        self._pipeline = pipeline
        self._wanted = wanted
        self._timer = StageTimer()
        self._started_at = time.monotonic()
        self._progress: tuple[SampleProgress, ...] = ()
        self._parts = self._in_parts()

    def run_part(self) -> None:
        self.next_place = next(self._parts, None)

    def finish(self) -> None:
        """Run all parts that are left."""
        while self.next_place is not None:
            self.run_part()

    def result(self) -> TurnResult:
        """Once all parts have run: a progress for each sample, but for a preview that is not finite of a sample that is."""
        stages = self._timer.take()
        return TurnResult(
            progress=self._progress,
            started_at=self._started_at,
            elapsed_s=sum(stages.values()),
            stages=stages,
            is_turn=False,
        )

    def _in_parts(self) -> Iterator[Place]:
        """Yields where the next part runs."""
        with self._timer.time("decode"):
            decoded = decode(self._pipeline.vae, self.tensors[0])
            rgb = on_host(to_rgb(decoded.good_images))
        flags: list[bool] | None = None
        if decoded.good and self._pipeline.safety_checker is not None:
            yield "host"
            clip_input = checker_input(self._pipeline, rgb.numpy())
            clip_input = clip_input.to(decoded.images.dtype)
            yield "device"
            with self._timer.time("safety"):
                flags = flags_of(self._pipeline, decoded.good_images, upload(clip_input, decoded.images.device))
        self._progress = tuple(self._outcomes(decoded, rgb, flags))

    def _outcomes(self, decoded: Decoded, rgb: torch.Tensor, flags: list[bool] | None) -> Iterator[SampleProgress]:
        pictures = zip(rgb, flags or itertools.repeat(None), strict=False)
        for index, (wanted, fault) in enumerate(zip(self._wanted, decoded.faults, strict=True)):
            if fault is None:
                picture = _picture(wanted, *next(pictures))
                if wanted.is_preview:
                    yield replace(wanted.progress, preview=picture)
                else:
                    yield replace(wanted.progress, picture=picture)
            elif not (wanted.is_preview and is_finite(self.tensors[-1][index])):
                # Where only the preview is not finite, as in a v-prediction model's first step, it is left out.
                error = not_finite(fault, step=wanted.progress.step, pipeline=self._pipeline)
                yield replace(wanted.progress, error=error)


def _picture(wanted: Undecoded, rgb: torch.Tensor, flag: bool | None) -> Picture:
    """`rgb` is height × width × 3; a flagged picture is entirely black."""
    height, width, _ = rgb.shape
    return Picture(
        width=width,
        height=height,
        rgb=bytes(rgb.numel()) if flag else rgb.numpy().tobytes(),
        nsfw_content_detected=flag,
        dropped_prompt=wanted.dropped_prompt,
        dropped_negative_prompt=wanted.dropped_negative_prompt,
    )


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Through pinned memory, waiting for this stream alone."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event(blocking=True)
    copied.record()
    copied.synchronize()
    return host
