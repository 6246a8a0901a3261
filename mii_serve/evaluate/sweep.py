"""The rows of an evaluation: every prompt of an input at every guidance scale, with one seed for all scales of a prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mii_serve.batch.check import Findings, InputRefusedError
from mii_serve.batch.inputs import InputFile
from mii_serve.batch.readers import Problem
from mii_serve.batch.rows import Row
from mii_serve.batch.seeds import seed_of_row
from mii_serve.batch.settings import DEFAULT_NAMES
from mii_serve.errors import InvalidRequestError

SCALE = "guidance_scale"


def scales_of(text: str) -> tuple[float, ...]:
    """The guidance scales that a list such as `1.5,2,3` names.

    Raises:
        InvalidRequestError: one is no number, or is there twice.
    """
    try:
        scales = tuple(float(one) for one in text.split(","))
    except ValueError:
        raise InvalidRequestError("--guidance", "must be numbers with commas between, such as 1.5,2,3", repr(text)) from None
    if not all(map(math.isfinite, scales)):
        raise InvalidRequestError("--guidance", "must be finite numbers", repr(text))
    if len(set(scales)) < len(scales):
        raise InvalidRequestError("--guidance", "names a scale twice", repr(text))
    return scales


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Prompt p at the s-th scale is row `p * len(scales) + s`: prompts that are appended later become rows at the end."""

    scales: Sequence[float]
    seed: int

    def write(self, files: Sequence[InputFile], path: Path) -> int:
        """Write the rows, over any that were there. The same input gives the same bytes. Returns the number of prompts.

        Raises:
            InputRefusedError: rows of the input are wrong.
        """
        findings, num_prompts = Findings(), 0
        half = path.with_name(f"{path.name}.part")
        try:
            with half.open("w", encoding="utf-8") as written:
                for file in files:
                    for row in _rows(file, findings):
                        for line in self._lines(row, num_prompts):
                            written.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
                        num_prompts += 1
            if findings.num_problems:
                raise InputRefusedError(findings)
            half.replace(path)
        finally:
            half.unlink(missing_ok=True)
        return num_prompts

    def _lines(self, row: Row, number: int) -> Iterator[dict[str, Any]]:
        given = {name: value for name in DEFAULT_NAMES if (value := getattr(row.params, name)) is not None}
        seed = row.params.seed
        if seed is None:
            seed = seed_of_row(self.seed, str(number) if row.id is None else row.id)
        given_id = {} if row.id is None else {"given_id": row.id}
        for scale in self.scales:
            yield {
                **row.extra,
                **given_id,
                "id": f"{number}@{scale:g}",
                "prompt": row.params.prompt,
                **given,
                "seed": seed,
                SCALE: scale,
            }


def _rows(file: InputFile, findings: Findings) -> Iterator[Row]:
    for record in file.open().records():
        problem = record.problem
        if record.row is not None and record.row.params.guidance_scale is not None:
            problem = Problem(record.line, SCALE, "is what the evaluation varies; leave it out")
        if problem is not None:
            findings.add(file, problem)
        elif record.row is not None:
            yield record.row
