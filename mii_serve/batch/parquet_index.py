"""The index of a job as a Parquet file; needs the extra `parquet`.

A column for each member of a line of `index.jsonl`. What is no single value there (`scheduler_options`, `extra`) is JSON text,
and a seed is an unsigned number of 64 bits.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, get_type_hints

import pyarrow
import pyarrow.parquet

from mii_serve.batch.output import PARQUET_INDEX, PARTS, OutputFolder
from mii_serve.types import EffectiveParameters

GROUP = 8192
"""Lines that are held in memory, and that a row group has."""
_KINDS = {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string(), bool: pyarrow.bool_()}
_JSON = pyarrow.string()
_OWN = {
    "row": pyarrow.int64(),
    "id": pyarrow.string(),
    "image": pyarrow.int32(),
    "file": pyarrow.string(),
    "member": pyarrow.string(),
    "input": pyarrow.string(),
    "line": pyarrow.int64(),
}
_AFTER = {
    "seed": pyarrow.uint64(),
    "nsfw_content_detected": pyarrow.bool_(),
    "moderation_blocked": pyarrow.bool_(),
    "bytes": pyarrow.int64(),
    "sha256": pyarrow.string(),
    "extra": _JSON,
}


def _schema() -> Any:
    hints = get_type_hints(EffectiveParameters)
    effective = {one.name: _KINDS.get(hints[one.name], _JSON) for one in fields(EffectiveParameters) if one.name != "device"}
    return pyarrow.schema(list({**_OWN, **effective, **_AFTER}.items()))


def write_parquet_index(output: OutputFolder, lines: Iterable[dict[str, Any]]) -> None:
    """Write the file, whole or not at all, in constant memory."""
    schema, half = _schema(), output.path / PARTS / PARQUET_INDEX
    lines = iter(lines)
    with pyarrow.parquet.ParquetWriter(half, schema, compression="zstd") as writer:
        while group := list(itertools.islice(lines, GROUP)):
            writer.write_table(pyarrow.Table.from_pylist([_flat(line, schema) for line in group], schema))
    with half.open("rb+") as file:
        os.fsync(file.fileno())
    half.replace(output.path / PARQUET_INDEX)


def _flat(line: dict[str, Any], schema: Any) -> dict[str, Any]:
    return {
        name: json.dumps(line[name], ensure_ascii=False) if isinstance(line[name], dict | list) else line[name]
        for name in schema.names
        if name in line
    }
