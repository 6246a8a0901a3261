"""A `multipart/form-data` body, read piece by piece: small fields into memory; one file onto the disk, or some into memory."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections.abc import AsyncIterator, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import Request

from mii_serve.errors import InvalidRequestError, RequestCancelledError
from mii_serve.gateway.errors import BodyTooLargeError, MediaTypeError

MAX_FIELDS = 32
MAX_FIELD_BYTES = 4096
MAX_TEXT_BYTES = 64 * 1024
"""Of a field of a form that is a request: prompts are longer than other fields."""
MAX_HEADER_BYTES = 8192
FORM_TIMEOUT_S = 120.0
UPLOAD_TIMEOUT_S = 900.0
"""A body that trickles in must not hold a connection for ever."""
_BOUNDARY = re.compile(r'boundary="?([0-9A-Za-z\'()+_,./:=? -]{1,70})"?', re.ASCII)
_NAME = re.compile(rb'content-disposition:\s*form-data;[^\r\n]*?[ ;]name="([^"\r\n]{0,200})"', re.IGNORECASE)
_FILE_NAME = re.compile(rb'filename="([^"\r\n]{0,1000})"', re.IGNORECASE)
_MALFORMED = "must be well-formed multipart/form-data"


@dataclass(slots=True)
class Upload:
    """The fields of a form, and the file that came with it; the file is removed with `discard`, unless it was moved."""

    path: Path
    fields: dict[str, str] = field(default_factory=dict)
    file_name: str | None = None

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)


@dataclass(slots=True)
class Form:
    """The fields of a form, and the files that came with it."""

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Begin:
    """A part begins; `file_name` is None where it is a field."""

    name: str
    file_name: str | None


class FormParser:
    """Takes pieces of a body; gives the beginnings of parts and what is in them. No I/O."""

    def __init__(self, boundary: str) -> None:
        self._delimiter = b"\r\n--" + boundary.encode("ascii")
        self._rest = bytearray(b"\r\n")  # so that the first delimiter is like the others
        self._is_in_part = self._is_in_headers = False
        self.is_over = False

    def feed(self, piece: bytes) -> Iterator[Begin | bytes]:
        """Raises:
        InvalidRequestError: the body is no form.
        """
        self._rest += piece
        while not self.is_over:
            if self._is_in_headers:
                end = self._rest.find(b"\r\n\r\n")
                if end < 0:
                    if len(self._rest) > MAX_HEADER_BYTES:
                        raise InvalidRequestError("body", _MALFORMED)
                    return
                yield self._begin(bytes(self._rest[:end]))
                del self._rest[: end + 4]
                self._is_in_headers, self._is_in_part = False, True
            at = self._rest.find(self._delimiter)
            if at < 0:
                certain = len(self._rest) - len(self._delimiter)
                if certain > 0:
                    if self._is_in_part:
                        yield bytes(self._rest[:certain])
                    del self._rest[:certain]
                return
            after = at + len(self._delimiter)
            if len(self._rest) < after + 2:
                return
            if at and self._is_in_part:
                yield bytes(self._rest[:at])
            self.is_over = self._rest[after : after + 2] == b"--"
            if not self.is_over and self._rest[after : after + 2] != b"\r\n":
                raise InvalidRequestError("body", _MALFORMED)
            del self._rest[: after + 2]
            self._is_in_part, self._is_in_headers = False, True

    def _begin(self, headers: bytes) -> Begin:
        name, file_name = _NAME.search(headers), _FILE_NAME.search(headers)
        if name is None:
            raise InvalidRequestError("body", _MALFORMED)
        return Begin(_text(name[1]), None if file_name is None else _text(file_name[1]))


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


async def read_upload(request: Request, folder: Path, max_bytes: int) -> Upload:
    """The form of a request; its file, the part `file`, goes into the folder.

    Raises:
        BodyTooLargeError, MediaTypeError, InvalidRequestError: naming the rule.
        RequestCancelledError: the caller left before the body was complete.
    """
    boundary = _boundary(request.headers.get("content-type", ""))
    upload = Upload(folder / secrets.token_hex(16))
    try:
        async with asyncio.timeout(UPLOAD_TIMEOUT_S):
            with upload.path.open("wb") as file:
                parser, values, name = FormParser(boundary), dict[str, bytes](), ""
                async for piece in _pieces(request, max_bytes):
                    for part in parser.feed(piece):
                        if isinstance(part, Begin):
                            name = _begun(part, upload, values)
                        elif name == "file":
                            await asyncio.to_thread(file.write, part)
                        else:
                            values[name] += part
                            if len(values[name]) > MAX_FIELD_BYTES:
                                raise InvalidRequestError(name[:80], f"must be at most {MAX_FIELD_BYTES} bytes")
        if not parser.is_over:
            raise InvalidRequestError("body", _MALFORMED)
    except TimeoutError:
        upload.discard()
        raise InvalidRequestError("body", f"must arrive within {UPLOAD_TIMEOUT_S:g} seconds") from None
    except BaseException:
        upload.discard()
        raise
    upload.fields = {name: value.decode("utf-8", "replace") for name, value in values.items()}
    return upload


async def read_form(request: Request, max_bytes: int, file_names: Collection[str]) -> Form:
    """The form of a request, all of it in memory. Parts of the `file_names` are files; each comes once, as does each field.

    Raises:
        BodyTooLargeError, MediaTypeError, InvalidRequestError: naming the rule.
        RequestCancelledError: the caller left before the body was complete.
    """
    parser = FormParser(_boundary(request.headers.get("content-type", "")))
    parts, name = dict[str, bytearray](), ""
    try:
        async with asyncio.timeout(FORM_TIMEOUT_S):
            async for piece in _pieces(request, max_bytes):
                for part in parser.feed(piece):
                    if isinstance(part, Begin):
                        name = part.name.removesuffix("[]")
                        if name in parts:
                            raise InvalidRequestError(name[:80], "must come once")
                        if len(parts) >= MAX_FIELDS:
                            raise InvalidRequestError("body", f"must have at most {MAX_FIELDS} fields")
                        parts[name] = bytearray()
                        continue
                    parts[name] += part
                    if name not in file_names and len(parts[name]) > MAX_TEXT_BYTES:
                        raise InvalidRequestError(name[:80], f"must be at most {MAX_TEXT_BYTES} bytes")
    except TimeoutError:
        raise InvalidRequestError("body", f"must arrive within {FORM_TIMEOUT_S:g} seconds") from None
    if not parser.is_over:
        raise InvalidRequestError("body", _MALFORMED)
    form = Form()
    for name, content in parts.items():
        if name in file_names:
            form.files[name] = bytes(content)
        else:
            form.fields[name] = _text(bytes(content))
    return form


def _begun(part: Begin, upload: Upload, values: dict[str, bytes]) -> str:
    if part.name == "file":
        if upload.file_name is not None:
            raise InvalidRequestError("file", "must come once")
        upload.file_name = part.file_name or "file"
    else:
        if len(values) >= MAX_FIELDS:
            raise InvalidRequestError("body", f"must have at most {MAX_FIELDS} fields")
        values[part.name] = b""
    return part.name


def _boundary(content_type: str) -> str:
    kind, _, parameters = content_type.partition(";")
    found = _BOUNDARY.search(parameters)
    if kind.strip().lower() != "multipart/form-data" or found is None:
        shown = repr(content_type[:60]) if content_type else "nothing"
        raise MediaTypeError("content-type", "must be multipart/form-data", shown)
    return found[1]


async def _pieces(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    num_bytes = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise RequestCancelledError("the caller has gone away")
        piece: bytes = message.get("body", b"")
        num_bytes += len(piece)
        if num_bytes > max_bytes:
            raise BodyTooLargeError("body", f"must be at most {max_bytes} bytes")
        yield piece
        if not message.get("more_body", False):
            return


async def read_nothing(request: Request) -> None:
    """Read a body that is not used to its end, if it is short."""
    with contextlib.suppress(BodyTooLargeError):
        async for _ in _pieces(request, MAX_FIELD_BYTES):
            pass
