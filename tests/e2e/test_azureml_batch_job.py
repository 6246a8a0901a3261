"""The Azure ML batch script as a job runs it: a driver in another Python, a deployment of its own, and content safety."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import psutil
import pytest
from azureml_batch import FOLDER, NOTEBOOK_PROMPTS, SAFE_NOTEBOOK_PROMPTS, VIOLENT, prepared, write_csv
from content_safety_double import KEY, double_in_a_thread
from outside import ROOT, run_client
from PIL import Image

from mii_serve.models.source import DEMO_FOLDER

BLACK = ((0, 0),) * 3
SCRIPT = FOLDER / "batch_score.py"


def python_of_mii_serve(folder: Path) -> Path:
    """Another Python's path to the package, as an image has it."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def mounted_model(folder: Path) -> Path:
    """The built-in model as a batch job mounts one of the catalog."""
    inner = folder / "model" / "mlflow_model_folder" / "artifacts" / "INPUT_model_path"
    shutil.copytree(DEMO_FOLDER, inner)
    return folder / "model"


def drive(source: Path, output: Path, settings: str, environment: dict[str, str]) -> dict:
    return json.loads(
        run_client("mlflow", "azureml_parallel_run.py", str(SCRIPT), str(source), str(output), settings, env=environment)
    )


def files_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*.png")}


@pytest.mark.slow
def test_a_job_with_content_safety_read_back_as_the_notebook_does(tmp_path):
    (tmp_path / "tmp").mkdir()
    prepared(tmp_path / "input", NOTEBOOK_PROMPTS)
    write_csv(tmp_path / "input" / "input1.csv", SAFE_NOTEBOOK_PROMPTS)
    write_csv(tmp_path / "input" / "skull.csv", ["a skull", 'a comma, a "quote"\nand a line'], num_inference_steps=3)
    (tmp_path / "input" / "torn.csv").write_bytes(b"prompt\n\xff\xfe\n")
    output = tmp_path / "output"
    unchecked = []

    def judge(image: Image.Image) -> dict[str, int]:
        content = double.images[-1]
        if image.getextrema() != BLACK:  # what the model's own checker flags is one and the same picture
            unchecked.extend(path for path, there in files_below(tmp_path).items() if there == content)
        if len(double.images) == 1:  # the first verdict is none: Azure's driver tries the mini-batch again
            double.image_mode = "no json"
        elif double.image_mode == "no json":
            double.image_mode = "ok"
        return {}

    with double_in_a_thread() as double:
        double.words, double.judge_image = {VIOLENT: ("Violence", 2)}, judge
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "MII_SERVE_PYTHON": str(python_of_mii_serve(tmp_path)),
            "AZUREML_MODEL_DIR": str(mounted_model(tmp_path / "mount")),
            "MII_SERVE_BATCH_PARAMETERS": '{"num_inference_steps": 2, "seed": 7}',
            "MII_SERVE_BATCH_STALL_S": "0",
            "MII_SERVE_MAX_SLOTS": "4",
            "MII_SERVE_ENABLE_SPARE_PROCESS": "0",
            "CONTENT_SAFETY_ENDPOINT": double.url,
            "CONTENT_SAFETY_KEY": KEY,
            "TMPDIR": str(tmp_path / "tmp"),
        }
        settings = json.dumps({"mini_batch_size": 4, "max_retries": 2, "error_threshold": 0})
        told = drive(tmp_path / "input", output, settings, environment)
    assert (told["num_files"], told["num_failed"], told["num_tries"]) == (5, 1, 5), told["errors"]
    assert "content safety" in told["errors"][0] and "torn.csv" in told["errors"][1] and "error threshold" in told["errors"][-1]

    read = {(row["input_csv_name"], row["row_number_per_file"]): row for row in told["read"]}
    wanted = {("0batch_input.csv", n): prompt for n, prompt in enumerate(NOTEBOOK_PROMPTS[:2])}
    wanted |= {("2batch_input.csv", 0): NOTEBOOK_PROMPTS[2], ("skull.csv", 0): "a skull"}
    wanted |= {("input1.csv", n): prompt for n, prompt in enumerate(SAFE_NOTEBOOK_PROMPTS)}
    wanted |= {("skull.csv", 1): 'a comma, a "quote"\nand a line'}
    assert {place: row["prompt"] for place, row in read.items()} == wanted and len(told["read"]) == len(wanted)
    blocked = read.pop(("input1.csv", 2))
    assert (blocked["generated_image"], blocked["nsfw_content_detected"]) == ("Blocked By Azure AI Content Safety", None)
    assert read["skull.csv", 0]["nsfw_content_detected"] is True

    pictures = files_below(output)
    assert {path.name for path in pictures} == {row["generated_image"] for row in read.values()}
    assert set(pictures.values()) <= set(double.images) and not unchecked, "each was looked at, and nowhere before"
    assert not files_below(tmp_path / "tmp")
    assert not (output / "parameters_torn.csv.jsonl").exists()
    assert not [process for process in psutil.process_iter(["environ"]) if str(tmp_path) in str(process.info["environ"])]
