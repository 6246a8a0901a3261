"""tritonclient over gRPC and HTTP, sync and asyncio, with the server at these addresses; prints JSON of what it has seen."""

import asyncio
import base64
import json
import queue
import sys

import numpy as np
import tritonclient.grpc as over_grpc
import tritonclient.grpc.aio as over_grpc_aio
import tritonclient.http as over_http
import tritonclient.http.aio as over_http_aio
from tritonclient.utils import InferenceServerException

grpc_address, http_address, model = sys.argv[1:]


def tensors(client, prompts, **settings):
    """What Triton's own examples send: a tensor for each setting."""
    texts = np.array(prompts, dtype=object)
    inputs = [client.InferInput("prompt", list(texts.shape), "BYTES")]
    inputs[0].set_data_from_numpy(texts)
    for name, value in settings.items():
        given = np.array([value[1]], dtype=value[0])
        inputs.append(client.InferInput(name, [1], client_datatype(value[0])))
        inputs[-1].set_data_from_numpy(given)
    return inputs


def client_datatype(kind):
    return {np.int32: "INT32", np.int64: "INT64", np.uint64: "UINT64", np.float32: "FP32"}[kind]


SETTINGS = {
    "num_inference_steps": (np.int32, 3),
    "guidance_scale": (np.float32, 7.3),
    "seed": (np.int64, 5),
    "height": (np.int32, 64),
    "width": (np.int32, 128),
}


def told(result):
    images = result.as_numpy("generated_image").flatten()
    response = result.get_response()
    response = response if isinstance(response, dict) else {"id": response.id, "model_name": response.model_name}
    return {
        "images": [bytes(image[:4]).hex() for image in images],
        "nsfw": result.as_numpy("nsfw_content_detected").tolist(),
        "seeds": result.as_numpy("seed").tolist(),
        "id": response.get("id", ""),
        "model": response["model_name"],
    }


def error_of(call):
    try:
        call()
    except InferenceServerException as error:
        return [error.status(), error.message()]
    return None


def grpc_calls():
    seen = {}
    client = over_grpc.InferenceServerClient(grpc_address)
    seen["live"] = [client.is_server_live(), client.is_server_ready(), client.is_model_ready(model), client.is_model_ready("x")]
    seen["server"] = client.get_server_metadata(as_json=True)["name"]
    metadata = client.get_model_metadata(model)
    seen["inputs"] = {one.name: one.datatype for one in metadata.inputs}
    config = client.get_model_config(model).config
    seen["config"] = [config.max_batch_size, [one.name for one in config.input if not one.optional], config.output[0].data_type]
    seen["index"] = client.get_model_repository_index(as_json=True)["models"]
    seen["infer"] = told(client.infer(model, tensors(over_grpc, ["a", "a skull"], **SETTINGS), request_id="mine"))
    asked = [over_grpc.InferRequestedOutput("seed")]
    few = {"num_inference_steps": 2, "seed": 9, "guidance_scale": 2.5}
    result = client.infer(model, tensors(over_grpc, ["a"]), outputs=asked, parameters=few, timeout=100_000_000, priority=1)
    seen["parameters"] = [result.as_numpy("seed").tolist(), result.as_numpy("generated_image") is None]
    answers = queue.Queue()
    client.async_infer(model, tensors(over_grpc, ["b"], **SETTINGS), lambda result, error: answers.put((result, error)))
    result, error = answers.get(timeout=200)
    seen["async"] = [told(result)["seeds"], error is None]
    seen["errors"] = {
        "model": error_of(lambda: client.infer("x", tensors(over_grpc, ["a"]))),
        "version": error_of(lambda: client.infer(model, tensors(over_grpc, ["a"]), model_version="7")),
        "rule": error_of(lambda: client.infer(model, tensors(over_grpc, ["a"], height=(np.int32, 99)))),
        "huge": error_of(lambda: client.infer(model, tensors(over_grpc, ["a" * 100_000_000]))),
        "load": error_of(lambda: client.load_model(model)),
        "shared memory": error_of(lambda: client.register_system_shared_memory("a", "/a", 4)),
        "doomed": error_of(lambda: client.infer(model, tensors(over_grpc, ["a"]), headers={"x-request-id": "doomed"})),
        "late": error_of(lambda: client.infer(model, tensors(over_grpc, ["held"]), timeout=200_000)),
        "client timeout": error_of(lambda: client.infer(model, tensors(over_grpc, ["held"]), client_timeout=0.2)),
    }
    call = client.async_infer(model, tensors(over_grpc, ["held"]), lambda result, error: answers.put((result, error)))
    call.cancel()
    result, error = answers.get(timeout=200)
    seen["cancelled"] = [result is None, "ancelled" in str(error)]
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer(model, tensors(over_grpc, ["a"]))
    result, error = answers.get(timeout=200)
    client.stop_stream()
    seen["stream"] = [result is None, str(error)]
    client.close()
    return seen


