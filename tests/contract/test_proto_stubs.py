"""The committed stubs are what the .proto says, and the .proto only ever grows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mii_serve.proto.v1 import image_generation_pb2 as pb

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden" / "proto_fields.json"


def test_the_committed_stubs_match_the_proto(tmp_path: Path):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, str(ROOT / "tools" / "generate_stubs.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True, env=environment)
    generated = sorted(tmp_path.rglob("*.py*"))
    assert len(generated) == 12
    for path in generated:
        committed = ROOT / path.relative_to(tmp_path)
        assert committed.read_text() == path.read_text(), f"{committed} is stale: run `make stubs`"


def all_fields() -> dict[str, str]:
    """Every field as "Message.name": "number type", enum values included."""
    found: dict[str, str] = {}

    def visit(message) -> None:
        for field in message.fields:
            kind = field.message_type or field.enum_type
            found[f"{message.full_name}.{field.name}"] = f"{field.number} {kind.full_name if kind else field.type}"
        for enum in message.enum_types:
            found.update({f"{enum.full_name}.{value.name}": str(value.number) for value in enum.values})
        for nested in message.nested_types:
            visit(nested)

    for message in pb.DESCRIPTOR.message_types_by_name.values():
        visit(message)
    for enum in pb.DESCRIPTOR.enum_types_by_name.values():
        found.update({f"{enum.full_name}.{value.name}": str(value.number) for value in enum.values})
    return found


def test_no_field_changes_its_number_or_type(request: pytest.FixtureRequest):
    if request.config.getoption("--update-goldens"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(all_fields(), indent=1, sort_keys=True) + "\n")
    golden = json.loads(GOLDEN.read_text())
    now = all_fields()
    assert {name: now.get(name) for name in golden} == golden, "an old client would misread this"
    assert set(now) == set(golden), "new fields: run `make goldens` and read the diff"
