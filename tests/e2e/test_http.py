"""HTTP of a real deployment: previews that sharpen, pictures that equal gRPC's, and an end that waits for nobody."""

from __future__ import annotations

import io
import json
import signal
import urllib.request

import numpy as np
from deployments import Deployment, deployed
from patience import PATIENCE_S
from PIL import Image
from web import events_of, picture

from mii_serve.client import Client

PROMPT = "a red circle on a blue background"


def post(deployment: Deployment, path: str, body: object) -> bytes:
    raw = json.dumps(body).encode()
    request = urllib.request.Request(f"http://{deployment.http}{path}", raw, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        return answer.read()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float64)


def test_previews_sharpen_into_the_picture(deployment):
    body = {"prompt": PROMPT, "seed": 11, "num_inference_steps": 16, "stream": True, "partial_images": 3}
    events = events_of(post(deployment, "/v1/images/generations", body).decode())
    *partials, whole = (pixels(picture(value["b64_json"])) for _, value in events)
    assert len(partials) == 3
    distances = [float(np.abs(partial - whole).mean()) for partial in partials]
    assert distances[0] > distances[1] > distances[2] > 0, distances


def test_every_protocol_draws_the_same_picture(deployment):
    settings = {"seed": 7, "num_inference_steps": 6, "guidance_scale": 4.0}
    with Client(deployment.grpc) as client:
        wanted = pixels(client.generate(PROMPT, **settings, timeout=PATIENCE_S).images[0])
    score = {"input_data": {"columns": ["prompt"], "data": [PROMPT], "parameters": settings}}
    drawn = [
        picture(json.loads(post(deployment, "/score", score))[0]["generated_image"]),
        picture(json.loads(post(deployment, "/v1/images/generations", {"prompt": PROMPT, **settings}))["image"]),
        Image.open(io.BytesIO(post(deployment, "/", {"inputs": PROMPT, "parameters": settings}))),
    ]
    for image in drawn:
        assert np.abs(pixels(image) - wanted).max() <= 1


def test_the_checker_blackens_what_it_flags(deployment):
    body = {
        "input_data": {"columns": ["prompt"], "data": [PROMPT, "a skull"], "parameters": {"seed": 3, "num_inference_steps": 4}}
    }
    first, second = json.loads(post(deployment, "/score", body))
    assert (first["nsfw_content_detected"], second["nsfw_content_detected"]) == (False, True)
    assert picture(second["generated_image"]).getextrema() == ((0, 0),) * 3


def test_a_stop_finishes_what_runs():
    body = json.dumps({"prompt": PROMPT, "num_inference_steps": 100, "stream": True}).encode()
    with deployed(has_model=False) as running:
        url = f"http://{running.http}/v1/images/generations"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            assert answer.readline() == b": working\n"
            running.process.send_signal(signal.SIGTERM)
            rest = answer.read().decode()
        assert [name for name, _ in events_of(rest)] == ["image_generation.completed"]
        assert running.process.wait(PATIENCE_S) == 0
