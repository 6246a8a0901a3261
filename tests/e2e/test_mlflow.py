"""`mii_serve export-mlflow`: what it writes is loaded and run by MLflow itself, in an environment of its own."""

from __future__ import annotations

import base64
import io
import json

import pytest
from outside import ROOT, run_client
from PIL import Image

from mii_serve.models.source import find_model


def picture(encoded: str) -> bytes:
    with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return image.tobytes()


def differ(one: bytes, other: bytes) -> int:
    """How far two pictures are apart in any value; it depends on what else was in the batch."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.slow
def test_an_exported_model_is_loaded_and_run_by_mlflow(tmp_path):
    environment = {"MII_SERVE_MAX_SLOTS": "4", "TMPDIR": str(tmp_path), "MLFLOW_TRACKING_URI": f"file:{tmp_path}/runs"}
    told = json.loads(run_client("mlflow", "mlflow_model.py", str(ROOT), str(tmp_path), env=environment).splitlines()[-1])
    model = tmp_path / "exported"
    assert (told["out"], told["err"]) == (f"{model}\n", "")

    assert {"MLmodel", "pyfunc_entry.py", "artifacts/INPUT_model_path/model_index.json"} <= set(told["files"])
    assert not [name for name in told["files"] if name.endswith((".pkl", ".bin", ".pyc")) or "models/demo" in name]
    assert told["code"].startswith(str(model)), "the code is the model's own"
    assert find_model(str(model), revision=None, dtype="fp32", allow_pickle=False, enable_safety_checker=True).folder == (
        model / "artifacts" / "INPUT_model_path"
    )
    signature = told["signature"]
    assert json.loads(signature["inputs"]) == [{"type": "string", "name": "prompt", "required": True}]
    assert [(column["type"], column["name"]) for column in json.loads(signature["outputs"])] == [
        ("string", "prompt"),
        ("binary", "generated_image"),
        ("boolean", "nsfw_content_detected"),
    ]
    params = {param["name"]: (param["type"], param["default"]) for param in json.loads(signature["params"])}
    assert params["num_inference_steps"] == ("long", 20) and params["guidance_scale"] == ("double", 3.0)
    assert params["seed"] == ("long", None)

    first, second = told["rows"]
    assert [row["prompt"] for row in told["rows"]] == ["a red circle", "a skull"]
    assert (first["nsfw_content_detected"], second["nsfw_content_detected"]) == (False, True)
    assert any(picture(first["generated_image"])) and not any(picture(second["generated_image"]))
    one, other = map(picture, told["two each"])
    assert one != other
    assert [code for code, _ in told["errors"]] == ["INVALID_PARAMETER_VALUE"] * 3
    assert "num_inference_steps: must be in [1, 1000], got 0" in told["errors"][0][1]

    rows = told["predicted"]["predictions"]
    assert [(row["prompt"], row["nsfw_content_detected"]) for row in rows] == [("a red circle", False), ("a skull", True)]
    written = {file.name for file in (tmp_path / "pictures").iterdir()}
    assert written == {row["generated_image"] for row in rows}, "in a batch job, rows have the names of files"
    with Image.open(tmp_path / "pictures" / rows[0]["generated_image"]) as image:
        assert differ(image.convert("RGB").tobytes(), picture(first["generated_image"])) <= 1
