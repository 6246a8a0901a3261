"""Scripts written for DeepSpeed-MII, of which only the import has changed, each in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from deployments import WITHOUT_SPARE, read_line, until, without_models
from drawing import largest_difference
from patience import PATIENCE_S
from PIL import Image

from mii_serve.client import Client
from mii_serve.compat.registry import Entry

DEPLOY = """
import mii_serve.compat.mii as mii

mii_configs = {
    "tensor_parallel": 1, "replica_num": 1, "dtype": "fp32", "port_number": 0, "skip_model_check": True,
    "enable_cuda_graph": True, "replace_with_kernel_inject": True,
}
mii.deploy(task="text-to-image",
           model="demo",
           deployment_name="sd v1/4",
           deployment_type=mii.DeploymentType.LOCAL,
           mii_config=mii_configs)
"""
QUERY = """
import sys
import mii_serve.compat.mii as mii

generator = mii.mii_query_handle("sd v1/4")
result = generator.query({"prompt": ["a red circle", "a blue square"], "negative_prompt": ["", "red"]},
                         num_inference_steps=3, guidance_scale=7.3, seed=5)
for i, image in enumerate(result.images):
    image.save(f"{sys.argv[1]}/{i}.png")
print(result.nsfw_content_detected)
"""
TERMINATE = """
import mii_serve.compat.mii as mii

mii.terminate("sd v1/4")
"""


def run(script: str, folder: Path, *arguments: str, has_model: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "MII_SERVE_RUNTIME_DIR": str(folder / "run"), **WITHOUT_SPARE}
    if not has_model:
        environment = without_models(environment)
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)


def ran(script: str, folder: Path, *arguments: str, has_model: bool = True) -> str:
    result = run(script, folder, *arguments, has_model=has_model)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mii")


@pytest.fixture(scope="module")
def entry(folder: Path):
    """Where the first deploy has left the deployment; whatever the tests do, none is left running."""
    ran(DEPLOY, folder)
    entry = Entry("sd v1/4", folder / "run")
    yield entry
    if (process := entry.process()) is not None and process.is_alive():
        os.kill(process.pid, signal.SIGKILL)


def test_deploy_query_and_terminate_from_three_scripts(folder, entry):
    process, address = entry.running()
    flags = json.loads(ran(QUERY, folder, str(folder)).lower())
    with Client(address) as client:
        info = client.server_info()
        assert (info.model, info.dtype, info.deployment_name) == ("demo", "fp32", "sd v1/4")
        for i, (prompt, negative) in enumerate((("a red circle", ""), ("a blue square", "red"))):
            ours = client.generate(
                prompt, negative_prompt=negative, num_inference_steps=3, guidance_scale=7.3, seed=5 + i, timeout=PATIENCE_S
            )
            with Image.open(folder / f"{i}.png") as theirs:  # those two shared their UNet calls; ours is made alone
                assert largest_difference(theirs.tobytes(), ours.images[0].tobytes()) <= 1
            assert flags[i] == ours.nsfw_content_detected[0]

    again = run(DEPLOY, folder)
    assert again.returncode != 0 and "runs already" in again.stderr
    assert process.is_alive()

    ran(TERMINATE, folder)
    assert not process.is_alive()
    for script in (QUERY, TERMINATE):
        result = run(script, folder, str(folder))
        assert result.returncode != 0 and "no deployment 'sd v1/4' of this user runs on this machine" in result.stderr


def test_a_deployment_that_was_killed_is_not_mistaken_for_a_living_one(folder, entry):
    ran(DEPLOY, folder, has_model=False)
    process, _ = entry.running()
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: not process.is_alive(), "the server is gone")
    result = run(QUERY, folder, str(folder))
    assert result.returncode != 0 and "no deployment" in result.stderr
    with entry.starting():
        assert entry.process() is None


def test_what_cannot_start_says_why_and_leaves_nothing_behind(folder):
    for change, text in (
        (('model="demo"', 'model="no/such/folder/model"'), "no/such/folder/model"),
        (('"tensor_parallel": 1', '"tensor_paralel": 1'), "tensor_paralel: MII has no such setting"),
        (('"dtype": "fp32"', '"dtype": "fp16"'), "dtype: fp16 needs a GPU"),
    ):
        result = run(DEPLOY.replace("sd v1/4", "bad").replace(*change), folder)
        assert result.returncode != 0
        assert text in result.stderr.splitlines()[-1], result.stderr
        assert Entry("bad", folder / "run").process() is None


def test_deploy_takes_a_file_in_miis_words_and_terminate_drains_it_where_that_is_allowed(tmp_path):
    file = tmp_path / "mii.yaml"
    described = {"deployment_name": "file", "model_conf": {"model": "demo", "task": "text-to-image", "max_tokens": 99}}
    file.write_text(json.dumps({**described, "port_number": 0}))
    command = [sys.executable, "-m", "mii_serve", "deploy", "--mii-config", str(file)]
    environment = without_models({**os.environ, "MII_SERVE_ENABLE_MII_TERMINATE": "1", **WITHOUT_SPARE})
    terminate = (
        "import sys, mii_serve.compat.mii as mii; mii.MIIClient('text-to-image', 'localhost', int(sys.argv[1])).terminate()"
    )
    with (tmp_path / "log").open("w+") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        try:
            line = read_line(server, log)
            assert line.startswith("ready grpc=127.0.0.1:"), (tmp_path / "log").read_text()
            ran(terminate, tmp_path, line.split()[1].rpartition(":")[2])
            assert server.wait(PATIENCE_S) == 0
        finally:
            server.kill()
            server.communicate(timeout=PATIENCE_S)
    said = (tmp_path / "log").read_text()
    assert "MII's setting max_tokens is ignored" in said
    assert "called Terminate" in said
