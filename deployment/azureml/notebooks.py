"""The notebooks of Azure's catalog for this model, cell by cell, with the deployments of this folder.

    python notebooks.py online|batch|delete --subscription ID --group NAME --workspace NAME [--safe] [--set FILE:FIELD=VALUE]...

`online` deploys to an online endpoint and asks it; `batch` deploys to a batch endpoint, sends it a folder of CSV files, and
downloads the pictures; `delete` deletes both endpoints. `--safe` takes the files with content safety. `--set` changes a field
of a YAML file, as `az ml --set` does. Needs azure-ai-ml and azure-identity; credentials are those of `az login`, of a
workload's federated identity, or of a managed identity.
"""

from __future__ import annotations

import argparse
import base64
import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

from azure.ai.ml import (
    Input,
    MLClient,
    load_batch_endpoint,
    load_compute,
    load_environment,
    load_online_deployment,
    load_online_endpoint,
)
from azure.ai.ml.constants import AssetTypes
from azure.ai.ml.entities._load_functions import load_model_batch_deployment
from azure.core.exceptions import ResourceNotFoundError

HERE = Path(__file__).resolve().parent
MODEL = "compvis-stable-diffusion-v1-4"
COLUMNS = ("row_number_per_file", "prompt", "generated_image", "nsfw_content_detected", "input_csv_name")
BATCH_SIZE_PER_PREDICT = 2
NUM_RETRIES = 3


class Notebooks:
    """`changes` has, by the name of a YAML file, fields and their values."""

    def __init__(self, workspace: MLClient, registry: MLClient, *, is_safe: bool, changes: dict[str, dict[str, Any]]) -> None:
        self._workspace, self._registry = workspace, registry
        self._safe = "-safe" if is_safe else ""
        self._changes = changes

    def _loaded(self, load: Any, name: str, **more: Any) -> Any:
        """What a YAML file describes, with the changes."""
        fields = {**self._changes.get(name, {}), **more}
        return load(HERE / name, params_override=[{field: value} for field, value in fields.items()])

    # ---- text-to-image-online-endpoint, safe-text-to-image-online-deployment -----------------------------------------

    def deploy_online(self) -> None:
        model = self._registry.models.get(name=MODEL, label="latest")
        print(f"model {model.name}, version {model.version}, id {model.id}")
        endpoint = self._loaded(load_online_endpoint, f"endpoint{self._safe}.yaml")
        self._workspace.begin_create_or_update(endpoint).wait()
        deployment = self._loaded(load_online_deployment, f"deployment{self._safe}.yaml", model=model.id)
        self._workspace.online_deployments.begin_create_or_update(deployment).wait()
        endpoint.traffic = {deployment.name: 100}
        self._workspace.begin_create_or_update(endpoint).result()

    def score(self, request_file: Path, folder: Path) -> list[dict[str, Any]]:
        """Ask the endpoint; its pictures become files."""
        endpoint = self._loaded(load_online_endpoint, f"endpoint{self._safe}.yaml")
        deployment = self._loaded(load_online_deployment, f"deployment{self._safe}.yaml")
        deployment = self._workspace.online_deployments.get(name=deployment.name, endpoint_name=endpoint.name)
        response = self._workspace.online_endpoints.invoke(
            endpoint_name=endpoint.name, deployment_name=deployment.name, request_file=str(request_file)
        )
        generations = json.loads(response)
        folder.mkdir(parents=True, exist_ok=True)
        for number, generation in enumerate(generations):
            if generation["generated_image"]:
                (folder / f"{number}.png").write_bytes(base64.b64decode(generation["generated_image"]))
        if not generations:
            print("empty response as it is blocked")
        return list(generations)

    # ---- text-to-image-batch-endpoint, safe-text-to-image-batch-deployment -------------------------------------------

    def deploy_batch(self) -> None:
        model = self._registry.models.get(name=MODEL, label="latest")
        compute = self._loaded(load_compute, "compute.yaml")
        try:
            self._workspace.compute.get(compute.name)
        except ResourceNotFoundError:
            self._workspace.begin_create_or_update(compute).result()
        endpoint = self._loaded(load_batch_endpoint, "batch-endpoint.yaml")
        self._workspace.begin_create_or_update(endpoint).result()
        environment = self._loaded(load_environment, "environment.yaml")
        environment = self._workspace.environments.create_or_update(environment)
        asked = {"model": model.id, "environment": f"azureml:{environment.name}:{environment.version}"}
        deployment = self._loaded(load_model_batch_deployment, f"batch-deployment{self._safe}.yaml", **asked)
        self._workspace.begin_create_or_update(deployment).result()
        endpoint = self._workspace.batch_endpoints.get(endpoint.name)
        endpoint.defaults.deployment_name = deployment.name
        self._workspace.begin_create_or_update(endpoint).result()

    def run_batch(self, prompts: list[str], folder: Path) -> list[dict[str, str]]:
        """Send the prompts as files of two, wait for the job, download its pictures, and read predictions.csv."""
        processed = folder / "processed_batch_data"
        processed.mkdir(parents=True, exist_ok=True)
        for i in range(0, len(prompts), BATCH_SIZE_PER_PREDICT):
            with (processed / f"{i}batch_input.csv").open("w", newline="") as file:
                rows = enumerate(prompts[i : i + BATCH_SIZE_PER_PREDICT], i)
                csv.writer(file).writerows([("", "prompt"), *rows])
        endpoint = self._loaded(load_batch_endpoint, "batch-endpoint.yaml")
        given = Input(path=str(processed), type=AssetTypes.URI_FOLDER)
        for attempt in range(NUM_RETRIES):
            try:
                job = self._workspace.batch_endpoints.invoke(endpoint_name=endpoint.name, input=given)
                break
            except Exception as error:
                if attempt == NUM_RETRIES - 1:
                    raise
                print(f"endpoint invocation failed, retrying after 5 seconds: {error}")
                time.sleep(5)
        self._workspace.jobs.stream(job.name)
        scoring_job = next(iter(self._workspace.jobs.list(parent_job_name=job.name)))
        downloaded = folder / "generated_images"
        self._workspace.jobs.download(name=scoring_job.name, download_path=str(downloaded), output_name="score")
        with (downloaded / "named-outputs" / "score" / "predictions.csv").open(newline="") as file:
            return [dict(zip(COLUMNS, row, strict=True)) for row in csv.reader(file)]

    # ---- clean up ------------------------------------------------------------------------------------------------------

    def delete(self) -> None:
        endpoint = self._loaded(load_online_endpoint, f"endpoint{self._safe}.yaml")
        self._workspace.online_endpoints.begin_delete(name=endpoint.name).wait()
        endpoint = self._loaded(load_batch_endpoint, "batch-endpoint.yaml")
        self._workspace.batch_endpoints.begin_delete(name=endpoint.name).result()


