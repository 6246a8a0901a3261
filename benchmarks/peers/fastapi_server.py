"""A diffusers pipeline behind FastAPI, as tutorials write it. Arguments: folder, port, and `unlocked` to leave the lock out.

A pipeline's scheduler keeps the state of one run, so two calls at once spoil each other's pictures. With the lock they take
turns; many a tutorial has none.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI
from pipeline import answer, draw, load

app = FastAPI()
pipeline = load(sys.argv[1])
lock: Any = contextlib.nullcontext() if "unlocked" in sys.argv else threading.Lock()


@app.post("/v1/images/generations")
def generate(body: dict[str, Any]) -> dict[str, Any]:
    with lock:
        [picture] = draw(pipeline, [body])
    return answer(picture)


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
