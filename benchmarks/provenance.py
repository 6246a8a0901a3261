#!/usr/bin/env python3
"""What the marks of a picture cost, and what lossy files leave of the watermark.

    python benchmarks/provenance.py                         one minute
    python benchmarks/provenance.py --package FOLDER        and whether the package invisible-watermark reads the watermark

FOLDER is where `pip install --no-deps --target FOLDER invisible-watermark PyWavelets opencv-python-headless` put the package.

The pictures are cuts of those in docs/images, enlarged to 512 × 512, and noise and a gradient, which are the hardest and the
easiest for a watermark. Times are processor time of one thread, each the median of several runs over all pictures.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mii_serve.bench import environment
from mii_serve.provenance import Origin, Provenance, watermark
from mii_serve.types import ImageFormat

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "provenance.json"
SOURCES = ("demo.png", "demo_relations.png", "demo_held_out_triples.png", "page_finished.webp", "page_finished_light.webp")
SIDE_PX, CUT_PX, CUTS = 512, 192, 4
QUALITIES = (100, 95, 90, 80)
ORIGIN = Origin(model="CompVis/stable-diffusion-v1-4", model_revision="133a221b8aa7292a167afc5127cb63fb5005638b")
FORMATS = (ImageFormat.PNG, ImageFormat.JPEG, ImageFormat.WEBP)


def pictures() -> Iterator[tuple[str, Image.Image]]:
    """Each with the name of its source."""
    for source in SOURCES:
        with Image.open(ROOT / "docs" / "images" / source) as opened:
            whole = opened.convert("RGB")
        for cut in range(CUTS):
            left = (whole.width - CUT_PX) * cut // (CUTS - 1)
            top = (whole.height - CUT_PX) * (cut * 7 % CUTS) // (CUTS - 1)
            part = whole.crop((left, top, left + CUT_PX, top + CUT_PX))
            yield source, part.resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
    chance = np.random.default_rng(1)
    for _ in range(CUTS):
        yield "noise", Image.fromarray(chance.integers(0, 256, (SIDE_PX, SIDE_PX, 3), np.uint8), "RGB")
    slope = np.linspace(20, 230, SIDE_PX)
    gradient = np.stack(
        [np.tile(slope, (SIDE_PX, 1)), np.tile(slope[:, None], (1, SIDE_PX)), np.full((SIDE_PX, SIDE_PX), 90)], -1
    )
    yield "gradient", Image.fromarray(gradient.astype(np.uint8), "RGB")


def marked(image: Image.Image) -> Image.Image:
    return Image.frombytes("RGB", image.size, watermark.embed(image.tobytes(), *image.size))


def coded(image: Image.Image, kind: str, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, quality=quality)
    return Image.open(file).convert("RGB")


def _coded_with_mark(image: Image.Image, *, kind: str, quality: int) -> Image.Image:
    return coded(marked(image), kind, quality)


def robustness(found: list[tuple[str, Image.Image]]) -> list[dict[str, Any]]:
    """Of each kind of picture: how many still have the watermark, and the median share of its bits."""
    rows = []
    for source in dict.fromkeys(name for name, _ in found):
        images = [image for name, image in found if name == source]
        row: dict[str, Any] = {"pictures": source, "count": len(images)}
        changes = [np.abs(np.asarray(marked(image)).astype(int) - np.asarray(image)) for image in images]
        row["mean_change"] = round(float(np.mean([change.mean() for change in changes])), 3)
        row["max_change"] = max(int(change.max()) for change in changes)
        after: dict[str, Callable[[Image.Image], Image.Image]] = {"unmarked": lambda image: image, "png": marked}
        for kind, quality in (*(("jpeg", quality) for quality in QUALITIES), ("webp", 90)):
            after[f"{kind}_{quality}"] = functools.partial(_coded_with_mark, kind=kind, quality=quality)
        for name, change in after.items():
            readings = [watermark.read(change(image)) for image in images]
            shares = [reading.num_matching / reading.num_bits for reading in readings if reading is not None]
            row[name] = {
                "found": sum(reading.is_found for reading in readings if reading is not None),
                "median_share": round(statistics.median(shares), 3),
                "min_share": round(min(shares), 3),
                "max_share": round(max(shares), 3),
            }
        rows.append(row)
    return rows


def package_agreement(found: list[tuple[str, Image.Image]], folder: Path) -> dict[str, Any]:
    """The package's decoder on our pictures, and ours on the package's, as shares of the bits."""
    sys.path.insert(0, str(folder))
    from imwatermark import WatermarkDecoder, WatermarkEncoder  # type: ignore[import-not-found]

    encoder, bits = WatermarkEncoder(), np.unpackbits(np.frombuffer(watermark.TEXT.encode(), np.uint8))
    encoder.set_watermark("bytes", watermark.TEXT.encode())
    decoder = WatermarkDecoder("bits", len(bits))
    theirs_on_ours, ours_on_theirs, theirs_on_theirs, embed_ms = [], [], [], []
    for _, image in found:
        read = decoder.decode(np.asarray(marked(image))[..., ::-1].copy(), "dwtDct")
        theirs_on_ours.append(float(np.mean(np.asarray(read) == bits)))
        start = time.process_time()
        theirs = encoder.encode(np.asarray(image)[..., ::-1].copy(), "dwtDct")
        embed_ms.append((time.process_time() - start) * 1e3)
        theirs_on_theirs.append(float(np.mean(np.asarray(decoder.decode(theirs, "dwtDct")) == bits)))
        reading = watermark.read(Image.fromarray(theirs[..., ::-1], "RGB"))
        ours_on_theirs.append(0.0 if reading is None else reading.num_matching / reading.num_bits)
    named = {
        "package_reads_ours": theirs_on_ours,
        "ours_reads_package": ours_on_theirs,
        "package_reads_package": theirs_on_theirs,
    }
    shares = {name: {"median": round(statistics.median(of), 3), "min": round(min(of), 3)} for name, of in named.items()}
    return {**shares, "package_embed_ms": round(statistics.median(embed_ms), 2)}


def times_ms(works: Mapping[str, Callable[[Image.Image], object]], images: list[Image.Image], rounds: int) -> dict[str, float]:
    """The median time of each work; they take turns, so that a busy machine is busy for all of them."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work(images[0])
    for _ in range(rounds):
        for image in images:
            for name, work in works.items():
                start = time.thread_time()
                work(image)
                times[name].append(time.thread_time() - start)
    return {f"{name}_ms": round(statistics.median(of) * 1e3, 2) for name, of in times.items()}


