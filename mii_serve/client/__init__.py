"""The Python SDK: a local diffusers call becomes a remote one by changing one line.

    from mii_serve.client import Client

    with Client("localhost:50050") as client:
        result = client.generate("a red circle", num_inference_steps=20, seed=7)
        result.images[0].save("circle.png")

`AsyncClient` is the same for asyncio. Every failure is an error from `mii_serve.errors`. `generate` retries what is safe to
repeat, at most `max_retries` times. The SDK needs grpc, protobuf and Pillow, and imports nothing else.
"""

from mii_serve.client.asynchronous import AsyncClient, AsyncGenerationStream
from mii_serve.client.blocking import Client, GenerationStream
from mii_serve.client.results import Event, GenerationResult, PictureReady, PreviewReady
from mii_serve.types import Done, EffectiveParameters, Queued, ReplicaInfo, Restarted, ServerInfo, Started, Step

__all__ = [
    "AsyncClient",
    "AsyncGenerationStream",
    "Client",
    "Done",
    "EffectiveParameters",
    "Event",
    "GenerationResult",
    "GenerationStream",
    "PictureReady",
    "PreviewReady",
    "Queued",
    "ReplicaInfo",
    "Restarted",
    "ServerInfo",
    "Started",
    "Step",
]