async def grpc_aio_calls():
    async with over_grpc_aio.InferenceServerClient(grpc_address) as client:
        calls = [client.infer(model, tensors(over_grpc, [text], **SETTINGS)) for text in ("a", "b", "c")]
        return [told(result)["seeds"] for result in await asyncio.gather(*calls)]


def http_calls():
    seen = {}
    client = over_http.InferenceServerClient(http_address, concurrency=2, network_timeout=200, connection_timeout=200)
    seen["live"] = [client.is_server_live(), client.is_server_ready(), client.is_model_ready(model), client.is_model_ready("x")]
    seen["server"] = client.get_server_metadata()["name"]
    seen["inputs"] = {one["name"]: one["datatype"] for one in client.get_model_metadata(model, model_version="1")["inputs"]}
    config = client.get_model_config(model)
    seen["config"] = [config["max_batch_size"], [one["name"] for one in config["input"] if not one["optional"]]]
    seen["index"] = client.get_model_repository_index()
    seen["infer"] = told(client.infer(model, tensors(over_http, ["a", "a skull"], **SETTINGS), request_id="mine"))
    inputs = tensors(over_http, ["a"])
    inputs[0].set_data_from_numpy(np.array(["a"], dtype=object), binary_data=False)
    asked = [over_http.InferRequestedOutput("generated_image", binary_data=False), over_http.InferRequestedOutput("seed")]
    result = client.infer(model, inputs, outputs=asked, parameters={"seed": 9, "num_inference_steps": 2})
    [text] = result.as_numpy("generated_image").tolist()
    seen["json"] = [base64.b64decode(text)[:4].hex(), result.as_numpy("seed").tolist()]
    waiting = [client.async_infer(model, tensors(over_http, [text], **SETTINGS)) for text in ("a", "b")]
    seen["async"] = [told(one.get_result())["seeds"] for one in waiting]
    seen["errors"] = {
        "model": error_of(lambda: client.infer("x", tensors(over_http, ["a"]))),
        "rule": error_of(lambda: client.infer(model, tensors(over_http, ["a"], height=(np.int32, 99)))),
        "huge": error_of(lambda: client.infer(model, tensors(over_http, ["a" * 10_000_000]))),
        "load": error_of(lambda: client.load_model(model)),
        "late": error_of(lambda: client.infer(model, tensors(over_http, ["held"]), timeout=200_000)),
        "compressed": error_of(lambda: client.infer(model, tensors(over_http, ["a"]), request_compression_algorithm="gzip")),
    }
    client.close()
    return seen


async def http_aio_calls():
    async with over_http_aio.InferenceServerClient(http_address) as client:
        return told(await client.infer(model, tensors(over_http, ["a"], **SETTINGS)))["seeds"]


print(
    json.dumps(
        {
            "grpc": grpc_calls(),
            "grpc aio": asyncio.run(grpc_aio_calls()),
            "http": http_calls(),
            "http aio": asyncio.run(http_aio_calls()),
        }
    )
)
