"""The notebooks of Azure's catalog from the first cell to the last, with Azure's own client and a stub of its control plane.

What the client uploads is what runs: the stub keeps the resources and blobs that it is sent, an online deployment is a server
with the variables that were put, and a batch job runs the uploaded code over the uploaded files.
"""

from __future__ import annotations

import json
import os
import shutil
import ssl
import sys
from pathlib import Path

import pytest
import trustme
import yaml
from azureml_batch import FOLDER, NOTEBOOK_PROMPTS, SAFE_NOTEBOOK_PROMPTS, VIOLENT
from azureml_stub import BatchJob, azure_stub
from content_safety_double import KEY, double_in_a_thread
from deployments import deployed
from outside import ROOT, run_client
from PIL import Image

from mii_serve.models.source import DEMO_FOLDER

IDENTITY = "identity of the endpoint"


class Machine:
    """What Azure provides to a deployment beside its own variables: the model, an identity, a place to write."""

    def __init__(self, folder: Path, identity: dict[str, str]) -> None:
        self.folder = folder
        shutil.copytree(DEMO_FOLDER, folder / "model" / "mlflow_model_folder" / "artifacts" / "INPUT_model_path")
        python = folder / "python"
        python.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\n')
        python.chmod(0o755)
        (folder / "tmp").mkdir()
        self.variables = {
            **identity,
            "AZUREML_MODEL_DIR": str(folder / "model"),
            "MII_SERVE_PYTHON": str(python),
            "MII_SERVE_ENABLE_SPARE_PROCESS": "0",
            "MII_SERVE_MAX_SLOTS": "4",
            "TMPDIR": str(folder / "tmp"),
        }

    def run_job(self, job: BatchJob) -> None:
        put = job.deployment
        script = job.code / put["codeConfiguration"]["scoringScript"]
        settings = {
            "mini_batch_size": put["miniBatchSize"],
            "max_retries": put["retrySettings"]["maxRetries"],
            "error_threshold": put["errorThreshold"],
            "output_file_name": put["outputFileName"],
        }
        arguments = (str(script), str(job.source), str(job.output), json.dumps(settings))
        environment = {**put["environmentVariables"], **self.variables}
        told = json.loads(run_client("mlflow", "azureml_parallel_run.py", *arguments, env=environment))
        assert (told["num_failed"], told["errors"]) == (0, [])


@pytest.mark.parametrize("is_safe", [False, True], ids=["plain", "safe"])
def test_the_notebooks_run_from_the_first_cell_to_the_last(tmp_path, is_safe):
    authority = trustme.CA()
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    authority.cert_pem.write_to_path(str(tmp_path / "safety.pem"))
    folder = tmp_path / "deployment" / "azureml"
    shutil.copytree(FOLDER, folder)
    (tmp_path / "build" / "azureml").mkdir(parents=True)
    shutil.copy(FOLDER / "environment" / "Dockerfile", tmp_path / "build" / "azureml")
    few = json.dumps({"num_inference_steps": 2, "seed": 7})
    suffix = "-safe" if is_safe else ""
    batch, online = f"batch-deployment{suffix}.yaml", f"deployment{suffix}.yaml"
    changes = {batch: {"settings.environment_variables.MII_SERVE_BATCH_PARAMETERS": few}}
    (tmp_path / "request.json").write_text(
        json.dumps(
            {
                "input_data": {
                    "columns": ["prompt"],
                    "data": ["a red circle", "a skull"],
                    "index": [0, 1],
                    "parameters": {"num_inference_steps": 2, "seed": 3},
                }
            }
        )
    )
    prompts = SAFE_NOTEBOOK_PROMPTS if is_safe else NOTEBOOK_PROMPTS

    with double_in_a_thread(tls) as double:
        double.token, double.client_id, double.words = "a-token", IDENTITY, {VIOLENT: ("Violence", 2)}
        identity = {
            "SSL_CERT_FILE": str(tmp_path / "safety.pem"),
            "MSI_ENDPOINT": f"{double.url}/msi/compute",
            "MSI_SECRET": KEY,
        }
        machine = Machine(tmp_path, identity)
        for file, place in ((batch, "settings.environment_variables"), (online, "environment_variables")) if is_safe else ():
            changes.setdefault(file, {})[f"{place}.CONTENT_SAFETY_ENDPOINT"] = double.url
            changes[file][f"{place}.UAI_CLIENT_ID"] = IDENTITY
        variables = yaml.safe_load((FOLDER / online).read_text())["environment_variables"]
        variables |= {field.rpartition(".")[2]: value for field, value in changes.get(online, {}).items()}
        with (
            deployed("--host", "127.0.0.1", env={**variables, **machine.variables}) as server,
            azure_stub(tmp_path / "job", machine.run_job, f"http://{server.http}/score") as stub,
        ):
            (tmp_path / "ca.pem").write_bytes(stub.ca_pem)
            asked = {"is_safe": is_safe, "changes": changes, "folder": str(tmp_path / "out"), "prompts": prompts}
            asked["request"] = str(tmp_path / "request.json")
            environment = {
                **os.environ,
                "REQUESTS_CA_BUNDLE": str(tmp_path / "ca.pem"),
                "SSL_CERT_FILE": str(tmp_path / "ca.pem"),
            }
            arguments = (str(folder), str(stub.port), json.dumps(asked))
            told = json.loads(run_client("azureml", "azureml_notebooks.py", *arguments, env=environment).splitlines()[-1])

        put = stub.put[f"onlineendpoints/stable-diffusion{suffix}/deployments/blue"]["properties"]
        assert put["environmentVariables"] == variables, "the server that answered ran with what was put"
        assert bool(double.num_tokens) is is_safe and not double.refused
        assert ({"a red circle", *prompts} <= set(double.texts)) is is_safe

    assert stub.unknown == [], "calls that the stub does not know"
    assert [entry["prompt"] for entry in told["online"]] == ["a red circle", "a skull"]
    assert [entry["nsfw_content_detected"] for entry in told["online"]] == [False, True]
    with Image.open(tmp_path / "out" / "online" / "0.png") as image:
        assert image.size == (64, 64)

    rows = told["batch"]
    wanted = [(f"{n - n % 2}batch_input.csv", str(n % 2), prompt) for n, prompt in enumerate(prompts)]
    assert [(row["input_csv_name"], row["row_number_per_file"], row["prompt"]) for row in rows] == wanted
    downloaded = tmp_path / "out" / "batch" / "generated_images" / "named-outputs" / "score"
    blocked = [row["prompt"] for row in rows if row["generated_image"] == "Blocked By Azure AI Content Safety"]
    assert blocked == ([VIOLENT] if is_safe else [])
    names = {row["generated_image"] for row in rows} - {"Blocked By Azure AI Content Safety"}
    assert {path.name for path in downloaded.glob("*.png")} == names and len(names) == 3

    uploaded = {
        name.rpartition("/")[2]
        for name in stub.blobs
        if "/azureml/" in name and "score/" not in name and "LocalUpload" not in name
    }
    assert uploaded == {"score.py", "batch_score.py", "batch_worker.py", "parallel_run_step.settings.json"}
    assert stub.put["onlineendpoints/stable-diffusion" + suffix]["properties"]["traffic"] == {"blue": 100}
    assert not [name for name in stub.resources if "endpoints/" in name] and len(stub.deleted) == 2
