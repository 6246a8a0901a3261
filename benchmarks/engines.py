#!/usr/bin/env python3
"""Time the engines, and the ways other people run the same pipeline, offline on one machine, one after another on the same
weights.

    python benchmarks/engines.py                        full-size v1-4 with random weights, 512 × 512; for a GPU, nine minutes
    python benchmarks/engines.py --model ./my-model     any checkpoint in a diffusers folder
    python benchmarks/engines.py --model demo --quick   the built-in model, under a minute on two CPU cores

For each row, sampler and number of images at once: the median of the bursts, seconds per image, where the time goes, peak
memory, the share of the device's measured matmul peak, and how far the pictures are from the FP32 reference's. Every burst
has a prompt of its own, so that nothing is remembered from the burst before. A row that cannot run here, and a measurement
that there was no time for, is in the file with the reason; run it again, and what is missing is measured. `--rows` chooses;
`--list` says what there is.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from engine_rows import ROWS, Place, Row, UnableError, opened
from PIL import Image

from mii_serve.bench import environment
from mii_serve.bench.check import distance
from mii_serve.config import DeployConfig
from mii_serve.engine.stage_timer import StageTimer
from mii_serve.models import RANDOM_SD_V1_4, load_model
from mii_serve.provenance.marks import PNG_COMPRESS_LEVEL
from mii_serve.types import RequestedParams

SAMPLERS = (("pndm", 50), ("dpm++_2m", 25))
BATCHES = (1, 8, 4, 16, 2)
"""What matters most comes first, in case time runs out."""
COMPILED_BATCHES = (1, 8)
SHARES = {"reference": 0.2, "native": 0.5, "diffusers_eager": 0.5}
"""At least; of the time left. The reference is there to compare pictures with."""
COMPILE_S = 120.0
"""Each size is compiled for minutes; without this much time left, none is begun."""
PROMPT = "a red circle on a blue background"
RESULTS = Path(__file__).parent / "results"


def circumstances(model: str, model_revision: str, device: str, dtype: str) -> dict[str, Any]:
    """What a reader needs to repeat a measurement."""
    about = environment.circumstances((*environment.PACKAGES, "deepspeed", "triton"))
    name = (
        torch.cuda.get_device_name() if device.startswith("cuda") else f"{about['device']}, {torch.get_num_threads()} threads"
    )
    return {**about, "device": name, "model": model, "model_revision": model_revision, "dtype": dtype}


@dataclass
class Clock:
    """What is left of the time the whole run may take."""

    budget_s: float
    start: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        return self.budget_s - (time.monotonic() - self.start)


def timed(row: Row, asked: RequestedParams, count: int) -> tuple[float, list[Image.Image]]:
    _settle()
    start = time.perf_counter()
    pictures = row.burst(asked, count)
    _settle()
    return time.perf_counter() - start, pictures


def measure(row: Row, sampler: str, num_steps: int, count: int, repeats: int) -> dict[str, Any]:
    """Bursts with prompts of their own, and then one in which every stage waits for the device."""
    asked = RequestedParams(prompt=PROMPT, scheduler=sampler, num_inference_steps=num_steps, seed=1)
    _, pictures = timed(row, asked, count)  # warms up
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    times = []
    for repeat in range(repeats):
        seconds, _ = timed(row, _with_prompt(asked, f"{PROMPT}, {sampler} {count} {repeat}"), count)
        times.append(seconds)
    peak = torch.cuda.max_memory_allocated() // 2**20 if torch.cuda.is_available() else None
    median = statistics.median(times)
    return {
        "sampler": sampler,
        "num_inference_steps": num_steps,
        "num_images": count,
        "median_s": round(median, 5),
        "min_s": round(min(times), 5),
        "max_s": round(max(times), 5),
        "repeats": repeats,
        "images_per_s": round(count / median, 4),
        "stage_s": stages(row, _with_prompt(asked, f"{PROMPT}, {sampler} {count} by stages"), count, pictures),
        "peak_memory_mib": peak,
        "pictures": pictures,
    }


def stages(row: Row, asked: RequestedParams, count: int, pictures: list[Image.Image]) -> dict[str, float]:
    """Seconds of one burst by stage. The stages wait for the device here, so together they take longer than a burst does."""
    row.stage_seconds()
    with _settled_stages():
        row.burst(asked, count)
    seconds = row.stage_seconds()
    start = time.perf_counter()
    for picture in pictures:
        picture.save(io.BytesIO(), "png", compress_level=PNG_COMPRESS_LEVEL)
    seconds["encode_image"] = time.perf_counter() - start
    return {name: round(value, 5) for name, value in seconds.items()}


@contextlib.contextmanager
def _settled_stages() -> Iterator[None]:
    before = StageTimer.settle
    StageTimer.settle = staticmethod(_settle)
    try:
        yield
    finally:
        StageTimer.settle = staticmethod(before)


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _with_prompt(asked: RequestedParams, prompt: str) -> RequestedParams:
    return RequestedParams(
        prompt=prompt, scheduler=asked.scheduler, num_inference_steps=asked.num_inference_steps, seed=asked.seed
    )


# ---- what the device and the model are -------------------------------------------------------------------------------


def matmul_peak(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the best of several large products: what this device really gives."""
    is_cuda = device.startswith("cuda")
    size, repeats = (8192, 20) if is_cuda else (1024, 5)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = 0.0
    for _ in range(repeats):
        _settle()
        start = time.perf_counter()
        left @ right
        _settle()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def unet_flops_per_row(unet: Any, height: int, width: int) -> int:
    """Floating-point operations of one row of one UNet call (a multiplication with its addition is two), counted without
    weights.
    """
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        shape = UNet2DConditionModel.from_config(unet.config)
        sample = torch.empty(1, unet.config.in_channels, height // 8, width // 8)
        embeds = torch.empty(1, 77, unet.config.cross_attention_dim)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            shape(sample, torch.empty(1), encoder_hidden_states=embeds)
    return int(counter.get_total_flops())


def num_unet_calls(sampler: str, num_steps: int, model_scheduler: Any) -> int:
    from mii_serve.samplers.build import ModelSchedulers, try_scheduler
    from mii_serve.samplers.run import SamplerRun

    return try_scheduler(ModelSchedulers(model_scheduler), SamplerRun(sampler, num_steps))


# ---- the run -------------------------------------------------------------------------------------------------------


def on_weights(model: str, device: str, dtype: str, folder: Path) -> tuple[Place, dict[str, Any]]:
    """A place where every row finds the same weights, and what the figures are divided by."""
    limits = DeployConfig.load({"model": model}).limits
    loaded = load_model(model, revision=None, dtype="fp32", device=device, limits=limits)
    pipeline, defaults = loaded.pipeline, loaded.defaults
    torch_dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    facts = {
        "height": defaults.height,
        "width": defaults.width,
        "guidance_scale": defaults.guidance_scale,
        "unet_gflop_per_row": round(unet_flops_per_row(pipeline.unet, defaults.height, defaults.width) / 1e9, 3),
        "matmul_peak_tflops": {name: round(matmul_peak(device, kind) / 1e12, 3) for name, kind in {dtype: torch_dtype}.items()},
        "model_revision": loaded.revision,
        "calls": {sampler: num_unet_calls(sampler, steps, pipeline.scheduler) for sampler, steps in SAMPLERS},
    }
    if model == RANDOM_SD_V1_4:  # made here, and read by every row in its own precision: the same numbers in all of them
        pipeline.to(torch_dtype).save_pretrained(folder)
        model = str(folder)
    return Place(model=model, device=device, dtype=dtype), facts


class Truth:
    """The reference's pictures, in files, so that a run that goes on where another stopped has them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: tuple[str, int]) -> Image.Image | None:
        path = self._path(key)
        return Image.open(path).convert("RGB") if path.exists() else None

    def keep(self, key: tuple[str, int], picture: Image.Image) -> None:
        if not self._path(key).exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            picture.save(self._path(key))

    def clear(self) -> None:
        for path in self._folder.glob("*.png"):
            path.unlink()

    def _path(self, key: tuple[str, int]) -> Path:
        return self._folder / f"{''.join(c if c.isalnum() else '-' for c in key[0])}-{key[1]}.png"


def _key(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["sampler"], row["num_inference_steps"], row["num_images"]


def measured_before(out: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a file of the same code, machine and model, without those that were left out."""
    if not out.exists():
        return []
    found = json.loads(out.read_text())
    same = ("commit", "device", "versions", "model", "model_revision", "dtype", "is_quick")
    if any(found.get(name) != about.get(name) for name in same):
        return []
    return [row for row in found["rows"] if "median_s" in row]


def run(
    place: Place,
    facts: dict[str, Any],
    arguments: argparse.Namespace,
    clock: Clock,
    before: list[dict[str, Any]],
    truth: Truth,
    write: Callable[[list[Any]], None],
) -> None:
    """Every row in turn; `write` gets all that is known after each measurement, so that a run cut short is not lost.

    What is in `before` is not measured again.
    """
    rows: list[dict[str, Any]] = []
    names = [name for name in ROWS if name in arguments.rows]
    for index, name in enumerate(names):
        known = [row for row in before if row["row"] == name]
        rows.extend(known)
        if all(one in [_key(row) for row in known] for one in wanted(name, arguments)):
            continue
        try:
            if clock.left_s <= 0:
                raise UnableError("no time left to load it")
            with opened(name, place) as row:
                # What loading and warming up take is the run's, not the row's: it would leave the first rows nothing.
                ends = time.monotonic() + share(name, len(names) - index) * clock.left_s
                for row_figures in cells(row, name, arguments, lambda ends=ends: ends - time.monotonic(), known):
                    if (pictures := row_figures.pop("pictures", None)) is not None:
                        key = row_figures["sampler"], row_figures["num_inference_steps"]
                        if name == "reference":
                            truth.keep(key, pictures[0])
                        row_figures |= compared(pictures[0], truth.get(key)) | efficiency(row_figures, facts, row.dtype)
                        row_figures["dtype"] = row.dtype
                    rows.append({"row": name, **row_figures})
                    print(json.dumps(rows[-1]), flush=True)
                    write([*rows, *(row for row in before if row["row"] in names[index + 1 :])])
        except UnableError as reason:
            rows.append({"row": name, "skipped": str(reason)})
            print(json.dumps(rows[-1]), flush=True)
        write(rows)


def share(name: str, num_left: int) -> float:
    """Of the time left when a row has been loaded: what it may take; `num_left` rows have not been measured, with this one."""
    if "compiled" in name:
        return 1.0  # who compiles needs all there is
    return max(SHARES.get(name, 0.0), 1 / num_left)


def wanted(name: str, arguments: argparse.Namespace) -> list[tuple[str, int, int]]:
    """Sampler, steps and number of images of a row's measurements, what matters most first."""
    batches = COMPILED_BATCHES if "compiled" in name else (1,) if name == "reference" else BATCHES
    if arguments.quick:
        return [("pndm", 2, count) for count in (1, 2)]
    return [(sampler, num_steps, count) for sampler, num_steps in SAMPLERS for count in batches]


def cells(
    row: Row, name: str, arguments: argparse.Namespace, left_s: Callable[[], float], before: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The measurements of one row that are not in `before`, those there is time for."""
    per_image = {one["num_inference_steps"]: one["median_s"] / one["num_images"] for one in before}
    for sampler, num_steps, count in wanted(name, arguments):
        if (sampler, num_steps, count) in [_key(one) for one in before]:
            continue
        about = {"sampler": sampler, "num_inference_steps": num_steps, "num_images": count}
        known = per_image.get(num_steps) or max(per_image.values(), default=0.0)
        needed_s = known * count * (arguments.repeats + 2) + COMPILE_S * ("compiled" in name)
        if needed_s > left_s():
            yield {**about, "skipped": f"no time: needs about {needed_s:.0f} s of {max(0.0, left_s()):.0f} s left"}
            continue
        try:
            row_figures = measure(row, sampler, num_steps, count, arguments.repeats)
        except Exception as error:  # noqa: BLE001 - out of memory, or a peer's failure: a result like any other
            yield {**about, "skipped": f"{type(error).__name__}: {error}"[:500]}
            continue
        per_image[num_steps] = row_figures["median_s"] / count
        yield row_figures


def compared(picture: Image.Image, truth: Image.Image | None) -> dict[str, Any]:
    """The distance from the FP32 reference's picture; no PSNR where not one pixel differs."""
    if truth is None:
        return {}
    levels, psnr_db = distance(picture, truth)
    return {"max_levels_off": levels, "psnr_db": None if levels == 0 else round(psnr_db, 2)}


def efficiency(row_figures: dict[str, Any], facts: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Time of a UNet call, and what share of the matmul peak the burst's UNet work comes to."""
    calls = facts["calls"].get(row_figures["sampler"], row_figures["num_inference_steps"])
    if row_figures["num_inference_steps"] != dict(SAMPLERS).get(row_figures["sampler"]):
        calls = row_figures["num_inference_steps"] + (row_figures["sampler"] == "pndm")
    num_rows = row_figures["num_images"] * (2 if facts["guidance_scale"] > 1 else 1)
    made = {"unet_calls_per_s": round(calls * row_figures["num_images"] / row_figures["median_s"], 3)}
    peak = facts["matmul_peak_tflops"].get(dtype)
    if peak:
        gflop = facts["unet_gflop_per_row"] * num_rows * calls
        made["share_of_matmul_peak"] = round(gflop / 1000 / row_figures["median_s"] / peak, 4)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=RANDOM_SD_V1_4)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--budget", type=float, default=520.0, metavar="SECONDS", help="what does not fit is left out and named"
    )
    parser.add_argument("--again", action="store_true", help="also what the file holds from the same code and machine")
    parser.add_argument("--quick", action="store_true", help="small bursts, to see that everything runs")
    parser.add_argument("--list", action="store_true", help="say which rows there are")
    parser.add_argument("--out", type=Path, help="the JSON file to write; named after device and model when left out")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name:24}{(make.__doc__ or '').splitlines()[0]}" for name, make in ROWS.items()))
        return
    if arguments.quick:
        arguments.repeats = 1
    clock = Clock(arguments.budget)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "fp16" if device == "cuda" else "fp32"
    with tempfile.TemporaryDirectory() as folder:
        place, facts = on_weights(arguments.model, device, dtype, Path(folder))
        about = circumstances(arguments.model, facts["model_revision"], device, dtype)
        name = "".join(c if c.isalnum() else "-" for c in f"{Path(arguments.model).name}-{about['device']}").lower()
        out = arguments.out or RESULTS / f"engines-{name}.json"
        out.parent.mkdir(parents=True, exist_ok=True)

        about |= {**facts, "is_quick": arguments.quick}
        before = [] if arguments.again else measured_before(out, about)
        truth = Truth(out.parent / "truth" / out.stem)
        if not before:
            truth.clear()

        def write(rows: list[Any]) -> None:
            out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")

        run(place, facts, arguments, clock, before, truth, write)
    print(f"written to {out}, {arguments.budget - clock.left_s:.0f} s")


if __name__ == "__main__":
    main()
