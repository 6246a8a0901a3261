"""Stages `tokenizer` and `text`: the text encoder learns what a caption says before any picture is involved.

It is trained alone to predict the caption's attributes through linear heads that are thrown away afterwards, then frozen.
Training it together with the UNet was far slower.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from .optim import GradientAverage, Muon, learning_rate
from .tokenizer import MAX_TOKENS, build_tokenizer
from .workshop import Progress, Workshop
from .world import ATTRIBUTES, describe, sample_scene

HIDDEN_SIZE = 96
BATCH_SIZE = 48


def make_tokenizer(shop: Workshop) -> None:
    if shop.is_first():
        build_tokenizer(shop.folder / "tokenizer")


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """int64, N × 77."""
    ids = tokenizer(texts, padding="max_length", max_length=MAX_TOKENS, truncation=True).input_ids
    return torch.tensor(ids)


def train_text_encoder(shop: Workshop) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(shop.folder / "tokenizer")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=4 * HIDDEN_SIZE,
        projection_dim=HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="quick_gelu",
    )
    encoder = CLIPTextModel(config)
    heads = nn.ModuleDict({name: nn.Linear(HIDDEN_SIZE, size) for name, size in ATTRIBUTES.items()})
    named = [(f"encoder.{name}", p) for name, p in encoder.named_parameters()]
    named += [(f"heads.{name}", p) for name, p in heads.named_parameters()]
    parameters = [p for _, p in named]
    optimiser = Muon(
        named,
        lambda name, p: name.startswith("encoder") and p.ndim >= 2 and "embedding" not in name,
        lr=0.01,
        adam_lr=3e-3,
    )
    average, rng, total = GradientAverage(parameters), shop.random(10), shop.recipe.text_steps
    generator, progress = shop.generator(11), Progress(shop, "text", total)
    for step in range(total):
        captions = [describe(sample_scene(rng), rng) for _ in range(BATCH_SIZE)]
        ids = token_ids(tokenizer, [caption.text for caption in captions])
        states = encoder(ids).last_hidden_state
        # The end-of-text state and two of the padding after it: the UNet will look at all of them.
        end = (ids == tokenizer.eos_token_id).int().argmax(1)
        later = [end + ((MAX_TOKENS - 1 - end) * torch.rand(BATCH_SIZE, generator=generator)).long() for _ in (0, 1)]
        read = states[torch.arange(BATCH_SIZE)[:, None], torch.stack([end, *later], 1)].flatten(0, 1)
        loss, right = torch.zeros(()), []
        for name, head in heads.items():
            said = torch.tensor([caption.said[name] for caption in captions]).repeat_interleave(3)
            logits = head(read)
            loss = loss + F.cross_entropy(logits, said)
            right.append((logits.argmax(1) == said).float().mean().item())
        optimiser.zero_grad()
        loss.backward()
        reported = average(loss.item())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step(learning_rate(step, total, warmup=20))
        progress(step, reported, f"right {sum(right) / len(right):.3f}")
    if shop.is_first():
        encoder.save_pretrained(shop.folder / "text_encoder")
