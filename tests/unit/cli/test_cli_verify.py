"""What `mii_serve verify` refuses before it draws."""

from __future__ import annotations

import pytest
from commands import Run


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
