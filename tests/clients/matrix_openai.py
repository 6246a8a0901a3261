"""OpenAI's client for Python in the matrix. Arguments: the address of HTTP and an API key."""

import sys

import openai
from matrix_steps import FEW, SIZE, Steps, a_png, check_base64, check_link

http, key = sys.argv[1:]
client = openai.OpenAI(base_url=f"{http}/v1", api_key=key, timeout=200)
steps = Steps("openai")


def images(**more):
    return client.images.generate(model="demo", prompt="a red circle", size=SIZE, **more).data


def streamed():
    events = list(client.images.generate(model="demo", prompt="a", size=SIZE, stream=True, partial_images=2, extra_body=FEW))
    assert [event.type for event in events][-1] == "image_generation.completed"
    check_base64(events[-1].b64_json)


def edited():
    image = ("start.png", a_png(), "image/png")
    answer = client.images.edit(
        model="demo", image=image, prompt="a yellow star", size=SIZE, extra_body={"num_inference_steps": 4}
    )
    check_base64(answer.data[0].b64_json)


def varied():
    image = ("start.png", a_png(), "image/png")
    check_base64(
        client.images.create_variation(model="demo", image=image, size=SIZE, response_format="b64_json").data[0].b64_json
    )


async def concurrent():
    async with openai.AsyncOpenAI(base_url=f"{http}/v1", api_key=key) as aio:
        answer = await aio.images.generate(model="demo", prompt="a red circle", size=SIZE, extra_body=FEW)
        check_base64(answer.data[0].b64_json)


steps.run("text to image", lambda: check_base64(images(response_format="b64_json")[0].b64_json))
steps.run("several images", lambda: [check_base64(one.b64_json) for one in images(n=2, response_format="b64_json")][1])
steps.run("link", lambda: check_link(images(response_format="url")[0].url))
steps.same("own parameters", lambda: check_base64(images(extra_body=FEW)[0].b64_json))
steps.run("previews", streamed)
steps.run("image to image", edited)
steps.run("variations", varied)
steps.run("asyncio", concurrent)
steps.run("models", lambda: {"demo": None}[client.models.list().data[0].id.rpartition("/")[2]])
steps.refused("errors", "size: width must be a multiple of 8", lambda: client.images.generate(prompt="a", size="65x64"))
steps.print()
