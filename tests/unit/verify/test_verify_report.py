"""What is said about checks: which failure comes first, and the keys that programs read."""

from __future__ import annotations

import io
import json
import math

import pytest
from PIL import Image

from mii_serve.errors import ConfigError
from mii_serve.types import EngineDescription, ImageFormat, Picture
from mii_serve.verify.compare import Difference
from mii_serve.verify.limits import LIMITS, Bounds, Stage, limits_for
from mii_serve.verify.report import Check, Report
from mii_serve.verify.sheet import sheet

FINE = Difference(max=1.0, mean=0.1, relative_max=1e-7, relative_rms=1e-7, psnr_db=math.inf, ssim=1.0)


def described(dtype: str = "fp32") -> EngineDescription:
    return EngineDescription(
        engine="native", dtype=dtype, device="cpu", model="demo", model_revision="0", has_safety_checker=True
    )


def check(stage: Stage, case: str, *faults: str, batching="alone", difference: Difference | None = FINE) -> Check:
    return Check(stage=stage, case=case, batching=batching, difference=difference, faults=faults)


def report(*checks: Check, **more) -> Report:
    return Report(
        engine=described(),
        reference=described(),
        limits=LIMITS["fp32"],
        limits_measured="measured somewhere",
        checks=checks,
        skipped=more.get("skipped", {}),
        pictures={},
    )


def test_the_stage_that_fails_first_is_the_first_a_request_passes():
    found = report(
        check(Stage.TEXT_ENCODER, "a"),
        check(Stage.UNET, "b", "max is 3, at most 1 is allowed", batching="batched"),
        check(Stage.PICTURES, "c", "max is 9, at most 1 is allowed"),
    )
    assert not found.is_passed
    assert "the unet fails first (b, in a batch: max is 3, at most 1 is allowed)" in found.verdict
    assert "2 of 3 checks failed" in found.verdict
    assert found.to_json()["first_failed_stage"] == "unet"


def test_nothing_failed_is_a_pass():
    found = report(check(Stage.UNET, "b"))
    assert found.is_passed
    assert found.to_json()["first_failed_stage"] is None


def test_of_alone_and_in_a_batch_the_table_shows_the_worse():
    worse = Difference(max=7.0, mean=1.0, relative_max=0.5, relative_rms=0.5)
    found = report(
        check(Stage.UNET, "b"),
        check(Stage.UNET, "b", "max is 7", batching="batched", difference=worse),
        check(Stage.UNET, "broken", "no answer, ValueError: no", difference=None),
        skipped={"lcm": "it cannot"},
    )
    lines = list(found.lines())
    assert [line.split()[-1] for line in lines if line.startswith("unet")] == ["FAILED", "FAILED"]
    assert "in a batch: max is 7" in lines[2]
    assert "no answer, ValueError: no" in lines[4]
    assert lines[5].endswith("not drawn: it cannot")


def test_the_json_report_has_these_keys():
    """Programs read them: what changes here changes `SCHEMA`."""
    nothing = Difference(max=math.nan, mean=math.nan, relative_max=math.nan, relative_rms=math.nan)
    found = report(check(Stage.UNET, "b"), check(Stage.PICTURES, "c", "max is nan", difference=nothing), skipped={"x": "y"})
    written = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert written["schema"] == 1
    assert list(written) == [
        "schema",
        "mii_serve",
        "is_passed",
        "first_failed_stage",
        "verdict",
        "engine",
        "reference",
        "limits",
        "limits_measured",
        "skipped",
        "checks",
    ]
    assert list(written["limits"]) == ["pipeline", "text encoder", "unet", "vae", "pictures"]
    assert written["checks"][0] == {
        "stage": "unet",
        "case": "b",
        "company": "alone",
        "is_passed": True,
        "faults": [],
        "difference": {
            "max": 1.0,
            "mean": 0.1,
            "relative_max": 1e-7,
            "relative_rms": 1e-7,
            "psnr_db": None,
            "ssim": 1.0,
        },
    }
    assert written["checks"][1]["difference"]["max"] is None
    assert written["engine"]["engine"] == "native"


@pytest.mark.parametrize(
    ("bounds", "figure", "is_kept"),
    [
        (Bounds(max=1.0), {"max": 1.0}, True),
        (Bounds(max=1.0), {"max": 1.01}, False),
        (Bounds(max=1.0), {"max": math.nan}, False),
        (Bounds(ssim=0.9), {"ssim": 0.9}, True),
        (Bounds(ssim=0.9), {"ssim": 0.89}, False),
        (Bounds(psnr_db=30.0), {"psnr_db": math.inf}, True),
        (Bounds(psnr_db=30.0), {"psnr_db": math.nan}, False),
        (Bounds(psnr_db=30.0), {"psnr_db": None}, False),
        (Bounds(), {"max": math.nan}, True),
    ],
)
def test_a_bound_is_kept_up_to_and_including_itself(bounds, figure, is_kept):
    found = Difference(**{"max": 0.0, "mean": 0.0, "relative_max": 0.0, "relative_rms": 0.0, **figure})
    assert (bounds.broken_by(found) == []) is is_kept


def test_every_stage_of_every_precision_is_bound():
    for dtype in ("fp32", "fp16", "bf16"):
        assert all(str(limits_for(dtype)[stage]) for stage in Stage)
    assert limits_for("fp32")[Stage.PICTURES] == Bounds(max=1.0)


def test_a_precision_without_limits_is_refused():
    with pytest.raises(ConfigError, match=r"dtype: .*'fp8'"):
        limits_for("fp8")


def test_the_sheet_shows_truth_answer_and_what_differs_made_visible():
    def flat(level: int, width: int = 64) -> Picture:
        return Picture(width=width, height=64, rgb=bytes([level] * 3 * 64 * width), nsfw_content_detected=None)

    page = Image.open(io.BytesIO(sheet({"one": (flat(10), flat(12)), "other": (flat(9, 32), flat(9, 32))}, ImageFormat.PNG)))
    colors = {color for count, color in page.getcolors(100_000) if count >= 192 * 192}
    assert {(10, 10, 10), (12, 12, 12), (254, 254, 254), (9, 9, 9), (0, 0, 0)} <= colors
    Image.open(io.BytesIO(sheet({}, ImageFormat.JPEG))).verify()
