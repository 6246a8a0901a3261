#!/usr/bin/env python3
"""Train the built-in `demo` model on two CPU cores and write it as a diffusers folder.

    python tools/train_demo_model.py --out DIR                  the full recipe, about an hour and a half
    python tools/train_demo_model.py --out DIR --scale 0.01     a smoke test, minutes

Stages run in order and leave their results in DIR.work; `--stages unet,safety,assemble` takes up from there. The recipe, its
reasons and the measured results are in docs/demo_model.md.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from demo_model.assemble import assemble
from demo_model.safety import train_safety_checker
from demo_model.text import make_tokenizer, train_text_encoder
from demo_model.unet import train_unet
from demo_model.vae import decode_latents, encode_latents, harden_decoder, train_vae
from demo_model.workshop import Recipe, make_pictures, run_ranks

STAGES = {
    "data": make_pictures,
    "tokenizer": make_tokenizer,
    "text": train_text_encoder,
    "vae": train_vae,
    "latents": encode_latents,
    "decoder": harden_decoder,
    "decoded": decode_latents,
    "unet": train_unet,
    "safety": train_safety_checker,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--scale", type=float, default=1.0, help="multiply every step count")
    parser.add_argument("--stages", default=",".join([*STAGES, "assemble"]), help="which stages to run")
    parser.add_argument("--ranks", type=int, default=2, help="single-thread processes to train on")
    arguments = parser.parse_args()
    stages = arguments.stages.split(",")
    if unknown := sorted(set(stages) - {*STAGES, "assemble"}):
        parser.error(f"unknown stages: {', '.join(unknown)}")

    work = arguments.out.with_name(arguments.out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)
    recipe = Recipe().scaled(arguments.scale)
    for name in stages:
        start = time.monotonic()
        if name == "assemble":
            assemble(work, arguments.out)
        else:
            run_ranks(STAGES[name], work, recipe, arguments.ranks)
        print(f"== {name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
