"""The report of an evaluation: `report.json`, `report.md` and the pictures they show."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from mii_serve.evaluate.estimates import CONFIDENCE, NUM_COSTLY, NUM_RESAMPLES, Estimate
from mii_serve.evaluate.measure import Measured, Metric
from mii_serve.evaluate.pictures import Picture

SHEET_PROMPTS, TILE_PX, LABEL_PX = 8, 96, 14


def caveats(measured: Measured) -> list[str]:
    """What a reader has to know before comparing figures."""
    texts = [
        f"The intervals are {CONFIDENCE:.0%} intervals of a bootstrap over prompts ({NUM_RESAMPLES} draws, {NUM_COSTLY} for"
        " distances). They say what other prompts of the same kind would have given. All scales have the same prompts"
        " and seeds, so that differences between scales are known better than the intervals say.",
        f"What pictures look like is measured of {measured.num_prompts_measured} of {measured.num_prompts} prompts: those that"
        " have pictures at all scales, none of them blacked out.",
    ]
    if any(metric.floor is not None for metric in measured.metrics):
        texts.append(
            "A Fréchet distance is too large by an amount that grows as pictures are fewer (`bias` is the bootstrap's estimate"
            " of it). Compare distances only with those of as many pictures and of the same reference. The intervals take the"
            " reference as it is."
        )
    return texts


def to_json(about: Mapping[str, Any], measured: Measured) -> dict[str, Any]:
    rows = [
        {
            "guidance_scale": row.scale,
            "num_pictures": row.num_pictures,
            "num_failed": row.num_failed,
            "num_flagged": row.num_flagged,
            "num_repeated": row.num_repeated,
            "num_measured": row.num_measured,
            "estimates": {name: _rounded(estimate) for name, estimate in row.estimates.items()},
        }
        for row in measured.rows
    ]
    return {
        **about,
        "num_prompts": measured.num_prompts,
        "num_prompts_measured": measured.num_prompts_measured,
        "num_reference": measured.num_reference,
        "metrics": [_metric(metric) for metric in measured.metrics],
        "rows": rows,
        "caveats": caveats(measured),
    }


def _metric(metric: Metric) -> dict[str, Any]:
    described = asdict(metric)
    if metric.floor is None:
        del described["floor"], described["floor_pictures"]
    else:
        described["floor"] = _digits(metric.floor)
    return described


def _rounded(estimate: Estimate) -> dict[str, Any]:
    found = {name: _digits(value) if isinstance(value, float) else value for name, value in asdict(estimate).items()}
    return found if estimate.bias is not None else {name: value for name, value in found.items() if name != "bias"}


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


def to_markdown(report: Mapping[str, Any], plot: str | None, sheet: str | None) -> str:
    """The same for people."""
    names = [metric["name"] for metric in report["metrics"]]
    head = ["guidance scale", "pictures", "failed", "measured", *names]
    lines = [head, ["---:"] * len(head)]
    for row in report["rows"]:
        cells = [f"{row['guidance_scale']:g}", *(str(row[key]) for key in ("num_pictures", "num_failed", "num_measured"))]
        lines.append([*cells, *(_cell(row["estimates"].get(name)) for name in names)])
    steps = report["settings"].get("num_inference_steps")
    title = f"# {report['model']} over guidance scales"
    about = [f"Model revision {report['model_revision']}, {report['engine']}, {report['dtype']}"]
    about += [f"seed {report['settings']['seed']}", *([f"{steps} steps"] if steps is not None else [])]
    parts = [title, "; ".join(about) + ".", "".join(f"| {' | '.join(line)} |\n" for line in lines).rstrip()]
    parts += [f"![metrics over guidance scales]({plot})"] if plot else []
    parts.append("\n".join(f"- `{metric['name']}`: {metric['text']}{_floor(metric)}." for metric in report["metrics"]))
    parts.append("\n".join(f"- {text}" for text in report["caveats"]))
    parts += [f"![the first prompts]({sheet})"] if sheet else []
    return "\n\n".join(parts) + "\n"


def _floor(metric: Mapping[str, Any]) -> str:
    if "floor" not in metric:
        return ""
    return f". Two halves of the reference, {metric['floor_pictures']} pictures each, are {metric['floor']:.4g} apart"


def _cell(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return ""
    if estimate["low"] is None:
        return f"{estimate['value']:.4g}"
    return f"{estimate['value']:.4g} ({estimate['low']:.4g} to {estimate['high']:.4g})"


def write_sheet(path: Path, pictures: Sequence[Picture], scales: Sequence[float]) -> None:
    """The first prompts: a line for each, a column for each scale."""
    shown = sorted({picture.prompt_number for picture in pictures})[:SHEET_PROMPTS]
    sheet = Image.new("RGB", (TILE_PX * len(scales), LABEL_PX + TILE_PX * len(shown)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, scale in enumerate(scales):
        pen.text((number * TILE_PX + 4, 1), f"{scale:g}", fill="black")
    placed = set()
    for picture in pictures:
        place = picture.scale_number, picture.prompt_number
        if picture.prompt_number in shown and place not in placed:
            placed.add(place)
            with Image.open(picture.path) as opened:
                tile = opened.convert("RGB").resize((TILE_PX - 2, TILE_PX - 2), Image.Resampling.BICUBIC)
            at = picture.scale_number * TILE_PX, LABEL_PX + shown.index(picture.prompt_number) * TILE_PX
            sheet.paste(tile, at)
    sheet.save(path)


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    half = path.with_name(f"{path.name}.part")
    half.write_text(text, encoding="utf-8")
    half.replace(path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
