"""LiteLLM's proxy in front of the server, asked by OpenAI's client. Arguments: the address of HTTP and an API key."""

import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import openai
from matrix_steps import FEW, SIZE, Steps, a_png, check_base64, check_link

http, key = sys.argv[1:]
own_key = f"sk-{secrets.token_hex(32)}"
steps = Steps("litellm")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_until_up(process, address, log, seconds=200):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health/liveliness", timeout=2)
            return
        except OSError:
            time.sleep(0.5)
    sys.exit(f"the proxy does not start: {log.read_text()[-3000:]}")


def images(**more):
    return client.images.generate(model="pictures", prompt="a red circle", size=SIZE, **more).data


def edited():
    image = ("start.png", a_png(), "image/png")
    answer = client.images.edit(model="pictures", image=image, prompt="a yellow star", size=SIZE)
    check_base64(answer.data[0].b64_json)


with tempfile.TemporaryDirectory() as folder:
    config = Path(folder, "config.yaml")
    model = {"model": "openai/demo", "api_base": f"{http}/v1", "api_key": key}
    entry = {"model_name": "pictures", "litellm_params": model, "model_info": {"mode": "image_generation"}}
    config.write_text(json.dumps({"model_list": [entry], "litellm_settings": {"telemetry": False, "num_retries": 0}}))
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("litellm")),
        "--config",
        str(config),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    with Path(folder, "log").open("w") as log:
        proxy = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "LITELLM_MASTER_KEY": own_key})
    try:
        wait_until_up(proxy, f"http://127.0.0.1:{port}", Path(folder, "log"))
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=own_key, timeout=200, max_retries=0)
        steps.run("text to image", lambda: check_base64(images()[0].b64_json))
        steps.run("several images", lambda: [check_base64(one.b64_json) for one in images(n=2)][1])
        steps.run("link", lambda: check_link(images()[0].url))
        steps.same("own parameters", lambda: check_base64(images(extra_body=FEW)[0].b64_json))
        steps.run("image to image", edited)
        steps.run("models", lambda: {"pictures": None}[client.models.list().data[0].id])
        steps.refused(
            "errors",
            "size: width must be a multiple of 8",
            lambda: client.images.generate(model="pictures", prompt="a", size="65x64"),
        )
    finally:
        proxy.terminate()
        proxy.wait(30)
steps.print()
