"""The FP32 reference's outputs for the fixed inputs."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from mii_serve.config import DeployConfig
from mii_serve.engine import Engine
from mii_serve.engine.factory import build_engine
from mii_serve.engine.probe import ProbedEngine, UNetCall
from mii_serve.errors import EngineError, InvalidRequestError
from mii_serve.models.architecture import LATENT_CHANNELS
from mii_serve.types import EngineDescription, Picture
from mii_serve.verify.cases import PROMPTS, PictureCase, picture_cases, unet_cases, vae_cases
from mii_serve.verify.drawing import draw
from mii_serve.verify.pipeline import NOT_FOUND, PipelinePair, compare_with_diffusers, draw_with_reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Truth:
    """The inputs, and the outputs by their names. A few megabytes on the CPU, whatever the model's size."""

    description: EngineDescription
    embeds: Mapping[str, torch.Tensor] = field(repr=False)
    calls: Mapping[str, UNetCall] = field(repr=False)
    predictions: Mapping[str, torch.Tensor] = field(repr=False)
    latents: Mapping[str, torch.Tensor] = field(repr=False)
    images: Mapping[str, torch.Tensor] = field(repr=False)
    cases: tuple[PictureCase, ...]
    pictures: Mapping[str, Picture] = field(repr=False)
    skipped: Mapping[str, str]
    pipeline: Mapping[str, PipelinePair] = field(default_factory=dict, repr=False)
    """The reference beside diffusers' own pipeline, by the name of the request."""


def learn_truth(config: DeployConfig) -> Truth:
    """Load the configured model in FP32, run the reference, and free it again.

    Raises:
        ConfigError, ModelError: as `mii_serve deploy --engine reference` would.
        EngineError: the reference itself fails, or has an output that is not finite.
    """
    plain = {"engine": "reference", "dtype": "fp32", "max_slots": None, "tensor_parallel": 1}
    engine = build_engine(config.model_copy(update=plain))
    try:
        truth = run_reference(engine)
        with _plain_float32():
            ours, refused, default = draw_with_reference(engine, config)
    finally:
        engine.close()
        del engine
        free_memory()
    with _plain_float32():
        pairs = compare_with_diffusers(config, ours, default, truth.description.device)
    free_memory()
    if not pairs:
        refused |= {NOT_FOUND: f"{config.model} is made in memory, there is nothing that diffusers could load"}
    return replace(truth, pipeline=pairs, skipped={**truth.skipped, **refused})


def run_reference(engine: Engine) -> Truth:
    """Run the reference on the fixed inputs; see `learn_truth`."""
    assert isinstance(engine, ProbedEngine)
    probe, capabilities = engine.probe(), engine.capabilities
    calls = {}
    with _plain_float32(), probe.without_checker():
        embeds = {name: probe.encode([text])[0] for name, text in PROMPTS.items()}
        for case in unet_cases(capabilities, probe.num_channels):
            calls[case.name] = case.call(embeds)
        predictions = {name: probe.predict([call])[0] for name, call in calls.items()}
        latents = vae_cases(capabilities, LATENT_CHANNELS)
        images = {name: probe.decode(one[None])[0] for name, one in latents.items()}
        cases, skipped = [], {}
        for drawing in picture_cases(capabilities):
            try:
                engine.check(drawing.params)
                cases.append(drawing)
            except InvalidRequestError as error:
                skipped[drawing.name] = str(error)
        pictures: dict[str, Picture] = {}
        for drawing in cases:
            pictures |= draw(engine, [drawing])
    for outputs in (embeds, predictions, images):
        for name, output in outputs.items():
            if not output.isfinite().all():
                raise EngineError(f"the reference itself has an output that is not finite: {name}")
    return Truth(
        description=engine.description,
        embeds=embeds,
        calls=calls,
        predictions=predictions,
        latents=latents,
        images=images,
        cases=tuple(cases),
        pictures=pictures,
        skipped=skipped,
    )


def free_memory() -> None:
    """Give the memory of freed tensors back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _plain_float32() -> Iterator[None]:
    """Without TF32, which cuDNN uses for float32 convolutions by default: it rounds to ten bits."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
