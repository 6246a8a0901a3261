"""Gives an engine the reference's inputs, one by one and in a batch, and checks its outputs against the limits."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import numpy as np
import torch

from mii_serve.engine import Engine
from mii_serve.engine.probe import ProbedEngine
from mii_serve.errors import EngineError, InvalidRequestError
from mii_serve.types import Picture
from mii_serve.verify.cases import PROMPTS, PictureCase
from mii_serve.verify.compare import Array, Difference, difference, picture_difference
from mii_serve.verify.drawing import draw
from mii_serve.verify.limits import Bounds, Stage, limits_for, where_measured
from mii_serve.verify.report import Batching, Check, Report
from mii_serve.verify.truth import Truth

logger = logging.getLogger(__name__)

EVERYTHING = "all together"
"""The case of a check that failed for a whole batch."""

T = TypeVar("T")


def verify(engine: Engine, truth: Truth) -> Report:
    """Check a warm engine that holds no samples, in its own thread. It holds none afterwards, unless it failed on the way.

    Raises:
        EngineError: the engine has no probe.
    """
    if not isinstance(engine, ProbedEngine):
        raise EngineError(f"the engine {engine.description.engine!r} cannot be verified: it has no probe")
    description, probe = engine.description, engine.probe()
    limits = limits_for(description.dtype)
    checks = _Checks(limits)
    skipped = dict(truth.skipped)
    pictures: dict[str, tuple[Picture, Picture]] = {}
    _check_reference(checks, truth)
    with contextlib.suppress(_StageFailedError), probe.without_checker():
        checks.compare_stage(Stage.TEXT_ENCODER, PROMPTS, probe.encode, truth.embeds)
        checks.compare_stage(Stage.UNET, truth.calls, probe.predict, truth.predictions)
        checks.compare_stage(Stage.VAE, truth.latents, lambda latents: probe.decode(torch.stack(latents)), truth.images)
        _check_pictures(checks, engine, truth, skipped, pictures)
    return Report(
        engine=description,
        reference=truth.description,
        limits=limits,
        limits_measured=where_measured(description),
        checks=tuple(checks.found),
        skipped=skipped,
        pictures=pictures,
    )


class _StageFailedError(Exception):
    """A stage failed, and that is among the checks; no further stage can be tried."""


class _Checks:
    def __init__(self, limits: Mapping[Stage, Bounds]) -> None:
        self._limits = limits
        self.found: list[Check] = []

    def add(self, stage: Stage, case: str, batching: Batching, found: Difference | None, *faults: str) -> None:
        faults = faults if found is None else tuple(self._limits[stage].broken_by(found))
        self.found.append(Check(stage=stage, case=case, batching=batching, difference=found, faults=faults))

    @contextlib.contextmanager
    def running(self, stage: Stage, case: str, batching: Batching) -> Iterator[None]:
        """Whatever is raised in the block is a fault of this stage."""
        try:
            yield
        except Exception as error:
            logger.exception("the engine failed: %s, %s, %s", stage, case, batching)
            self.add(stage, case, batching, None, f"no answer, {type(error).__name__}: {error}")
            raise _StageFailedError from error

    def compare(self, stage: Stage, case: str, batching: Batching, output: np.ndarray, expected: np.ndarray) -> None:
        if output.shape != expected.shape:
            whose = "pipeline" if stage is Stage.PIPELINE else "reference"
            self.add(stage, case, batching, None, f"has the shape {output.shape}, the {whose}'s has {expected.shape}")
        elif stage in (Stage.TEXT_ENCODER, Stage.UNET):
            self.add(stage, case, batching, difference(output, expected))
        elif stage is Stage.VAE:
            self.add(stage, case, batching, picture_difference(_levels(output), _levels(expected)))
        else:
            self.add(stage, case, batching, picture_difference(output, expected))

    def compare_stage(
        self, stage: Stage, inputs: Mapping[str, T], run: Callable[[list[T]], torch.Tensor], truth: Mapping[str, torch.Tensor]
    ) -> None:
        """Run a stage on each input alone, then on those whose outputs have one shape together."""
        for name, one in inputs.items():
            with self.running(stage, name, "alone"):
                output = run([one])[0]
            self.compare(stage, name, "alone", output.numpy(), truth[name].numpy())
        for shape in dict.fromkeys(truth[name].shape for name in inputs):
            names = [name for name in inputs if truth[name].shape == shape]
            with self.running(stage, EVERYTHING, "batched"):
                outputs = run([inputs[name] for name in names])
            for name, output in zip(names, outputs, strict=True):
                self.compare(stage, name, "batched", output.numpy(), truth[name].numpy())

    def pictures(self, batching: Batching, outputs: Mapping[str, Picture], truth: Mapping[str, Picture]) -> None:
        for name, picture in outputs.items():
            self.compare(Stage.PICTURES, name, batching, _pixels(picture), _pixels(truth[name]))


def _check_reference(checks: _Checks, truth: Truth) -> None:
    """Compare the reference with diffusers' own pipeline before anything is compared with the reference."""
    for name, pair in truth.pipeline.items():
        if pair.ours is None or pair.plain is None:
            checks.add(Stage.PIPELINE, name, "alone", None, pair.fault)
        elif pair.ours.nsfw_content_detected != pair.plain.nsfw_content_detected:
            flags = pair.ours.nsfw_content_detected, pair.plain.nsfw_content_detected
            fault = f"nsfw_content_detected is {flags[0]}, the pipeline's is {flags[1]}"
            checks.add(Stage.PIPELINE, name, "alone", None, fault)
        else:
            checks.compare(Stage.PIPELINE, name, "alone", _pixels(pair.ours), _pixels(pair.plain))


def _check_pictures(
    checks: _Checks, engine: Engine, truth: Truth, skipped: dict[str, str], pictures: dict[str, tuple[Picture, Picture]]
) -> None:
    alone: dict[str, Picture] = {}
    cases: list[PictureCase] = []
    for case in truth.cases:
        with checks.running(Stage.PICTURES, case.name, "alone"):
            try:
                engine.check(case.params)
            except InvalidRequestError as error:
                skipped[case.name] = str(error)
                continue
            alone |= draw(engine, [case])
            cases.append(case)
    checks.pictures("alone", alone, truth.pictures)
    with checks.running(Stage.PICTURES, EVERYTHING, "batched"):
        batched = draw(engine, cases)
        if not batched:
            raise EngineError("it can draw none of the pictures")
    checks.pictures("batched", batched, truth.pictures)
    pictures.update({name: (expected, batched[name]) for name, expected in truth.pictures.items() if name in batched})


def _levels(image: np.ndarray) -> Array:
    """Height × width × 3 in levels of 255, neither rounded nor cut, from 3 × height × width in [-1, 1]."""
    return (image.astype(np.float64).transpose(1, 2, 0) + 1) * 127.5


def _pixels(picture: Picture) -> Array:
    return np.frombuffer(picture.rgb, np.uint8).reshape(picture.height, picture.width, 3).astype(np.float64)
