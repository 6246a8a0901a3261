"""AUTOMATIC1111's API with the client `webuiapi` as it is: HOST PORT KEY. Prints what it got, as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from PIL import Image
from webuiapi import WebUIApi


def refused(call: Callable[[], object]) -> tuple[int, str]:
    try:
        call()
    except RuntimeError as error:
        return error.args[0], json.loads(error.args[1])["body"]
    return 0, ""


def main(host: str, port: str, key: str) -> None:
    api = WebUIApi(host=host, port=int(port), sampler="PLMS", steps=4, username="anybody", password=key)
    drawn = api.txt2img(prompt="a", negative_prompt="b", seed=5, width=64, height=64, batch_size=2, n_iter=2)
    start = Image.effect_noise((96, 64), 60).convert("RGBA")
    mask = Image.new("L", (96, 64))
    size = {"width": 96, "height": 64}
    again = api.img2img(images=[start], prompt="a", seed=3, denoising_strength=0.5, **size)
    part = api.img2img(images=[start], mask_image=mask, inpaint_full_res=False, mask_blur=0, prompt="a", seed=3, **size)
    api.util_set_model("fake")
    stranger = WebUIApi(host=host, port=int(port))
    told = {
        "images": [image.size for image in drawn.images],
        "seeds": drawn.info["all_seeds"],
        "infotext": drawn.info["infotexts"][0],
        "read": api.png_info(drawn.image).info.split("\n")[0],
        "parameters": [drawn.parameters[name] for name in ("prompt", "seed", "steps", "width", "sampler_name", "batch_size")],
        "img2img": [again.image.size, again.parameters["init_images"], again.info["denoising_strength"]],
        "inpaint": part.image.size,
        "model": [api.util_get_current_model(), api.util_get_model_names()],
        "samplers": api.util_get_sampler_names(),
        "schedulers": api.util_get_scheduler_names(),
        "lists": [api.get_upscalers(), api.get_loras(), api.get_sd_vae(), api.get_embeddings()["loaded"]],
        "progress": api.get_progress()["progress"],
        "interrupt": [api.interrupt(), api.skip()],
        "memory": sorted(api.get_memory()),
        "refused": [
            refused(lambda: api.txt2img(prompt="a", enable_hr=True)),
            refused(lambda: api.txt2img(prompt="a", sampler_name="DPM fast")),
            refused(lambda: api.img2img(images=[start], mask_image=mask, prompt="a")),
            refused(lambda: stranger.txt2img(prompt="a")),
        ],
    }
    print(json.dumps(told))


main(*sys.argv[1:])
