#!/usr/bin/env python3
"""Grade the built-in `demo` model: draw the prompts of each row, and let the pixel detector say what is right.

    python tools/grade_demo_model.py MODEL_DIR                      all rows, with the model's own sampler and steps
    python tools/grade_demo_model.py MODEL_DIR --scheduler pndm --num-inference-steps 50 --guidance-scale 7.5
    python tools/grade_demo_model.py --work WORK_DIR --rows seen    the parts of a training that still runs
    python tools/grade_demo_model.py MODEL_DIR --detector 500       the detector itself, on true pictures

Pictures are graded as drawn, before the safety checker may blacken them; what the checker says is a column of its own.
Nothing of the server takes part: this is plain diffusers, so that the grades are the model's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_model.assemble import DEFAULTS, SCHEDULER_CONFIG
from demo_model.detector import Seen, detect
from demo_model.grading import ROWS, Grade, GradedPrompt, Rates, detector_accuracy, grade, rates
from demo_model.workshop import as_images, as_pictures
from demo_model.world import FORBIDDEN_SHAPE
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image, ImageDraw
from transformers import CLIPTextModel, CLIPTokenizer

SCHEDULERS: dict[str, Any] = {
    "dpm++_2m": DPMSolverMultistepScheduler,
    "pndm": PNDMScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "lms": LMSDiscreteScheduler,
}
COLUMNS = ("background", "number", "colors", "shapes", "places", "right")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """One prompt's picture and all that is known of it; `nsfw_content_detected` is None without a safety checker."""

    prompt: GradedPrompt
    picture: Image.Image
    seen: Seen
    grade: Grade
    nsfw_content_detected: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    scheduler: str
    num_inference_steps: int
    guidance_scale: float
    height: int
    width: int
    seed: int
    batch_size: int


# ---- the model ---------------------------------------------------------------------------------------------------


