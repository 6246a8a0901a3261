"""`mii_serve verify` as its users run it, in this process."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from unit.cli.conftest import Run


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (("--picture", "sheet.tiff"), "error: picture: must end in .png, .jpg, .jpeg, .webp, got sheet.tiff"),
        (("--picture", "nowhere/sheet.png"), "error: picture: must be in an existing folder"),
        (("--json", "nowhere/report.json"), "error: json: must be in an existing folder"),
        (("--json", "."), "error: json: must be a file"),
        (("--engine", "fast"), "error: engine: "),
        (("--engine", "reference", "--dtype", "bf16"), "error: dtype: the reference engine computes in fp32 only"),
        (("--dtype", "fp16", "--device", "cpu"), "error: dtype: fp16 needs a GPU"),
        (("--config", "none.yaml"), "error: config: no such file"),
        (("--replicas", "2"), "error: unrecognized arguments: --replicas"),
    ],
)
def test_what_cannot_be_verified_is_refused_before_the_reference_draws(
    run: Run, monkeypatch, argv: tuple[str, ...], complaint: str
) -> None:
    monkeypatch.setattr("mii_serve.verify.truth.run_reference", lambda engine: pytest.fail("the reference was asked"))
    ran = run("verify", *argv)
    assert (ran.code, ran.out) == (2, "")
    assert complaint in ran.err


def test_a_model_that_is_not_there_is_an_error_in_one_line(run: Run) -> None:
    ran = run("verify", "./nowhere")
    assert ran.code == 1
    assert ran.err.splitlines()[-1].startswith("error: ")


def test_help_says_what_it_does(run: Run) -> None:
    shown = run("verify", "--help")
    assert shown.code == 0
    assert "calls, the VAE and whole images" in shown.out
