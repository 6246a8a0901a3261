"""LangChain's wrapper and tool for images in the matrix. Arguments: the address of HTTP and an API key."""

import sys

from langchain_community.tools.openai_dalle_image_generation import OpenAIDALLEImageGenerationTool
from langchain_community.utilities.dalle_image_generator import DallEAPIWrapper
from matrix_steps import FEW, SIZE, Steps, check_link

http, key = sys.argv[1:]
steps = Steps("langchain-community")


def wrapper(**more):
    return DallEAPIWrapper(base_url=f"{http}/v1", api_key=key, model="demo", size=SIZE, max_retries=0, **more)


steps.run("text to image", lambda: check_link(wrapper().run("a red circle")))
steps.run("several images", lambda: [check_link(url) for url in wrapper(n=2).run("a red circle").splitlines() if url][1])
steps.run("link", lambda: check_link(wrapper().run("a red circle")))
steps.same("own parameters", lambda: check_link(wrapper(model_kwargs={"extra_body": FEW}).run("a red circle")))
steps.run(
    "as an agent's tool", lambda: check_link(OpenAIDALLEImageGenerationTool(api_wrapper=wrapper()).invoke("a red circle"))
)
steps.refused("errors", "size: width must be a multiple of 8", lambda: wrapper().model_copy(update={"size": "65x64"}).run("a"))
steps.print()
