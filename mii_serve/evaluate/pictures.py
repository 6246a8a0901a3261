"""The pictures of an evaluation's job, as its index names them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mii_serve.batch.output import ERRORS, INDEX


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """One picture: of which prompt, at which of the scales (both by number), and where."""

    prompt_number: int
    scale_number: int
    prompt: str
    path: Path
    sha256: str
    is_flagged: bool
    """The model's safety checker or content safety has blacked it out, so that there is nothing to measure."""


def lines_of(job: Path) -> Iterator[Mapping[str, Any]]:
    """The lines of the job's index, with the members of the prompt's own row beside the parameters."""
    with (job / INDEX).open(encoding="utf-8") as file:
        for text in file:
            line = json.loads(text)
            yield {**line.pop("extra", {}), **line}


def picture_of(line: Mapping[str, Any], job: Path, num_scales: int) -> Picture:
    prompt_number, scale_number = divmod(line["row"], num_scales)
    return Picture(
        prompt_number=prompt_number,
        scale_number=scale_number,
        prompt=line["prompt"],
        path=job / line["file"],
        sha256=line["sha256"],
        is_flagged=bool(line["nsfw_content_detected"] or line["moderation_blocked"]),
    )


def failed_rows(job: Path, num_scales: int) -> Counter[int]:
    """How many rows have failed, by the number of the scale."""
    with (job / ERRORS).open(encoding="utf-8") as file:
        return Counter(json.loads(text)["row"] % num_scales for text in file)
