#!/usr/bin/env python3
"""Grade the shipped `demo` model as its documentation states it, and write the figures and pictures into docs/.

python tools/publish_demo_grades.py             grade, then write the JSON, the table and the pictures
python tools/publish_demo_grades.py --render    only write the table again from the JSON
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from demo_model.grading import ROWS, GradedPrompt, rates
from grade_demo_model import Drawing, Sampling, checker_report, draw, load_model, sampler_of, write_sheet
from PIL import Image, ImageDraw

from mii_serve.config import LimitsConfig
from mii_serve.models import load_model as load_served_model

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "mii_serve" / "models" / "demo"
PAGE = ROOT / "docs" / "demo_model.md"
GRADES = ROOT / "docs" / "demo_model_grades.json"
IMAGES = ROOT / "docs" / "images"
NUM_PROMPTS = 96
START, END = "<!-- grades: written by tools/publish_demo_grades.py -->\n", "<!-- end of grades -->"
PNDM_ROWS = ("held_out_triples", "held_out_pairs")

NAMES = {
    "held_out_triples": "one object, colour + shape + background never seen together",
    "held_out_pairs": "one object, colour + shape never seen together",
    "seen": "one object, combination seen in training",
    "counts": "two or three of a kind",
    "relations": "two objects in a relation",
    "forbidden": "the forbidden shape",
    "innocent": "everything but the forbidden shape",
}
SHOWCASE = (
    "a red circle on a blue background",
    "a yellow star on a black background",
    "a white heart on a purple background",
    "two green trees on a white background",
    "an orange moon above a gray house",
    "three pink rings on a brown background",
    "a blue diamond to the left of a red cross",
    "a big black house on a yellow background",
)


def model_sampling() -> Sampling:
    """The sampling the model declares for itself."""
    declared = json.loads((MODEL / "mii_serve_defaults.json").read_text(encoding="utf-8"))
    names = ("scheduler", "num_inference_steps", "guidance_scale", "height", "width")
    return Sampling(**{name: declared[name] for name in names}, seed=0, batch_size=16)


def pndm_sampling() -> Sampling:
    """Stable Diffusion's own defaults."""
    return replace(model_sampling(), scheduler="pndm", num_inference_steps=50, guidance_scale=7.5)


def drawings_of(row: str, sampling: Sampling, num_prompts: int = NUM_PROMPTS) -> list[Drawing]:
    """The pictures of one row of the grades."""
    pipeline = load_model(MODEL, None, None)
    pipeline.scheduler = sampler_of(pipeline, sampling)
    return draw(pipeline, ROWS[row](num_prompts, sampling.seed), sampling)


def grade_all() -> dict[str, Any]:
    served = load_served_model("demo", revision=None, dtype="fp32", device="cpu", limits=LimitsConfig())
    report: dict[str, Any] = {"model_revision": served.revision, "tables": []}
    for sampling, rows in ((model_sampling(), tuple(NAMES)), (pndm_sampling(), PNDM_ROWS)):
        graded = {row: drawings_of(row, sampling) for row in rows}
        summary = {row: asdict(rates(d.grade for d in drawn)) | checker_report(drawn) for row, drawn in graded.items()}
        report["tables"].append({"sampling": asdict(sampling), "rows": summary})
        if sampling == model_sampling():
            IMAGES.mkdir(exist_ok=True)
            for row in ("held_out_triples", "relations"):
                write_sheet(graded[row][:48], IMAGES / f"demo_{row}.png")
    return report


def table(report: dict[str, Any]) -> str:
    """The grades as Markdown."""
    lines = [f"Model revision `{report['model_revision']}`, {NUM_PROMPTS} prompts a row, graded by the pixel detector.", ""]
    for part in report["tables"]:
        sampling = part["sampling"]
        how = f"{sampling['scheduler']}, {sampling['num_inference_steps']} steps, guidance {sampling['guidance_scale']:g}"
        lines += [f"| {how} | background | colours | shapes | all right | flagged |", "|---|---|---|---|---|---|"]
        for row, found in part["rows"].items():
            shares = [f"{100 * found[name]:.1f} %" for name in ("background", "colors", "shapes", "right", "flagged")]
            lines.append(f"| {NAMES[row]} | {' | '.join(shares)} |")
        lines.append("")
    return "\n".join(lines)


def page_with(text: str, page: str) -> str:
    before, rest = page.split(START)
    return before + START + text + END + rest.split(END)[1]


def write_showcase(path: Path, columns: int = 4, side: int = 160) -> None:
    """Pictures under their prompts, for the README."""
    sampling = replace(model_sampling(), seed=3)
    pipeline = load_model(MODEL, None, None)
    pipeline.scheduler = sampler_of(pipeline, sampling)
    prompts = [GradedPrompt(text=text, background="", things=(), layout="one") for text in SHOWCASE]
    pictures = [drawing.picture for drawing in draw(pipeline, prompts, sampling)]
    width, height = side + 24, side + 44
    sheet = Image.new("RGB", (width * columns, height * -(-len(pictures) // columns)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (text, picture) in enumerate(zip(SHOWCASE, pictures, strict=True)):
        x, y = i % columns * width + 12, i // columns * height + 8
        sheet.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        words, middle = text.split(" "), len(text.split(" ")) // 2
        for line, part in enumerate((words[:middle], words[middle:])):
            pen.text((x, y + side + 3 + 14 * line), " ".join(part), fill=(60, 60, 60), font_size=12)
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true")
    if not parser.parse_args().render:
        GRADES.write_text(json.dumps(grade_all(), indent=1) + "\n", encoding="utf-8")
        write_showcase(IMAGES / "demo.png")
    text = table(json.loads(GRADES.read_text(encoding="utf-8")))
    PAGE.write_text(page_with(text, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
