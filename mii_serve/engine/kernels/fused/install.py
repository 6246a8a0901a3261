"""Puts the fused kernels under a model on a CUDA device in half precision, as far as the device shows them right and faster.

**This has not run on a GPU yet.** Whatever goes wrong is a reason, logged and kept in the choice, and never a failed start.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mii_serve.engine.kernel_choices import Choice, ChoiceFile, choices_folder
from mii_serve.engine.kernels import KernelSet
from mii_serve.engine.kernels.fused.choice import ChosenOperations, source_digest
from mii_serve.engine.kernels.fused.forward import FusedKernels, why_not_fusible
from mii_serve.engine.kernels.fused.measuring import MAX_ERROR, MeasuringOperations, error
from mii_serve.engine.kernels.fused.operations import Operations
from mii_serve.engine.kernels.fused.vae import FusedDecoder, why_vae_not_fusible
from mii_serve.engine.kernels.native import NativeKernels
from mii_serve.engine.kernels.sampler import SamplerKernels, TorchSampler
from mii_serve.engine.kernels.timing import time_ms
from mii_serve.models import LoadedModel
from mii_serve.samplers.table import INPUT_PLANES, STATE_PLANES
from mii_serve.types import LATENT_SCALE, LatentShape

logger = logging.getLogger(__name__)

MIN_COMPUTE_CAPABILITY = (8, 0)
MAX_PASS_ERROR = 10 * MAX_ERROR[torch.float16]
"""Of a whole pass, in which some hundred operations round one after the other."""

MAX_MEASURING_S = 120.0
"""Of a start: what is left is measured by the next one, whose kernels are compiled by then."""


@dataclass(frozen=True, slots=True)
class Installed:
    """`about` says which kernels run, for the log and the status."""

    kernels: NativeKernels
    about: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What the choice depends on of a device, and how to time a call on it. Doubles stand in for it in tests."""

    about: Mapping[str, Any]
    ways: Mapping[str, Operations]
    samplers: Mapping[str, SamplerKernels]
    time_ms: Callable[[Callable[[], object]], float]
    clock: Callable[[], float] = time.monotonic

    @property
    def name(self) -> str:
        return str(self.about["device"])


def native_kernels(model: LoadedModel, *, max_slots: int) -> Installed:
    """`FusedKernels` where they run, `NativeKernels` elsewhere. The model's VAE gets the fused decoder with them."""
    unet = model.pipeline.unet
    if unet.device.type != "cuda" or unet.dtype not in (torch.float16, torch.bfloat16):
        return Installed(NativeKernels(unet), "")
    try:
        device = this_device(unet.device)
    except Exception as failure:  # noqa: BLE001 - Triton's, which is missing or does not fit
        reason = f"not fused: {type(failure).__name__}: {failure}".splitlines()[0][:200]
        logger.warning("%s", reason)
        return Installed(NativeKernels(unet), reason)
    try:
        return install(model, device, num_samples=(1, max_slots), folder=choices_folder())
    except Exception as failure:
        reason = f"not fused: {type(failure).__name__}: {failure}".splitlines()[0][:200]
        logger.warning("%s", reason, exc_info=True)
        return Installed(NativeKernels(unet), reason)


def install(model: LoadedModel, device: Device, *, num_samples: tuple[int, ...], folder: Path) -> Installed:
    """Measure, or read what was measured, for calls of so many guided samples of the model's default size."""
    pipeline = model.pipeline
    unet, vae = pipeline.unet, pipeline.vae
    if (reason := why_not_fusible(unet)) is not None:
        return Installed(NativeKernels(unet), f"not fused: the UNet has {reason}")
    with torch.inference_mode(False), torch.no_grad():
        unet.to(memory_format=torch.channels_last)
        inputs = PassInputs.of(model)
        expected = inputs.prediction(NativeKernels(unet), 1)
        choice = _choice(pipeline, device, inputs, num_samples, folder)
        operations = ChosenOperations(choice, device.ways)
        fused = FusedKernels(unet, operations, sampler=device.samplers.get(choice.usual("sampler")))
        found = error(inputs.prediction(fused, 1), expected)
        if not found <= MAX_PASS_ERROR:
            logger.warning("the fused kernels are not used: a whole pass is %.2g off", found)
            return Installed(NativeKernels(unet), f"not fused: a whole pass is {found:.2g} off")
        about = f"fused: {choice.summary()}"
        if (reason := why_vae_not_fusible(vae) or _fuse_decoder(vae, operations, inputs.latent_shape)) is not None:
            about += f"; not the decoder ({reason})"
    logger.info("%s", about)
    return Installed(fused, about)


def this_device(device: torch.device) -> Device:
    """
    Raises:
        ImportError: there is no Triton.
        RuntimeError: the device is too old.
    """
    import triton

    from mii_serve.engine.kernels.fused.sampler import FusedSampler
    from mii_serve.engine.kernels.fused.triton_operations import TritonAfterLinear, TritonBeforeConvolution, TritonOperations

    seen = torch.cuda.get_device_properties(device)
    if (seen.major, seen.minor) < MIN_COMPUTE_CAPABILITY:
        raise RuntimeError(f"{seen.name} has compute capability {seen.major}.{seen.minor}")
    about = {
        "device": seen.name,
        "compute_capability": [seen.major, seen.minor],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "kernels": source_digest(),
    }
    ways = {
        "triton": TritonOperations(),
        "linear, then triton": TritonAfterLinear(),
        "triton, then convolution": TritonBeforeConvolution(),
    }
    return Device(about=about, ways=ways, samplers={"triton": FusedSampler()}, time_ms=time_ms)


