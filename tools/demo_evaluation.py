#!/usr/bin/env python3
"""Prompts, true pictures and a grader to evaluate the built-in `demo` model with `mii_serve evaluate`.

    python tools/demo_evaluation.py FOLDER
    PYTHONPATH=tools mii_serve evaluate FOLDER/prompts.jsonl -o OUT --guidance 1.5,2,3,4,5,6,7,8 \\
        --reference FOLDER/reference --grader demo_evaluation:grade

Prompts and true pictures are two independent draws from one world, without what the safety checker fires on: each prompt
describes one scene, each true picture is another scene as the world draws it. The grader is the pixel detector.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from demo_model.detector import detect
from demo_model.grading import GradedPrompt, prompt_for
from demo_model.grading import grade as compare
from demo_model.world import FORBIDDEN_SHAPE, Scene, render, sample_scene
from PIL import Image


def grade(line: Mapping[str, Any], picture: Image.Image) -> dict[str, bool]:
    """Whether everything is as the prompt asks, and which parts are."""
    things = tuple((color, shape) for color, shape in line["things"])
    prompt = GradedPrompt(text=line["prompt"], background=line["background"], things=things, layout=line["layout"])
    found = compare(prompt, detect(picture))
    return {"right": found.is_right, **asdict(found)}


def scenes(random_source: random.Random) -> Iterator[Scene]:
    """Scenes of the world that show something, and nothing forbidden."""
    while True:
        scene = sample_scene(random_source)
        if scene.things and all(thing.shape != FORBIDDEN_SHAPE for thing in scene.things):
            yield scene


def write(folder: Path, num_prompts: int, num_pictures: int, seed: int) -> None:
    reference = folder / "reference"
    reference.mkdir(parents=True, exist_ok=True)
    prompts = [prompt_for(scene) for scene in islice(scenes(random.Random(f"prompts {seed}")), num_prompts)]
    with (folder / "prompts.jsonl").open("w") as file:
        for prompt in prompts:
            asked = {"background": prompt.background, "things": prompt.things, "layout": prompt.layout}
            file.write(json.dumps({"prompt": prompt.text, **asked}) + "\n")
    source = random.Random(f"reference {seed}")
    for number, scene in enumerate(islice(scenes(source), num_pictures)):
        render(scene, source).save(reference / f"{number:05d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--pictures", type=int, default=1000, help="true pictures")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.folder, arguments.prompts, arguments.pictures, arguments.seed)


if __name__ == "__main__":
    main()
