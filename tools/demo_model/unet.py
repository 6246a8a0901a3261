"""Stage `unet`: epsilon prediction on the latents, conditioned on the frozen text encoder.

Stable Diffusion's scaled-linear betas, captions left out now and then for classifier-free guidance, an exponential moving
average of the weights as the result. Captions are said anew each time a picture comes up.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from .identity_skip import IdentitySkip
from .optim import GradientAverage, Muon, learning_rate
from .text import HIDDEN_SIZE, token_ids
from .workshop import Progress, Workshop
from .world import PICTURE_PX, describe

BATCH_SIZE = 32
UNCONDITIONAL_SHARE = 0.1
EMA_DECAY = 0.999
CHECKPOINT_STEPS = 1000
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=PICTURE_PX // 8,
        layers_per_block=1,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=HIDDEN_SIZE,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def _loss_weights(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """Per timestep: min-SNR-3 below noise level one (https://arxiv.org/abs/2303.09556), more for the noisiest steps."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weights = torch.where(snr < 1, snr.rsqrt().clamp(max=15), torch.minimum(snr, torch.tensor(3.0)) / snr)
    return weights / weights.mean()


def train_unet(shop: Workshop) -> None:
    scenes, latents = shop.scenes(), torch.from_numpy(np.load(shop.folder / "latents.npy")).float()
    tokenizer = CLIPTokenizer.from_pretrained(shop.folder / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(shop.folder / "text_encoder").eval().requires_grad_(False)
    torch.manual_seed(0)
    unet = build_unet()
    skip = IdentitySkip(unet)
    parameters = list(unet.parameters())
    optimiser = Muon(
        list(unet.named_parameters()),
        lambda name, p: p.ndim >= 2 and not any(k in name for k in ("conv_in", "embed", "conv_out.weight")),
        lr=0.015,
        adam_lr=2e-3,
        adam_betas=(0.9, 0.99),
    )
    alphas_cumprod = DDPMScheduler(num_train_timesteps=1000, **BETAS).alphas_cumprod
    weights = _loss_weights(alphas_cumprod)
    averaged = [p.detach().clone() for p in parameters]
    average, total = GradientAverage(parameters), shop.recipe.unet_steps
    progress, rng, generator = Progress(shop, "unet", total, every_s=60.0), shop.random(20), shop.generator(21)
    for step in range(total):
        chosen = torch.randint(0, len(latents), (BATCH_SIZE,), generator=generator)
        timesteps = torch.randint(0, 1000, (BATCH_SIZE,), generator=generator)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        signal = alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        texts = ["" if rng.random() < UNCONDITIONAL_SHARE else describe(scenes[i], rng).text for i in chosen.tolist()]
        with torch.no_grad():
            prompt_embeds = encoder(token_ids(tokenizer, texts)).last_hidden_state
        noise_pred = unet(signal.sqrt() * clean + (1 - signal).sqrt() * noise, timesteps, prompt_embeds).sample
        errors = (noise_pred - noise).square().mean((1, 2, 3))
        optimiser.zero_grad()
        (errors * weights[timesteps]).mean().backward()
        reported = average(errors.mean().item())
        skip.mask_gradients()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step(learning_rate(step, total, hold=0.3))
        skip.restore()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_mul_(averaged, decay)
        torch._foreach_add_(averaged, [p.data for p in parameters], alpha=1 - decay)
        progress(step, reported)
        if shop.is_first() and (step + 1 == total or (step + 1) % CHECKPOINT_STEPS == 0):
            _save(unet, averaged, shop)


def _save(unet: UNet2DConditionModel, averaged: list[torch.Tensor], shop: Workshop) -> None:
    result = build_unet()
    result.load_state_dict(unet.state_dict())
    with torch.no_grad():
        for parameter, value in zip(result.parameters(), averaged, strict=True):
            parameter.copy_(value)
    result.save_pretrained(shop.folder / "unet")
