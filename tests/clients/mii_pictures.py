"""Asks a server for pictures with the MIIClient of deepspeed-mii, and tells what it got as the last line of its output.

usage: mii_pictures.py HOST PORT FOLDER; FOLDER holds our package, whose copy of the messages must not be in mii's way.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys

import grpc
from mii.legacy.client import MIIClient
from mii.legacy.grpc_related.proto import legacymodelresponse_pb2 as theirs


def told(result) -> dict:
    return {
        "sizes": [image.size for image in result.images],
        "pixels": [base64.b64encode(image.tobytes()).decode() for image in result.images],
        "nsfw": list(result.nsfw_content_detected),
    }


def refusal(call) -> dict:
    try:
        call()
    except grpc.aio.AioRpcError as error:
        return {"code": error.code().name, "details": error.details()}
    raise SystemExit("this should have been refused")


def fields(message) -> dict:
    """Number and type of each field: what decides the bytes."""
    return {one.name: [one.number, one.type, one.is_repeated] for one in message.DESCRIPTOR.fields}


def main(host: str, port: str, folder: str) -> None:
    sys.path.append(folder)
    from mii_serve.proto.mii import pictures_pb2 as ours

    asyncio.set_event_loop(asyncio.new_event_loop())
    client = MIIClient("text-to-image", host, int(port))
    few = {"num_inference_steps": 3}
    answers = {
        "same": all(fields(getattr(theirs, name)) == fields(getattr(ours, name)) for name in ("Value", "ImageReply")),
        "single": told(client.query({"prompt": "a red circle"}, seed=5, **few)),
        "again": told(client.query({"prompt": "a red circle"}, seed=5, **few)),
        "unseeded": [told(client.query({"prompt": "a red circle"}, **few)) for _ in range(2)],
        "several": told(client.query({"prompt": ["a red circle", "a blue square"]}, seed=7, num_images_per_prompt=2, **few)),
        "negative": told(client.query({"prompt": ["a red circle"], "negative_prompt": ["blue"]}, seed=9, **few)),
        "numbers": told(
            client.query(
                {"prompt": "a green triangle"}, seed=2, height=32, width=48, guidance_scale=7.3, scheduler="ddim", **few
            )
        ),
        "flagged": told(client.query({"prompt": "a white skull on a black background"}, seed=1, num_inference_steps=20)),
        "unknown": refusal(lambda: client.query({"prompt": "a"}, stepps=3)),
        "invalid": refusal(lambda: client.query({"prompt": "a"}, num_inference_steps=-5)),
        "refused": refusal(lambda: client.query({"prompt": "a"}, output_type="np")),
        "terminate": refusal(client.terminate),
        "other": refusal(lambda: MIIClient("text-classification", host, int(port)).query({"query": "a"})),
        "after": told(client.query({"prompt": "a red circle"}, seed=5, **few)),
    }
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
