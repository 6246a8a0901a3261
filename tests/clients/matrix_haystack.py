"""Haystack's component for images in the matrix. Arguments: the address of HTTP and an API key."""

import sys

from haystack import Pipeline
from haystack.components.generators import OpenAIImageGenerator
from haystack.utils import Secret
from matrix_steps import SIZE, Steps, check_base64

http, key = sys.argv[1:]
steps = Steps("haystack-ai")


def generator(**more):
    given = {"model": "demo", "size": SIZE, **more}
    made = OpenAIImageGenerator(api_key=Secret.from_token(key), api_base_url=f"{http}/v1", timeout=200, max_retries=0, **given)
    made.warm_up()
    return made


def in_a_pipeline():
    pipeline = Pipeline()
    pipeline.add_component("pictures", generator())
    check_base64(pipeline.run({"pictures": {"prompt": "a red circle"}})["pictures"]["images"][0])


steps.run("text to image", lambda: check_base64(generator().run("a red circle")["images"][0]))
steps.run("in a pipeline", in_a_pipeline)
steps.refused("errors", "size: width must be a multiple of 8", lambda: generator(size="65x64").run("a"))
steps.print()
