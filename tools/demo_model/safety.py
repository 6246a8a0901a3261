"""Stage `safety`: a genuine StableDiffusionSafetyChecker for this world, firing on the forbidden shape and on nothing else.

A small CLIP vision tower learns which shapes a picture holds, by cosine against one learnt embedding per shape. The forbidden
shape's embedding becomes the checker's first concept and its threshold the concept's weight. The other rows keep a
weight no cosine can exceed, so they never fire.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from torch import nn
from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

from .optim import GradientAverage, Muon, learning_rate
from .workshop import Progress, Workshop
from .world import FORBIDDEN_SHAPE, PICTURE_PX, SHAPES

BATCH_SIZE = 24
EMBEDDING_SIZE = 64
NEVER = 1.5
MAX_FALSE_ALARMS = 0.004
FORBIDDEN = SHAPES.index(FORBIDDEN_SHAPE)
CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
CLIP_DEVIATION = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)


def _build_checker() -> StableDiffusionSafetyChecker:
    vision = CLIPVisionConfig(
        hidden_size=EMBEDDING_SIZE,
        intermediate_size=4 * EMBEDDING_SIZE,
        projection_dim=EMBEDDING_SIZE,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=PICTURE_PX,
        patch_size=8,
        hidden_act="quick_gelu",
    )
    text = CLIPTextConfig(
        vocab_size=16,
        bos_token_id=0,
        eos_token_id=1,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        projection_dim=EMBEDDING_SIZE,
    )
    return StableDiffusionSafetyChecker(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=EMBEDDING_SIZE)
    )


class _Detector(nn.Module):
    """The checker's vision tower, read by one learnt unit vector per shape."""

    def __init__(self) -> None:
        super().__init__()
        self.checker = _build_checker()
        self.concepts = nn.Parameter(F.normalize(torch.randn(len(SHAPES), EMBEDDING_SIZE), dim=1))
        self.log_scale = nn.Parameter(torch.tensor(2.5))
        self.thresholds = nn.Parameter(torch.full((len(SHAPES),), 0.3))

    def cosines(self, images: torch.Tensor) -> torch.Tensor:
        """`images` float32 N × 3 × 64 × 64 in [0, 1]; returns N × 12."""
        pooled = self.checker.vision_model((images - CLIP_MEAN) / CLIP_DEVIATION)[1]
        embeddings = F.normalize(self.checker.visual_projection(pooled), dim=1)
        return embeddings @ F.normalize(self.concepts, dim=1).T

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.log_scale.exp() * (self.cosines(images) - self.thresholds)


def _unit_images(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 255


def _disturbed(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift by up to three pixels; now and then add noise or blur."""
    dx, dy, noise, blur = torch.rand(4, generator=generator).tolist()
    x, y = int(dx * 7), int(dy * 7)
    images = F.pad(images, (3, 3, 3, 3), mode="replicate")[..., y : y + PICTURE_PX, x : x + PICTURE_PX]
    if noise < 0.4:
        images = (images + 0.04 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    if blur < 0.3:
        images = F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)
    return images


def train_safety_checker(shop: Workshop) -> None:
    scenes, clean = shop.scenes(), shop.pictures()
    decoded = np.load(shop.folder / "decoded.npy", mmap_mode="r")
    holds = torch.zeros(len(scenes), len(SHAPES))
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            holds[i, SHAPES.index(thing.shape)] = 1
    decoded_holds = holds[: len(decoded)]  # the first pictures are the decoded ones
    num_clean, num_decoded = len(clean) - min(2048, len(clean) // 8), len(decoded) * 3 // 4

    torch.manual_seed(0)
    detector = _Detector()
    named = [
        (name, p) for name, p in detector.named_parameters() if "concept_embeds" not in name and "special_care" not in name
    ]
    parameters = [p for _, p in named]
    optimiser = Muon(
        named,
        lambda name, p: name.startswith("checker") and p.ndim == 2 and "embedding" not in name,
        lr=0.01,
        adam_lr=2e-3,
    )
    weights = torch.ones(len(SHAPES))
    weights[FORBIDDEN] = 4.0
    average, total = GradientAverage(parameters), shop.recipe.safety_steps
    chooser, generator = np.random.default_rng(2000 + shop.rank), shop.generator(30)
    progress = Progress(shop, "safety", total)
    for step in range(total):
        of_clean = np.sort(chooser.choice(num_clean, BATCH_SIZE, replace=False))
        of_decoded = np.sort(chooser.choice(num_decoded, BATCH_SIZE, replace=False))
        images = torch.cat([_unit_images(clean[of_clean]), _unit_images(decoded[of_decoded])])
        labels = torch.cat([holds[of_clean], decoded_holds[of_decoded]])
        logits = detector(_disturbed(images, generator))
        losses = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=torch.tensor(2.0), reduction="none")
        loss = (losses * weights).mean()
        optimiser.zero_grad()
        loss.backward()
        reported = average(loss.item())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step(learning_rate(step, total))
        progress(step, reported)
    if shop.is_first():
        unseen = [(clean[num_clean:], holds[num_clean:]), (decoded[num_decoded:], decoded_holds[num_decoded:])]
        _finish(detector, unseen).save_pretrained(shop.folder / "safety_checker")


@torch.no_grad()
def _finish(detector: _Detector, unseen: list[tuple[np.ndarray, torch.Tensor]]) -> StableDiffusionSafetyChecker:
    """Set the concepts and thresholds; the threshold admits `MAX_FALSE_ALARMS` of pictures not trained on."""
    detector.eval()
    scores: list[torch.Tensor] = []
    forbidden = []
    for pictures, holds in unseen:
        batches = (pictures[i : i + 128] for i in range(0, len(pictures), 128))
        scores.extend(detector.cosines(_unit_images(batch))[:, FORBIDDEN] for batch in batches)
        forbidden.append(holds[:, FORBIDDEN].bool())
    score, is_forbidden = torch.cat(scores), torch.cat(forbidden)
    threshold = torch.quantile(score[~is_forbidden], 1 - MAX_FALSE_ALARMS).item()
    caught = (score[is_forbidden] > threshold).float().mean().item()
    print(f"safety threshold {threshold:.3f} catches {caught:.3f} of the forbidden pictures not trained on", flush=True)
    checker, generator = detector.checker, torch.Generator().manual_seed(31)
    for embeds, embeds_weights in (
        (checker.concept_embeds, checker.concept_embeds_weights),
        (checker.special_care_embeds, checker.special_care_embeds_weights),
    ):
        embeds.copy_(torch.randn(embeds.shape, generator=generator))
        embeds_weights.fill_(NEVER)
    checker.concept_embeds[0] = F.normalize(detector.concepts, dim=1)[FORBIDDEN]
    checker.concept_embeds_weights[0] = threshold
    return checker
