"""huggingface_hub's client in the matrix. Arguments: the address of HTTP and an API key."""

import io
import sys

from huggingface_hub import AsyncInferenceClient, InferenceClient
from matrix_steps import SIZE, Steps, a_png, check_png

http, key = sys.argv[1:]
steps = Steps("huggingface_hub")
width, height = map(int, SIZE.split("x"))
settings = {"width": width, "height": height, "num_inference_steps": 3, "negative_prompt": "blurry"}


def client(kind=InferenceClient, path=""):
    return kind(model=f"{http}{path}", provider="hf-inference", token=key, timeout=200)


def bytes_of(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return check_png(file.getvalue())


async def concurrent():
    bytes_of(await client(AsyncInferenceClient).text_to_image("a red circle", **settings))


steps.run("text to image", lambda: bytes_of(client().text_to_image("a red circle", **settings)))
steps.same("own parameters", lambda: bytes_of(client().text_to_image("a", seed=5, **settings)))
steps.run("model in the address", lambda: bytes_of(client(path="/models/demo").text_to_image("a red circle", **settings)))
steps.run("asyncio", concurrent)
steps.run("image to image", lambda: bytes_of(client().image_to_image(a_png(), prompt="a yellow star")))
steps.refused("errors", "parameters.width: must be a multiple of 8", lambda: client().text_to_image("a", width=65))
steps.print()
