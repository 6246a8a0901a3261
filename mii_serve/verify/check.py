"""Asks an engine what the reference was asked, alone and in a crowd, and judges the answers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch

from mii_serve.engine import Engine
from mii_serve.engine.probe import Probe, ProbedEngine
from mii_serve.errors import EngineError, InvalidRequestError
from mii_serve.types import Picture
from mii_serve.verify.cases import PROMPTS, PictureCase
from mii_serve.verify.compare import Array, Difference, difference, picture_difference
from mii_serve.verify.drawing import draw
from mii_serve.verify.limits import Bounds, Stage, limits_for, where_measured
from mii_serve.verify.report import Check, Company, Report
from mii_serve.verify.truth import Truth

logger = logging.getLogger(__name__)

EVERYTHING = "all together"
"""What a failed question was about when it was about a crowd."""

Tensors = Mapping[str, torch.Tensor]


def verify(engine: Engine, truth: Truth) -> Report:
    """Ask a warm engine that holds no samples, in its own thread. It holds none afterwards, unless it failed on the way.

    Raises:
        EngineError: the engine cannot be asked by stages.
    """
    if not isinstance(engine, ProbedEngine):
        raise EngineError(f"the engine {engine.description.engine!r} cannot be verified: it has no probe")
    description, probe = engine.description, engine.probe()
    limits = limits_for(description.dtype)
    judge = _Judge(limits)
    skipped = dict(truth.skipped)
    pictures: dict[str, tuple[Picture, Picture]] = {}
    _check_reference(judge, truth)
    with contextlib.suppress(_NoAnswerError), probe.without_checker():
        _check_text_encoder(judge, probe, truth)
        _check_unet(judge, probe, truth)
        _check_vae(judge, probe, truth)
        _check_pictures(judge, engine, truth, skipped, pictures)
    return Report(
        engine=description,
        reference=truth.description,
        limits=limits,
        limits_measured=where_measured(description),
        checks=tuple(judge.checks),
        skipped=skipped,
        pictures=pictures,
    )


class _NoAnswerError(Exception):
    """A stage failed instead of answering, and the judge knows; nothing more can be asked."""


class _Judge:
    def __init__(self, limits: Mapping[Stage, Bounds]) -> None:
        self._limits = limits
        self.checks: list[Check] = []

    def take(self, stage: Stage, case: str, company: Company, found: Difference | None, *faults: str) -> None:
        faults = faults if found is None else tuple(self._limits[stage].broken_by(found))
        self.checks.append(Check(stage=stage, case=case, company=company, difference=found, faults=faults))

    @contextlib.contextmanager
    def asking(self, stage: Stage, case: str, company: Company) -> Iterator[None]:
        """Whatever goes wrong while a question is put to the engine is a fault of this stage."""
        try:
            yield
        except Exception as error:
            logger.exception("the engine failed when it was asked: %s, %s, %s", stage, case, company)
            self.take(stage, case, company, None, f"no answer, {type(error).__name__}: {error}")
            raise _NoAnswerError from error

    def tensors(self, stage: Stage, company: Company, answers: Tensors, truth: Tensors) -> None:
        for name, answer in answers.items():
            made, true = answer.numpy(), truth[name].numpy()
            if made.shape != true.shape:
                self.take(stage, name, company, None, f"has the shape {made.shape}, the reference's has {true.shape}")
            elif stage is Stage.VAE:
                self.take(stage, name, company, picture_difference(_levels(made), _levels(true)))
            else:
                self.take(stage, name, company, difference(made, true))

    def pictures(self, company: Company, answers: Mapping[str, Picture], truth: Mapping[str, Picture]) -> None:
        for name, answer in answers.items():
            made, true = _pixels(answer), _pixels(truth[name])
            if made.shape != true.shape:
                self.take(Stage.PICTURES, name, company, None, f"has the shape {made.shape}, the reference's has {true.shape}")
            else:
                self.take(Stage.PICTURES, name, company, picture_difference(made, true))


def _check_reference(judge: _Judge, truth: Truth) -> None:
    """What is no truth is found out before anything is compared with it."""
    stage: Stage = Stage.PIPELINE
    for name, pair in truth.pipeline.items():
        if pair.ours is None or pair.plain is None:
            judge.take(stage, name, "alone", None, pair.fault)
            continue
        made, true = _pixels(pair.ours), _pixels(pair.plain)
        if made.shape != true.shape:
            judge.take(stage, name, "alone", None, f"has the shape {made.shape}, the pipeline's has {true.shape}")
        elif pair.ours.nsfw_content_detected != pair.plain.nsfw_content_detected:
            flags = pair.ours.nsfw_content_detected, pair.plain.nsfw_content_detected
            judge.take(stage, name, "alone", None, f"nsfw_content_detected is {flags[0]}, the pipeline's is {flags[1]}")
        else:
            judge.take(stage, name, "alone", picture_difference(made, true))


def _check_text_encoder(judge: _Judge, probe: Probe, truth: Truth) -> None:
    stage, alone = Stage.TEXT_ENCODER, {}
    for name, text in PROMPTS.items():
        with judge.asking(stage, name, "alone"):
            alone[name] = probe.encode([text])[0]
    judge.tensors(stage, "alone", alone, truth.embeds)
    with judge.asking(stage, EVERYTHING, "crowd"):
        crowd = dict(zip(PROMPTS, probe.encode(list(PROMPTS.values())), strict=True))
    judge.tensors(stage, "crowd", crowd, truth.embeds)


def _check_unet(judge: _Judge, probe: Probe, truth: Truth) -> None:
    stage, alone = Stage.UNET, {}
    crowd: dict[str, torch.Tensor] = {}
    for name, call in truth.calls.items():
        with judge.asking(stage, name, "alone"):
            alone[name] = probe.predict([call])[0]
    judge.tensors(stage, "alone", alone, truth.predictions)
    for names in _grouped((name, call.latent_shape) for name, call in truth.calls.items()):
        with judge.asking(stage, EVERYTHING, "crowd"):
            crowd.update(zip(names, probe.predict([truth.calls[name] for name in names]), strict=True))
    judge.tensors(stage, "crowd", crowd, truth.predictions)


def _check_vae(judge: _Judge, probe: Probe, truth: Truth) -> None:
    stage, alone = Stage.VAE, {}
    crowd: dict[str, torch.Tensor] = {}
    for name, latents in truth.latents.items():
        with judge.asking(stage, name, "alone"):
            alone[name] = probe.decode(latents[None])[0]
    judge.tensors(stage, "alone", alone, truth.images)
    for names in _grouped((name, latents.shape) for name, latents in truth.latents.items()):
        with judge.asking(stage, EVERYTHING, "crowd"):
            crowd.update(zip(names, probe.decode(torch.stack([truth.latents[name] for name in names])), strict=True))
    judge.tensors(stage, "crowd", crowd, truth.images)


def _check_pictures(
    judge: _Judge, engine: Engine, truth: Truth, skipped: dict[str, str], pictures: dict[str, tuple[Picture, Picture]]
) -> None:
    alone: dict[str, Picture] = {}
    cases: list[PictureCase] = []
    for case in truth.cases:
        with judge.asking(Stage.PICTURES, case.name, "alone"):
            try:
                engine.check(case.params)
            except InvalidRequestError as error:
                skipped[case.name] = str(error)
                continue
            alone |= draw(engine, [case])
            cases.append(case)
    judge.pictures("alone", alone, truth.pictures)
    with judge.asking(Stage.PICTURES, EVERYTHING, "crowd"):
        crowd = draw(engine, cases)
        if not crowd:
            raise EngineError("it can draw none of the pictures")
    judge.pictures("crowd", crowd, truth.pictures)
    pictures.update({name: (true, crowd[name]) for name, true in truth.pictures.items() if name in crowd})


def _grouped(kinds: Iterable[tuple[str, tuple[int, ...]]]) -> list[list[str]]:
    """The names of each kind, which is a shape."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, kind in kinds:
        groups.setdefault(tuple(kind), []).append(name)
    return list(groups.values())


def _levels(image: np.ndarray) -> Array:
    """Height × width × 3 in levels of 255, neither rounded nor cut, from 3 × height × width in [-1, 1]."""
    return (image.astype(np.float64).transpose(1, 2, 0) + 1) * 127.5


def _pixels(picture: Picture) -> Array:
    return np.frombuffer(picture.rgb, np.uint8).reshape(picture.height, picture.width, 3).astype(np.float64)
