"""`mii_serve verify` of the demo model, as its users run it, in this process."""

from __future__ import annotations

import json

import pytest
from commands import Run
from PIL import Image


@pytest.mark.slow
def test_the_native_engine_passes_on_a_cpu_and_the_report_and_the_sheet_are_written(run: Run, tmp_path, one_thread) -> None:
    arguments = ("--engine", "native", "--device", "cpu", "--json", "report.json", "--picture", "sheet.png")
    ran = run("verify", "demo", *arguments)
    assert ran.code == 0, ran.out + ran.err
    assert ran.out.splitlines()[-1].startswith("native fp32 on cpu is within the limits of the reference in all ")
    assert "FAILED" not in ran.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["is_passed"] is True
    assert {check["stage"] for check in report["checks"]} == {"pipeline", "text encoder", "unet", "vae", "pictures"}
    assert {check["company"] for check in report["checks"]} == {"alone", "crowd"}
    assert report["skipped"] == {}
    pictures = [check for check in report["checks"] if check["stage"] == "pictures"]
    assert max(check["difference"]["max"] for check in pictures) <= 1
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width >= 3 * 192
