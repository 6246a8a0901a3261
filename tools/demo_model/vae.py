"""Stages `vae`, `latents`, `decoder` and `decoded`: an eight-fold autoencoder, and what the other stages need of it.

Its sharpness is the ceiling of everything that follows: a shape the decoder blurs cannot be told from its neighbour.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import nn

from .optim import GradientAverage, Muon, learning_rate
from .workshop import VAE_SCALING_FACTOR, Progress, Workshop, as_images, as_pictures
from .world import PICTURE_PX

BATCH_SIZE = 4
KL_WEIGHT = 2e-4
EDGE_WEIGHT = 0.5


def _edge_error(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    difference = decoded - images
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def train_vae(shop: Workshop) -> None:
    pictures, total = shop.pictures(), shop.recipe.vae_steps
    torch.manual_seed(0)
    vae = AutoencoderKL(
        latent_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        sample_size=PICTURE_PX,
        scaling_factor=VAE_SCALING_FACTOR,
    )
    parameters = list(vae.parameters())
    optimiser = Muon(
        list(vae.named_parameters()),
        lambda name, p: p.ndim >= 2 and "conv_in" not in name and "decoder.conv_out" not in name,
        lr=0.02,
        adam_lr=3e-3,
    )
    average, progress = GradientAverage(parameters), Progress(shop, "vae", total)
    chooser = np.random.default_rng(1000 + shop.rank)
    torch.manual_seed(shop.rank + 1)  # the posterior's noise differs between ranks
    for step in range(total):
        images = as_images(pictures[np.sort(chooser.choice(len(pictures), BATCH_SIZE, replace=False))])
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        l1 = (decoded - images).abs().mean()
        divergence = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        loss = l1 + (decoded - images).square().mean() + EDGE_WEIGHT * _edge_error(decoded, images)
        loss = loss + KL_WEIGHT * divergence
        optimiser.zero_grad()
        loss.backward()
        reported = average(l1.item())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step(learning_rate(step, total, warmup=30))
        progress(step, reported)
    if shop.is_first():
        vae.eval()
        with torch.no_grad():
            _fold_scale(vae, pictures)
            images = as_images(pictures[:256])
            error = ((vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1) - images) / 2).square().mean()
        print(f"vae PSNR {-10 * math.log10(error.item()):.2f} dB", flush=True)
        vae.save_pretrained(shop.folder / "vae")


def _fold_scale(vae: AutoencoderKL, pictures: np.ndarray) -> None:
    """Shift and scale the latents, inside the 1 × 1 convolutions, to zero mean and deviation 1 / scaling_factor."""
    batches = [as_images(pictures[i : i + 64]) for i in range(0, min(1024, len(pictures)), 64)]
    latents = torch.cat([vae.encode(images).latent_dist.mode() for images in batches])
    mean = latents.mean((0, 2, 3))
    scale = (1 / VAE_SCALING_FACTOR) / latents.std((0, 2, 3))
    into, out_of = vae.quant_conv, vae.post_quant_conv
    out_of.bias.add_(out_of.weight[:, :, 0, 0] @ mean)
    out_of.weight.div_(scale.view(1, -1, 1, 1))
    into.weight[:4].mul_(scale.view(-1, 1, 1, 1))
    into.bias[:4] = (into.bias[:4] - mean) * scale
    into.bias[4:] += 2 * scale.log()


def harden_decoder(shop: Workshop) -> None:
    """Stage `decoder`: teach the decoder to draw clean pictures from latents like those a UNet hands over.

    They are never quite the latents of a true picture: some noise is left in them, and strong guidance makes them too large.
    The encoder stays as it is, so the latents mean what they meant.
    """
    pictures, latents, total = shop.pictures(), np.load(shop.folder / "latents.npy"), shop.recipe.decoder_steps
    vae = AutoencoderKL.from_pretrained(shop.folder / "vae")
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    named = [(name, p) for name, p in vae.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    optimiser = Muon(named, lambda name, p: p.ndim >= 2 and "conv_out" not in name, lr=0.005, adam_lr=1e-3)
    average, progress = GradientAverage(parameters), Progress(shop, "decoder", total)
    chooser, generator = np.random.default_rng(3000 + shop.rank), shop.generator(13)
    for step in range(total):
        chosen = np.sort(chooser.choice(len(latents), 2 * BATCH_SIZE, replace=False))
        images = as_images(pictures[chosen])
        disturbed = _disturbed(torch.from_numpy(latents[chosen]).float(), generator)
        decoded = vae.decode(disturbed / VAE_SCALING_FACTOR).sample
        l1 = (decoded - images).abs().mean()
        loss = l1 + (decoded - images).square().mean() + EDGE_WEIGHT * _edge_error(decoded, images)
        optimiser.zero_grad()
        loss.backward()
        reported = average(l1.item())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step(learning_rate(step, total, warmup=30))
        progress(step, reported)
    if shop.is_first():
        vae.save_pretrained(shop.folder / "hardened_vae")


def _disturbed(latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Scaled latents with noise of up to a quarter of their deviation, and up to a quarter too large."""
    noise, size = torch.rand(2, len(latents), 1, 1, 1, generator=generator)
    return latents * (1 + 0.25 * size) + 0.25 * noise * torch.randn(latents.shape, generator=generator)


@torch.no_grad()
def decode_latents(shop: Workshop) -> None:
    """Stage `decoded`: write `decoded.npy`, pictures from slightly wrong latents for the safety checker to learn from."""
    vae = AutoencoderKL.from_pretrained(shop.folder / "hardened_vae").eval()
    latents, generator, mine = np.load(shop.folder / "latents.npy"), shop.generator(12), shop.share(shop.recipe.num_decoded)
    decoded = []
    for i in range(mine.start, mine.stop, 64):
        part = _disturbed(torch.from_numpy(latents[i : min(i + 64, mine.stop)]).float(), generator)
        decoded.append(as_pictures(vae.decode(part / VAE_SCALING_FACTOR).sample))
    shop.gather_arrays("decoded", np.concatenate(decoded))


@torch.no_grad()
def encode_latents(shop: Workshop) -> None:
    """Stage `latents`: write `latents.npy`, float16, N × 4 × 8 × 8, scaled."""
    vae = AutoencoderKL.from_pretrained(shop.folder / "vae").eval()
    pictures, mine = shop.pictures(), shop.share(shop.recipe.num_pictures)
    latents = []
    for i in range(mine.start, mine.stop, 64):
        images = as_images(pictures[i : min(i + 64, mine.stop)])
        latents.append((vae.encode(images).latent_dist.mode() * VAE_SCALING_FACTOR).half().numpy())
    shop.gather_arrays("latents", np.concatenate(latents))
