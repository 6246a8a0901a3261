"""Results of `mii_serve bench` that nobody measured."""

from __future__ import annotations

from dataclasses import replace

from mii_serve.bench import result
from mii_serve.bench.check import Compared, Tolerance, Verdict
from mii_serve.bench.values import Record

ABOUT = {"date": "2026-01-01T00:00:00+00:00", "commit": "c0ffee", "command": "mii_serve bench", "device": "d", "versions": {}}


SERVER = {"model": "demo", "model_revision": "r", "engine": "native", "dtype": "fp32", "device": "cpu"}


SETTINGS = {
    "protocol": "grpc", "target": "a:1", "loop": "closed loop, 2 callers", "mix": [], "seed": "0", "target_s": 1.0,
    "preview_every": None,
}  # fmt: skip


RIGHT = Verdict(
    tolerance=Tolerance(),
    reference="reference",
    pictures=(Compared(index=3, kind="a <b> & c", image_index=0, max_levels=0, psnr_db=float("inf"), is_ok=True),),
)


WRONG = replace(RIGHT, pictures=(replace(RIGHT.pictures[0], max_levels=200, psnr_db=5.0, is_ok=False),))


UNKNOWN = Verdict(tolerance=Tolerance(), reference="none", text="--check 0")


def records(total_s: float = 0.5, count: int = 60) -> list[Record]:
    made = []
    for i in range(count):
        code = "RESOURCE_EXHAUSTED" if i % 10 == 9 else "INTERNAL" if i % 25 == 24 else "OK"
        made.append(
            Record(
                index=i, kind="a <b> & c" if i % 2 else "z", num_images=1 + i % 2, intended_s=i * 0.1, sent_s=i * 0.1 + 0.001,
                ended_s=i * 0.1 + total_s * (1 + i % 3), code=code, queue_s=0.01 if code == "OK" else None, first_step_s=0.02,
            )
        )  # fmt: skip
    return made


def made(verdict: Verdict = RIGHT, **changes) -> result.Result:
    total_s, count = changes.pop("total_s", 0.5), changes.pop("count", 60)
    parts = {
        "about": ABOUT, "settings": SETTINGS, "server": SERVER, "records": records(total_s, count),
        "observed": {"images_per_call": 2.5, "num_calls": 10, "step_ms": 3.0, "step_ms_by_batch": {"2": {"mean_ms": 3.0}}},
        "verdict": verdict, "examples": {"INTERNAL": "<script>alert(1)</script>"},
    }  # fmt: skip
    return result.make(**{**parts, **changes})
