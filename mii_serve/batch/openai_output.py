"""The output and the error file of OpenAI's batch format, rendered line by line from the journal and the pictures."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

from mii_serve.batch.journal import Journal, JournalRow, RowState
from mii_serve.batch.output import OutputFolder

_STATUS = {"InvalidRequestError": 400, "ContentBlockedError": 400}
_CODES = {"InvalidRequestError": "invalid_value", "ContentBlockedError": "moderation_blocked"}


class Kind(Enum):
    OUTPUT = "output"
    ERRORS = "errors"


class Renderer:
    """Nothing is kept in memory but the line at hand."""

    def __init__(self, journal: Journal, output: OutputFolder, job_id: str, *, created: int, is_expired: bool) -> None:
        """`created` is the time in the answers. Rows that an expired job has not made are errors."""
        self._journal = journal
        self._output = output
        self._job_id = job_id
        self._created = created
        self._is_expired = is_expired

    def lines(self, kind: Kind) -> Iterator[bytes]:
        return self._lines(kind, self._base64)

    def sizes(self) -> tuple[int, int]:
        """The bytes of the output and of the error file; no picture is read for it."""
        output = sum(len(line) for line in self._lines(Kind.OUTPUT, lambda name: ""))
        for row in self._journal.all_rows():
            output += sum(4 * -(-picture.num_bytes // 3) for picture in self._journal.pictures(row.n))
        return output, sum(len(line) for line in self._lines(Kind.ERRORS, lambda name: ""))

    def _lines(self, kind: Kind, encoded: Callable[[str], str]) -> Iterator[bytes]:
        for row in self._journal.all_rows():
            if row.state is RowState.DONE and kind is Kind.OUTPUT:
                yield self._line(row, {"status_code": 200, "request_id": self._id(row), "body": self._body(row, encoded)}, None)
            elif row.state in (RowState.FAILED, RowState.REFUSED) and kind is Kind.ERRORS:
                yield self._line(row, self._refusal(row), None)
            elif row.state is RowState.OPEN and self._is_expired and kind is Kind.ERRORS:
                text = "This request could not be executed before the completion window expired."
                yield self._line(row, None, {"code": "batch_expired", "message": text})

    def _line(self, row: JournalRow, response: dict[str, Any] | None, error: dict[str, Any] | None) -> bytes:
        line = {"id": self._id(row), "custom_id": row.id, "response": response, "error": error}
        return json.dumps(line, ensure_ascii=False).encode() + b"\n"

    def _id(self, row: JournalRow) -> str:
        return f"batch_req_{self._job_id.removeprefix('batch_')}_{row.n}"

    def _body(self, row: JournalRow, encoded: Callable[[str], str]) -> dict[str, Any]:
        pictures = self._journal.pictures(row.n)
        data = [
            {
                "b64_json": encoded(self._output.name_of(row.n, i, len(pictures))),
                "seed": picture.seed,
                "nsfw_content_detected": picture.nsfw,
                **({} if picture.blocked is None else {"moderation_blocked": picture.blocked}),
            }
            for i, picture in enumerate(pictures)
        ]
        made = row.result
        size = f"{made['width']}x{made['height']}"
        return {"created": self._created, "data": data, "output_format": "png", "size": size, "parameters": made}

    def _base64(self, name: str) -> str:
        return base64.b64encode((self._output.path / name).read_bytes()).decode("ascii")

    def _refusal(self, row: JournalRow) -> dict[str, Any]:
        kind = row.result.get("error", "")
        error = {
            "code": _CODES.get(kind, "generation_failed"),
            "message": row.result.get("message", ""),
            "type": "invalid_request_error" if kind in _STATUS else "server_error",
            "param": row.result.get("field"),
        }
        return {"status_code": _STATUS.get(kind, 500), "request_id": self._id(row), "body": {"error": error}}
