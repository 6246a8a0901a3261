"""What `mii_serve export-mlflow` says before and beside MLflow; tests/e2e has the export itself."""

from __future__ import annotations

import importlib.metadata

import pytest

from mii_serve.cli.export_mlflow import parameters, requirements, run
from mii_serve.errors import ConfigError, InvalidRequestError, ModelError
from mii_serve.models.source import DEMO_FOLDER


def test_a_folder_that_is_in_use_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(InvalidRequestError, match="DIR: must be new or empty"):
        run("demo", tmp_path)
    with pytest.raises(InvalidRequestError, match="DIR: must be new or empty"):
        run("demo", tmp_path / "mine.txt")
    with pytest.raises(ModelError, match="not a hub id"):
        run("no such model", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_parameters_are_those_of_the_product_with_the_models_defaults():
    found = {name: (kind, default) for name, kind, default in parameters(DEMO_FOLDER)}
    assert "prompt" not in found
    assert found["num_inference_steps"] == ("long", 20) and found["guidance_scale"] == ("double", 3.0)
    assert found["negative_prompt"] == ("string", "") and found["seed"] == ("long", None)


def test_the_requirements_are_what_is_installed_without_other_extras(monkeypatch):
    found = dict(line.split("==") for line in requirements())
    assert {"torch", "diffusers", "grpcio", "pydantic"} <= set(found) and not {"deepspeed", "pytest", "starlette"} & set(found)
    assert found["torch"] == importlib.metadata.version("torch").partition("+")[0]

    def missing(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    with pytest.raises(ConfigError, match="must be installed"):
        list(requirements())