def load_model(model: Path | None, work: Path | None, unet: Path | None) -> StableDiffusionPipeline:
    """The pipeline of a finished folder, or of the parts a training has written so far; `unet` overrides either's."""
    if model is not None:
        pipeline = StableDiffusionPipeline.from_pretrained(model)
    else:
        assert work is not None
        pipeline = StableDiffusionPipeline(
            vae=AutoencoderKL.from_pretrained(work / "vae"),
            text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder"),
            tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
            unet=UNet2DConditionModel.from_pretrained(unet or work / "unet"),
            scheduler=PNDMScheduler.from_config(SCHEDULER_CONFIG),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    if unet is not None and model is not None:
        pipeline.unet = UNet2DConditionModel.from_pretrained(unet)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampler_of(pipeline: StableDiffusionPipeline, sampling: Sampling) -> Any:
    """The diffusers scheduler that the sampling names, with the model's own settings."""
    return SCHEDULERS[sampling.scheduler].from_config(pipeline.scheduler.config)


@torch.inference_mode()
def draw(pipeline: StableDiffusionPipeline, prompts: list[GradedPrompt], sampling: Sampling) -> list[Drawing]:
    """Draw the prompts in batches; a picture depends on its place in the row and the seed, not on the batch size."""
    drawings: list[Drawing] = []
    for start in range(0, len(prompts), sampling.batch_size):
        batch = prompts[start : start + sampling.batch_size]
        latents = pipeline(
            [prompt.text for prompt in batch],
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            height=sampling.height,
            width=sampling.width,
            generator=[torch.Generator().manual_seed(sampling.seed * 1_000_003 + start + i) for i in range(len(batch))],
            output_type="latent",
        ).images
        images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        flags: list[bool | None] = [None] * len(batch)
        if pipeline.safety_checker is not None:
            units = pipeline.image_processor.postprocess(images, output_type="np")  # what the pipeline itself hands over
            flags = pipeline.run_safety_checker(units, images.device, torch.float32)[1]
        for prompt, pixels, flag in zip(batch, as_pictures(images), flags, strict=True):
            picture = Image.fromarray(pixels)
            seen = detect(picture)
            drawings.append(
                Drawing(prompt=prompt, picture=picture, seen=seen, grade=grade(prompt, seen), nsfw_content_detected=flag)
            )
    return drawings


@torch.inference_mode()
def through_vae(vae: AutoencoderKL, pictures: list[Image.Image]) -> list[Image.Image]:
    """Encode and decode the pictures."""
    decoded: list[Image.Image] = []
    for start in range(0, len(pictures), 32):
        images = as_images(np.stack([np.asarray(picture) for picture in pictures[start : start + 32]]))
        decoded.extend(map(Image.fromarray, as_pictures(vae.decode(vae.encode(images).latent_dist.mode()).sample)))
    return decoded


# ---- reports -----------------------------------------------------------------------------------------------------


def checker_report(drawings: list[Drawing]) -> dict[str, float]:
    """The share the safety checker flags, of all pictures and of those where the detector sees the forbidden shape."""
    checked = [drawing for drawing in drawings if drawing.nsfw_content_detected is not None]
    shown = [drawing for drawing in checked if any(thing.shape == FORBIDDEN_SHAPE for thing in drawing.seen.things)]
    report: dict[str, float] = {}
    if checked:
        report["flagged"] = sum(drawing.nsfw_content_detected is True for drawing in checked) / len(checked)
    if shown:
        report["flagged_of_shown"] = sum(drawing.nsfw_content_detected is True for drawing in shown) / len(shown)
    return report


def print_header() -> None:
    print(f"{'':18}{'n':>5}" + "".join(f"{name:>12}" for name in COLUMNS) + f"{'flagged':>12}")


def print_row(name: str, row: Rates, flagged: float | None = None) -> None:
    cells = "".join(f"{100 * getattr(row, column):11.1f}%" for column in COLUMNS)
    print(f"{name:18}{row.num_pictures:5}{cells}" + (f"{100 * flagged:11.1f}%" if flagged is not None else ""), flush=True)


def write_sheet(drawings: list[Drawing], path: Path, columns: int = 8, zoom: int = 2) -> None:
    """All pictures with their prompts, and under a wrong one what the detector saw instead."""
    side, text_px = 64 * zoom, 46
    width, height = side + 24, side + text_px
    sheet = Image.new("RGB", (width * columns, height * -(-len(drawings) // columns)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, drawing in enumerate(drawings):
        x, y = i % columns * width, i // columns * height
        right = drawing.grade.is_right
        pen.rectangle((x, y, x + width - 3, y + height - 3), outline=(0, 150, 0) if right else (220, 0, 0), width=2)
        sheet.paste(drawing.picture.resize((side, side), Image.Resampling.NEAREST), (x + 11, y + 3))
        asked = drawing.prompt.text.replace(" background", "")
        lines = [asked[:25], asked[25:50].strip()]
        if not right:
            found = ", ".join(f"{thing.color} {thing.shape}" for thing in drawing.seen.things)
            lines.append(f"{drawing.seen.background}: {found}"[:28])
        for line, words in enumerate(lines):
            pen.text((x + 4, y + side + 4 + 12 * line), words, fill=(0, 0, 0) if line < 2 else (200, 0, 0), font_size=9)
    sheet.save(path)


def as_json(rows: dict[str, list[Drawing]], sampling: Sampling) -> str:
    report = {
        "sampling": asdict(sampling),
        "rows": {
            name: asdict(rates(drawing.grade for drawing in drawings)) | checker_report(drawings)
            for name, drawings in rows.items()
        },
        "pictures": {
            name: [
                {
                    "prompt": drawing.prompt.text,
                    "is_right": drawing.grade.is_right,
                    "seen": asdict(drawing.seen),
                    "nsfw_content_detected": drawing.nsfw_content_detected,
                }
                for drawing in drawings
            ]
            for name, drawings in rows.items()
        },
    }
    return json.dumps(report, indent=1) + "\n"


# ---- the command -------------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a diffusers folder")
    parser.add_argument("--work", type=Path, help="instead of a folder: a training's unet, vae, text_encoder, tokenizer")
    parser.add_argument("--unet", type=Path, help="use this UNet instead of the model's own")
    parser.add_argument("--scheduler", choices=sorted(SCHEDULERS), help="the sampler (default: the model's)")
    parser.add_argument("--num-inference-steps", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--prompts", type=int, default=96, help="prompts a row")
    parser.add_argument("--rows", default=",".join(ROWS), help="which rows to grade")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and of the noise")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--detector", type=int, metavar="N", help="grade the detector on N true pictures instead")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write rates and everything seen")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="write all pictures with what was seen in them")
    arguments = parser.parse_args(argv)
    if (arguments.model is None) == (arguments.work is None):
        parser.error("give either a model folder or --work")
    if arguments.prompts < 1:
        parser.error("--prompts must be positive")
    if unknown := sorted(set(arguments.rows.split(",")) - set(ROWS)):
        parser.error(f"unknown rows: {', '.join(unknown)}")
    return arguments


def sampling_of(arguments: argparse.Namespace) -> Sampling:
    """What was asked for, and for the rest the model's defaults."""
    defaults: dict[str, Any] = dict(DEFAULTS)
    if arguments.model is not None and (path := arguments.model / "mii_serve_defaults.json").exists():
        defaults |= json.loads(path.read_text(encoding="utf-8"))
    for name in ("scheduler", "num_inference_steps", "guidance_scale"):
        if (value := getattr(arguments, name)) is not None:
            defaults[name] = value
    return Sampling(
        scheduler=defaults["scheduler"],
        num_inference_steps=defaults["num_inference_steps"],
        guidance_scale=defaults["guidance_scale"],
        height=defaults["height"],
        width=defaults["width"],
        seed=arguments.seed,
        batch_size=arguments.batch_size,
    )


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    if arguments.detector:
        folder = arguments.model or arguments.work
        vae = AutoencoderKL.from_pretrained(folder / "vae")
        print_header()
        print_row("drawn", detector_accuracy(arguments.detector, arguments.seed))
        through = detector_accuracy(arguments.detector, arguments.seed, lambda pictures: through_vae(vae, pictures))
        print_row("through the VAE", through)
        return

    sampling = sampling_of(arguments)
    pipeline = load_model(arguments.model, arguments.work, arguments.unet)
    pipeline.scheduler = sampler_of(pipeline, sampling)
    print(f"{sampling.scheduler}, {sampling.num_inference_steps} steps, guidance {sampling.guidance_scale}")
    print_header()
    rows: dict[str, list[Drawing]] = {}
    start = time.monotonic()
    for name in arguments.rows.split(","):
        rows[name] = draw(pipeline, ROWS[name](arguments.prompts, arguments.seed), sampling)
        report = checker_report(rows[name])
        print_row(name, rates(drawing.grade for drawing in rows[name]), report.get("flagged"))
        if "flagged_of_shown" in report:
            share = 100 * report["flagged_of_shown"]
            print(f"{'':18}the checker flags {share:.1f}% of those that show a {FORBIDDEN_SHAPE}")
    num_pictures = sum(map(len, rows.values()))
    print(f"{num_pictures} pictures, {(time.monotonic() - start) / num_pictures:.2f} s each")
    if arguments.json:
        arguments.json.write_text(as_json(rows, sampling), encoding="utf-8")
    if arguments.sheet:
        write_sheet([drawing for drawings in rows.values() for drawing in drawings], arguments.sheet)


if __name__ == "__main__":
    main(sys.argv[1:])
