"""Traces of the turns of Stable Diffusion v1-4 at 512 × 512 in half precision: our engines', and diffusers' UNet call.

A turn is what `Denoiser.step` launches for guided samples: inputs, UNet call, guidance, sampler update.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import fake_cuda
import numpy as np
import torch
from cuda_trace import Record, Trace
from modelled_deepspeed import modelled_operations

from mii_serve.engine.batched.batch_inputs import MATRIX_SIZE, SampleInputs
from mii_serve.engine.batched.denoiser import Denoiser
from mii_serve.engine.kernels import KernelSet
from mii_serve.engine.kernels.deepspeed import DeepSpeedKernels, FusedDeepSpeedKernels
from mii_serve.engine.kernels.deepspeed.injection import inject
from mii_serve.engine.kernels.fused.forward import FusedKernels
from mii_serve.engine.kernels.fused.operations import Operations
from mii_serve.engine.kernels.fused.sampler import FusedSampler
from mii_serve.engine.kernels.fused.triton_operations import Launch, TritonOperations
from mii_serve.engine.kernels.fused.vae import FusedDecoder
from mii_serve.engine.kernels.loras import LoraRows
from mii_serve.engine.kernels.native import NativeKernels
from mii_serve.samplers.table import INPUT_PLANES, STATE_PLANES

LATENT_SHAPE = 64, 64
NUM_CHANNELS, NUM_TOKENS, TEXT_WIDTH = 4, 77, 768
DTYPE = torch.float16


def native_turn(num_samples: int, also: Launch | None = None) -> Record:
    """With all fused kernels, of which `also` gets the launches."""
    with fake_cuda.fake_cuda() as fake, Trace() as trace:
        unet = fake_cuda.unet(fake)
        unet.to(memory_format=torch.channels_last)
        launch = launcher(trace, also)
        kernels = FusedKernels(unet, TritonOperations(launch), sampler=FusedSampler(launch))
        return turn(kernels, num_samples, trace)


def lora_turn(num_samples: int, rank: int = 16) -> Record:
    """With all fused kernels, and for each sample another LoRA of this rank in all layers that can have one."""
    with fake_cuda.fake_cuda() as fake, Trace() as trace:
        unet = fake_cuda.unet(fake)
        unet.to(memory_format=torch.channels_last)
        launch = launcher(trace)
        kernels = FusedKernels(unet, TritonOperations(launch), sampler=FusedSampler(launch))
        layout = kernels.lora_layout
        assert layout is not None
        down, up = (
            torch.zeros(num_samples + 1, rank, width, dtype=DTYPE, device=fake_cuda.DEVICE)
            for width in (layout.num_inputs, layout.num_outputs)
        )
        rows = torch.arange(num_samples, device=fake_cuda.DEVICE)
        pool = LoraRows(layout, down, up)
        return turn(kernels, num_samples, trace, SimpleNamespace(of_call=lambda entries: pool.taken(rows)))


def unfused_turn(num_samples: int) -> Record:
    """With torch's operations alone."""
    with fake_cuda.fake_cuda() as fake, Trace() as trace:
        unet = fake_cuda.unet(fake)
        unet.to(memory_format=torch.channels_last)
        return turn(NativeKernels(unet), num_samples, trace)


def deepspeed_turn(num_samples: int, *, is_fused: bool = True) -> Record:
    """With DeepSpeed's blocks, whose operations are modelled, and our fused kernels around them."""
    with fake_cuda.fake_cuda() as fake, Trace() as trace, modelled_operations(trace):
        unet = fake_cuda.unet(fake)
        unet.to(memory_format=torch.channels_last)
        inject(unet)
        launch, workspace = launcher(trace), SimpleNamespace(release=lambda: None)
        kernels: KernelSet = DeepSpeedKernels(unet, workspace)
        if is_fused:
            kernels = FusedDeepSpeedKernels(unet, workspace, TritonOperations(launch), sampler=FusedSampler(launch))
        return turn(kernels, num_samples, trace)


def launcher(trace: Trace, also: Launch | None = None) -> Launch:
    """Counts a Triton kernel in the place of running it; each of its tensors is read or written once."""

    def launch(kernel: Any, grid: Any, tile: Any, tensors: Any, numbers: Any, options: Any, flops: int = 0) -> None:
        trace.launch(kernel.__name__, [tensor for tensor in tensors if tensor is not None], flops=flops)
        if also is not None:
            also(kernel, grid, tile, tensors, numbers, options)

    return launch


def turn(kernels: KernelSet, num_samples: int, trace: Trace, loras: Any = None) -> Record:
    """One turn of so many guided samples, within `fake_cuda` and the trace. `loras` stand for a `BatchedLoras`."""

    def on_device(*size: int) -> Any:
        return torch.zeros(*size, dtype=DTYPE, device=fake_cuda.DEVICE)

    prompts = SimpleNamespace(projected=on_device(2 * num_samples, NUM_TOKENS, kernels.prompt_width))
    timesteps = SimpleNamespace(embeds=on_device(num_samples, kernels.timestep_width))
    denoiser = Denoiser(kernels, prompts, timesteps, max_slots=num_samples, num_channels=NUM_CHANNELS, loras=loras)
    denoiser.pool(LATENT_SHAPE)
    matrix = np.zeros(MATRIX_SIZE, np.float32).reshape(STATE_PLANES, INPUT_PLANES)
    samples = [
        SampleInputs(
            slot=i,
            timestep_row=i,
            prompt_row=i,
            negative_prompt_row=num_samples + i,
            guidance_scale=7.5,
            input_scale=1.0,
            matrix=matrix,
            noise=None,
        )
        for i in range(num_samples)
    ]
    trace.begin()
    denoiser.step(samples, LATENT_SHAPE)
    return trace.record


def diffusers_call(num_samples: int, *, is_channels_last: bool) -> Record:
    """The UNet call of so many guided samples alone, as `StableDiffusionPipeline` makes it."""
    with fake_cuda.fake_cuda() as fake:
        unet = fake_cuda.unet(fake)
        if is_channels_last:
            unet.to(memory_format=torch.channels_last)
        latents, timestep, prompts = (
            torch.zeros(size, dtype=DTYPE, device=fake_cuda.DEVICE)
            for size in ((2 * num_samples, NUM_CHANNELS, *LATENT_SHAPE), (), (2 * num_samples, NUM_TOKENS, TEXT_WIDTH))
        )
        with Trace() as trace:
            unet(latents, timestep, encoder_hidden_states=prompts, return_dict=False)
    return trace.record


def diffusers_decode() -> Record:
    """One picture by the VAE, as it is loaded."""
    with fake_cuda.fake_cuda() as fake, Trace() as trace:
        return _decode(fake_cuda.vae(fake), trace)


def native_decode(also: Launch | None = None, operations: Callable[[Launch], Operations] = TritonOperations) -> Record:
    """One picture by the VAE with all fused kernels, of which `also` gets the launches."""
    with fake_cuda.fake_cuda() as fake, Trace() as trace:
        vae = fake_cuda.vae(fake)
        vae.to(memory_format=torch.channels_last)
        vae.decoder = FusedDecoder(vae.decoder, operations(launcher(trace, also)))
        return _decode(vae, trace)


def _decode(vae: Any, trace: Trace) -> Record:
    latents = torch.zeros(1, NUM_CHANNELS, *LATENT_SHAPE, dtype=DTYPE, device=fake_cuda.DEVICE)
    trace.begin()
    vae.decode(latents, return_dict=False)
    return trace.record