def _choice(pipeline: Any, device: Device, inputs: PassInputs, num_samples: tuple[int, ...], folder: Path) -> Choice:
    unet, vae = pipeline.unet, pipeline.vae
    file = ChoiceFile({**device.about, "model": about_model(pipeline, inputs.latent_shape, num_samples)}, folder)
    if (known := file.read()) is not None and known.num_left == 0:
        return known
    ends = device.clock() + MAX_MEASURING_S
    measuring = MeasuringOperations(device.ways, device.time_ms, before=file.begin, has_time=lambda: device.clock() < ends)
    if known is not None:
        measuring.take(known.measurements, known.refused)
    if (killer := file.ended_the_process()) is not None:
        measuring.refused[killer] = "a start that tried it ended without a result"
    kernels = FusedKernels(unet, measuring)
    for count in num_samples:
        try:
            inputs.prediction(kernels, count)
            inputs.sample(measuring, device.samplers, count)
        except torch.OutOfMemoryError:
            logger.info("calls for %d samples do not fit into memory beside their check; the shapes before decide", count)
    if why_vae_not_fusible(vae) is None:
        vae.decoder.to(memory_format=torch.channels_last)
        FusedDecoder(vae.decoder, measuring)(inputs.latents(1, vae.config.latent_channels))
    if measuring.num_left:
        logger.warning("%d shapes are left for the next start to measure", measuring.num_left)
    choice = Choice(
        device=device.name,
        measurements=tuple(measuring.measurements),
        refused=measuring.refused,
        num_left=measuring.num_left,
    )
    file.write(choice)
    file.end()
    return choice


def about_model(pipeline: Any, latent_shape: LatentShape, num_samples: tuple[int, ...]) -> dict[str, Any]:
    """What of a model decides how long its parts take."""
    parts = pipeline.unet, pipeline.vae
    shapes = str([(name, tuple(one.shape)) for part in parts for name, one in part.state_dict().items()])
    return {
        "shapes": hashlib.sha256(shapes.encode()).hexdigest()[:16],
        "latents": list(latent_shape),
        "num_samples": list(num_samples),
        "dtype": str(pipeline.unet.dtype),
    }


def _fuse_decoder(vae: Any, operations: Operations, latent_shape: tuple[int, int]) -> str | None:
    """Why not, where a decoded image is not what it was."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, vae.config.latent_channels, *latent_shape, generator=generator).to(vae.device, vae.dtype)
    own = vae.decoder
    expected = own(latents)
    own.to(memory_format=torch.channels_last)
    fused = FusedDecoder(own, operations)
    found = error(fused(latents), expected)
    if not found <= MAX_PASS_ERROR:
        own.to(memory_format=torch.contiguous_format)
        return f"an image is {found:.2g} off"
    vae.decoder = fused
    return None


@dataclass(frozen=True, slots=True, eq=False)
class PassInputs:
    """Random inputs of a pass through the UNet, the same ones each time."""

    unet: Any
    latent_shape: LatentShape

    @classmethod
    def of(cls, model: LoadedModel) -> PassInputs:
        """Of the model's default size."""
        return cls(model.pipeline.unet, (model.defaults.height // LATENT_SCALE, model.defaults.width // LATENT_SCALE))

    def latents(self, count: int, channels: int) -> torch.Tensor:
        made = torch.randn(count, channels, *self.latent_shape, generator=torch.Generator().manual_seed(0))
        return made.to(self.unet.device, self.unet.dtype, memory_format=torch.channels_last)

    def prediction(self, kernels: KernelSet, num_samples: int) -> torch.Tensor:
        """Of so many guided samples."""
        return self.call(kernels, num_samples)()

    def call(self, kernels: KernelSet, num_samples: int) -> Callable[[], torch.Tensor]:
        """The UNet call of so many guided samples, its inputs on the device."""
        unet = self.unet
        generator = torch.Generator().manual_seed(1)
        embeds = torch.randn(2 * num_samples, 77, unet.config.cross_attention_dim, generator=generator)
        timesteps = torch.linspace(999.0, 1.0, num_samples, device=unet.device)
        return functools.partial(
            kernels.predict_noise,
            self.latents(num_samples, unet.config.in_channels),
            kernels.embed_timesteps(timesteps),
            kernels.project_prompts(embeds.to(unet.device, unet.dtype)),
            torch.arange(2 * num_samples, device=unet.device) % num_samples,
        )

    def sample(self, measuring: MeasuringOperations, samplers: Mapping[str, SamplerKernels], num_samples: int) -> None:
        """Measure what is done around the UNet call."""
        generator = torch.Generator().manual_seed(2)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator).to(self.unet.device)

        size = self.unet.config.out_channels, *self.latent_shape
        state, noise = random(num_samples + 1, STATE_PLANES, *size), random(num_samples, *size)
        noise_pred = random(2 * num_samples, *size).to(self.unet.dtype, memory_format=torch.channels_last)
        matrices, scale = random(num_samples, STATE_PLANES, INPUT_PLANES), random(num_samples).abs()
        slots = torch.arange(num_samples, 0, -1, device=self.unet.device)
        rescale = scale.clamp(max=1.0) * (slots % 2)

        def call(way: SamplerKernels, cast: Callable[[Any], Any]) -> tuple[torch.Tensor, ...]:
            stepped = state.clone()
            model_input, latents = way.begin(stepped, slots, scale, self.unet.dtype)
            named = {"guidance_scale": 7.5 * scale, "guidance_rescale": rescale, "noise": noise, "matrices": matrices}
            rows = num_samples + slots - 1
            prediction = way.end(stepped, slots, cast(noise_pred), rows, **named, is_guided=True)
            return model_input, latents, prediction, stepped

        shape = "sampler", (self.latent_shape[0] * self.latent_shape[1],), num_samples
        measuring.measured(*shape, call, TorchSampler(), samplers.items())
