"""tritonclient in the matrix. Arguments: the addresses of HTTP and gRPC and an API key."""

import sys

import numpy as np
import tritonclient.grpc as over_grpc
import tritonclient.grpc.aio as over_grpc_aio
import tritonclient.http as over_http
from matrix_steps import SIZE, Steps, check_png

http, grpc, key = sys.argv[1:]
steps = Steps("tritonclient")
width, height = map(int, SIZE.split("x"))
settings = {"width": width, "height": height, "num_inference_steps": 3, "negative_prompt": "blurry", "seed": 5}


def headers():
    """A dictionary for each call: the client over HTTP adds to the one that it is given what the one over gRPC refuses."""
    return {"authorization": f"Bearer {key}"}


def client_of(module):
    return module.InferenceServerClient(grpc if module is not over_http else http.partition("://")[2])


def tensors(module, *prompts):
    prompt = (over_grpc if module is over_grpc_aio else module).InferInput("prompt", [len(prompts)], "BYTES")
    prompt.set_data_from_numpy(np.array(prompts, dtype=object))
    return [prompt]


def images(module, *prompts, **more):
    result = client_of(module).infer("demo", tensors(module, *prompts), parameters={**settings, **more}, headers=headers())
    return [check_png(bytes(image)) for image in result.as_numpy("generated_image")]


async def concurrent():
    async with client_of(over_grpc_aio) as client:
        await client.infer("demo", tensors(over_grpc_aio, "a"), parameters=settings, headers=headers())


def streamed():
    client, seen = client_of(over_grpc), []
    client.start_stream(lambda result, error: seen.append(error), headers=headers())
    client.async_stream_infer("demo", tensors(over_grpc, "a"))
    client.stop_stream()
    if seen[0] is not None:
        raise seen[0]


steps.run("text to image", lambda: images(over_grpc, "a red circle")[0])
steps.run("text to image over HTTP", lambda: images(over_http, "a red circle")[0])
steps.run("several images", lambda: images(over_grpc, "a", "b")[1])
steps.same("own parameters", lambda: images(over_grpc, "a", scheduler="euler")[0])
steps.run("asyncio", concurrent)
steps.run("models", lambda: {True: None}[client_of(over_grpc).is_model_ready("demo", headers=headers())])
steps.run("previews", streamed)
steps.refused("errors", "parameters.width: must be a multiple of 8", lambda: images(over_grpc, "a", width=65))
steps.print()