def connect(credential: Any, subscription: str, group: str, workspace: str, **settings: Any) -> Notebooks:
    return Notebooks(
        MLClient(credential, subscription, group, workspace),
        MLClient(credential, subscription, group, registry_name="azureml"),
        **settings,
    )


def main() -> None:
    from azure.identity import DefaultAzureCredential

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("online", "batch", "delete"))
    for name in ("subscription", "group", "workspace"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--safe", action="store_true", help="the files with content safety")
    parser.add_argument("--set", action="append", default=[], metavar="FILE:FIELD=VALUE", help="change a field of a YAML file")
    parser.add_argument("--prompts", type=Path, help="CSV with the column prompt, for batch")
    parser.add_argument("-o", "--output", type=Path, default=Path("out"), help="folder for pictures, default out")
    asked = parser.parse_args()
    changes: dict[str, dict[str, Any]] = {}
    for change in asked.set:
        place, _, value = change.partition("=")
        file, _, field = place.partition(":")
        changes.setdefault(file, {})[field] = value
    notebooks = connect(
        DefaultAzureCredential(), asked.subscription, asked.group, asked.workspace, is_safe=asked.safe, changes=changes
    )
    if asked.what == "online":
        notebooks.deploy_online()
        print(f"{len(notebooks.score(HERE / 'sample_score.json', asked.output))} pictures in {asked.output}")
    elif asked.what == "batch":
        if asked.prompts is None:
            sys.exit("--prompts is needed: a CSV file with the column prompt")
        with asked.prompts.open(newline="", encoding="utf-8-sig") as file:
            prompts = [row["prompt"] for row in csv.DictReader(file)]
        notebooks.deploy_batch()
        for row in notebooks.run_batch(prompts, asked.output):
            print(row["input_csv_name"], row["row_number_per_file"], row["generated_image"], row["nsfw_content_detected"])
    else:
        notebooks.delete()


if __name__ == "__main__":
    main()
