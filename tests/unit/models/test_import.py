"""The package can be imported by processes that must stay small."""

from __future__ import annotations

import subprocess
import sys

from patience import PATIENCE_S

HEAVY = ("torch", "diffusers", "transformers", "huggingface_hub", "pydantic", "numpy")


def test_importing_the_package_imports_no_library() -> None:
    code = f"import sys, mii_serve.models; print([name for name in {HEAVY} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    assert run.stdout.strip() == "[]"


def test_inspecting_a_folder_imports_no_torch() -> None:
    code = "import sys, mii_serve.models.check, mii_serve.models.source; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    assert run.stdout.strip() == "False"