def costs(images: list[Image.Image], folder: Path, rounds: int) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from signing import write_signing_files  # type: ignore[import-not-found]

    kinds = {
        "nothing": Provenance(has_metadata=False),
        "xmp": Provenance(),
        "xmp_and_c2pa": Provenance(**write_signing_files(folder).settings),
    }
    rows: dict[str, Any] = {}
    for image_format in FORMATS:
        works = {name: functools.partial(_written, one, image_format) for name, one in kinds.items()}
        sizes = {
            f"{name}_bytes": round(statistics.median(len(work(image)) for image in images)) for name, work in works.items()
        }
        rows[image_format.value] = {**times_ms(works, images, rounds), **sizes}
    marking = {"embed": lambda image: watermark.embed(image.tobytes(), *image.size), "read": watermark.read}
    rows["watermark"] = times_ms(marking, images, rounds)
    return rows


def _written(provenance: Provenance, image_format: ImageFormat, image: Image.Image) -> bytes:
    return provenance.write(image, image_format, ORIGIN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs over all pictures for a time, default 3")
    parser.add_argument("--package", type=Path, help="folder with the package invisible-watermark")
    parser.add_argument("-o", "--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    found = list(pictures())
    with tempfile.TemporaryDirectory() as folder:
        result = {
            **environment.circumstances((*environment.PACKAGES, "pillow", "c2pa-python")),
            "size_px": SIDE_PX,
            "pictures": len(found),
            "costs": costs([image for _, image in found], Path(folder), asked.rounds),
            "watermark": robustness(found),
        }
    if asked.package is not None:
        result["package"] = package_agreement(found, asked.package)
    asked.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
