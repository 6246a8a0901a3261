"""The table of extras says what `pyproject.toml` says, and a missing module is found in it."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mii_serve.extras import EXTRAS, MissingExtraError, extra_with, is_installed, require

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULE_OF = {
    "azure-ai-contentsafety": "azure",
    "azure-identity": "azure",
    "c2pa-python": "c2pa",
    "opentelemetry-exporter-otlp-proto-grpc": "opentelemetry",
    "opentelemetry-sdk": "opentelemetry",
    "grpcio-reflection": "grpc_reflection",
    "mlflow-skinny": "mlflow",
    "pyyaml": "yaml",
}
"""Where a distribution's module has another name than the distribution."""


def distribution(requirement: str) -> str:
    return re.split(r"[\[<>=;~! ]", requirement, maxsplit=1)[0].lower()


def test_the_table_says_what_the_project_file_says() -> None:
    extras = {name: [distribution(one) for one in needed] for name, needed in PROJECT["optional-dependencies"].items()}
    extras.pop("dev")
    brought = {
        name: {MODULE_OF.get(one, one.replace("-", "_")) for one in needed if one != "mii-serve"}
        for name, needed in extras.items()
    }
    assert brought == {name: set(modules) for name, modules in EXTRAS.items()}
    assert {name for name, needed in extras.items() if "mii-serve" not in needed} == {
        "server",
        "bench",
        "parquet",
        "provenance",
    }


def test_the_client_needs_nothing_that_computes_or_serves() -> None:
    assert {distribution(one) for one in PROJECT["dependencies"]} == {
        "grpcio",
        "grpcio-health-checking",
        "grpcio-status",
        "googleapis-common-protos",
        "pillow",
        "protobuf",
        "rich",
    }


def test_the_smallest_extra_that_brings_a_module_is_named() -> None:
    assert extra_with("torch.nn") == extra_with("pydantic") == "server"
    assert extra_with("numpy") == "bench", "which is a small part of what server brings"
    assert extra_with("starlette.routing") == "http"
    assert extra_with("somebody_elses") is None


def test_what_is_missing_is_found_out_without_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    require("server")
    monkeypatch.setitem(EXTRAS, "server", ("json", "no_such_module"))  # type: ignore[arg-type]
    with pytest.raises(MissingExtraError, match="extra server") as missing:
        require("server")
    assert (missing.value.name, missing.value.extra) == ("no_such_module", "server")
    assert is_installed("antigravity") and "antigravity" not in sys.modules
