"""DeepSpeed-MII's own text-to-image server, `serve_inference` of mii.legacy, as it is installed. Arguments: folder, port.

Its pipeline runs on the CPU without DeepSpeed's kernels, which need a GPU: what is compared is how it serves. MII's wire has
no seed; the pipeline here takes one from the query's keyword arguments, so that its pictures can be checked at all.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from mii.legacy.grpc_related.modelresponse_server import serve_inference
from pipeline import load


class SeededPipeline(StableDiffusionPipeline):
    def __call__(self, *arguments: Any, seed: int | None = None, **named: Any) -> Any:
        if seed is not None:
            named["generator"] = torch.Generator("cpu").manual_seed(seed)
        return super().__call__(*arguments, **named)


if __name__ == "__main__":
    serve_inference(load(sys.argv[1], SeededPipeline), int(sys.argv[2]))
