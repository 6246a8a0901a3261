"""LiteLLM's SDK in the matrix. Arguments: the address of HTTP and an API key."""

import io
import sys

import litellm
from matrix_steps import FEW, SIZE, Steps, a_png, check_base64, check_link

http, key = sys.argv[1:]
litellm.telemetry = False
target = {
    "model": "openai/demo",
    "api_base": f"{http}/v1",
    "api_key": key,
    "size": SIZE,
    "prompt": "a red circle",
    "num_retries": 0,
}
steps = Steps("litellm")


def images(**more):
    return litellm.image_generation(**{**target, **more}).data


def edited():
    image = io.BytesIO(a_png())
    image.name = "start.png"
    answer = litellm.image_edit(image=image, extra_body={"num_inference_steps": 4}, **target)
    check_base64(answer.data[0].b64_json)


async def concurrent():
    answer = await litellm.aimage_generation(**target)
    check_base64(answer.data[0].b64_json)


steps.run("text to image", lambda: check_base64(images()[0].b64_json))
steps.run("several images", lambda: [check_base64(one.b64_json) for one in images(n=2)][1])
steps.run("link", lambda: check_link(images()[0].url))
steps.same("own parameters", lambda: check_base64(images(extra_body=FEW)[0].b64_json))
steps.run("image to image", edited)
steps.run("asyncio", concurrent)
steps.refused("errors", "size: width must be a multiple of 8", lambda: images(size="65x64"))
steps.print()
