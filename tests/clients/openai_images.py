"""The OpenAI client, unmodified, against the server whose address is the argument; prints what it saw as one JSON object."""

import base64
import json
import struct
import sys
import urllib.request
import zlib

import openai

address = sys.argv[1]
client = openai.OpenAI(base_url=f"{address}/v1", api_key="studio-key-0123456789", timeout=30)
seen = {"version": openai.__version__}


def failed(call):
    """Class, status and code of the error that the call ends with."""
    try:
        call()
    except openai.APIStatusError as error:
        return [type(error).__name__, error.status_code, error.code]
    except openai.APIError as error:
        return [type(error).__name__, None, error.code]
    return None


extra = {"negative_prompt": "x", "seed": 5, "num_inference_steps": 3, "guidance_scale": 2.0, "scheduler": "pndm"}
made = client.images.generate(prompt="a", n=2, size="128x64", model="fake", extra_body=extra)
seen["data"] = [[base64.b64decode(item.b64_json)[:4].hex(), item.seed, item.nsfw_content_detected] for item in made.data]
seen["stability"] = made.image == made.data[0].b64_json
seen["request_id"] = bool(made._request_id)

linked = client.images.generate(prompt="a", response_format="url", model="fake", extra_body={"seed": -1})
with urllib.request.urlopen(linked.data[0].url) as answer:  # with no key
    seen["url"] = [answer.headers["content-type"], answer.read()[:4].hex(), linked.data[0].b64_json]

without_version = openai.OpenAI(base_url=address, api_key="studio-key-0123456789")
seen["without_version"] = len(without_version.images.generate(prompt="a").data)
azure = openai.AzureOpenAI(azure_endpoint=address, api_key="studio-key-0123456789", api_version="2025-04-01-preview")
seen["azure"] = len(azure.images.generate(prompt="a", model="fake").data)
seen["models"] = [model.id for model in client.models.list()]

events = client.images.generate(prompt="a", stream=True, partial_images=2, extra_body={"num_inference_steps": 12})
seen["events"] = [[event.type, getattr(event, "partial_image_index", None), event.b64_json[:4]] for event in events]


def png(alpha):
    """A file of 64 x 64 pixels, as transparent as this."""
    rows = (b"\0" + bytes([200, 30, 40, alpha]) * 64) * 64
    header = struct.pack(">IIBBBBB", 64, 64, 8, 6, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        file += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return file


def edited(**more):
    return client.images.edit(image=("room.png", png(255), "image/png"), prompt="a", model="fake", **more)


whole = edited(n=2, extra_body={"seed": 5, "strength": 0.5})
masked = edited(mask=("mask.png", png(0), "image/png"), size="64x64")
seen["edits"] = [[item.seed for item in whole.data], [base64.b64decode(item.b64_json)[:4].hex() for item in masked.data]]
varied = client.images.create_variation(image=("room.png", png(255), "image/png"), n=2, size="64x64", model="fake")
seen["variations"] = [base64.b64decode(item.b64_json)[:4].hex() for item in varied.data]
seen["errors"] = {
    "mask": failed(lambda: edited(mask=("mask.png", b"no image", "image/png"))),
    "size": failed(lambda: client.images.generate(prompt="a", size="99x99")),
    "model": failed(lambda: client.images.generate(prompt="a", model="dall-e-3")),
    "unknown": failed(lambda: client.images.generate(prompt="a", extra_body={"steps": 3})),
    "flagged": failed(lambda: client.images.generate(prompt="a skull")),
    "flagged stream": failed(lambda: list(client.images.generate(prompt="a skull", stream=True))),
    "key": failed(lambda: openai.OpenAI(base_url=f"{address}/v1", api_key="wrong").images.generate(prompt="a")),
    "doomed": failed(lambda: client.images.generate(prompt="a", extra_headers={"x-request-id": "doomed"})),
}
print(json.dumps(seen))
