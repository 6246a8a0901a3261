"""OpenAI's files and batches: `/v1/files` and `/v1/batches`, for batches of `/v1/images/generations`.

A caller sees the files and batches of its own API key. Without a folder for jobs, each call says how the operator turns it on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mii_serve.batch.rows import OPENAI_URL
from mii_serve.errors import InvalidRequestError, NotFoundError
from mii_serve.gateway.json_body import JsonObject, one_of, validated
from mii_serve.gateway.middleware import Dialect, Endpoints, HttpCall
from mii_serve.gateway.multipart import Upload, read_nothing, read_upload
from mii_serve.server.job_store import StoredBatch, StoredFile
from mii_serve.server.jobs import Jobs

MAX_FILE_BYTES = 200 * 1024 * 1024
MAX_NAME_CHARS = 255
MAX_METADATA = 16
DEFAULT_LIMIT, MAX_LIMIT = 20, 100
LINES = "application/jsonl"
ROUTES = (
    ("POST", "/v1/files"),
    ("GET", "/v1/files"),
    ("GET", "/v1/files/{file_id}"),
    ("DELETE", "/v1/files/{file_id}"),
    ("GET", "/v1/files/{file_id}/content"),
    ("POST", "/v1/batches"),
    ("GET", "/v1/batches"),
    ("GET", "/v1/batches/{batch_id}"),
    ("POST", "/v1/batches/{batch_id}/cancel"),
)
TIMES = {
    "in_progress": "in_progress_at",
    "finalizing": "finalizing_at",
    "completed": "completed_at",
    "failed": "failed_at",
    "expired": "expired_at",
    "cancelling": "cancelling_at",
    "cancelled": "cancelled_at",
}


class _Expiry(JsonObject):
    anchor: Annotated[str, one_of(("created_at",))]
    seconds: int = Field(ge=3600, le=2_592_000)


class _BatchBody(JsonObject):
    input_file_id: str
    endpoint: Annotated[str, one_of((OPENAI_URL,))]
    completion_window: Annotated[str, one_of(("24h",))]
    metadata: dict[str, str] | None = Field(None, max_length=MAX_METADATA)
    output_expires_after: _Expiry | None = None


class Batches:
    """The calls."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._store = jobs.store

    def routes(self, endpoints: Endpoints, dialect: Dialect) -> list[Route]:
        async def upload(request: Request) -> Upload:
            return await read_upload(request, self._store.uploads, MAX_FILE_BYTES)

        handlers = (
            self.create_file,
            self.files,
            self.file,
            self.delete_file,
            self.content,
            self.create,
            self.batches,
            self.batch,
            self.cancel,
        )
        reading = {self.create_file: upload, self.cancel: read_nothing}
        work = (self.create_file, self.create)
        return [
            endpoints.route(path, handler, dialect, method=method, is_work=handler in work, read=reading.get(handler))
            for (method, path), handler in zip(ROUTES, handlers, strict=True)
        ]

    # ---- files -----------------------------------------------------------------------------------------------------

    async def create_file(self, call: HttpCall) -> Response:
        upload: Upload = call.body
        try:
            if upload.file_name is None:
                raise InvalidRequestError("file", "is missing")
            if (purpose := upload.fields.get("purpose")) != "batch":
                raise InvalidRequestError("purpose", "must be batch", "nothing" if purpose is None else repr(purpose[:40]))
            expiry, name = _expiry_of(upload.fields), upload.file_name[:MAX_NAME_CHARS]
            return JSONResponse(_file(self._store.add_file(_owner(call), upload.path, name, purpose, expiry)))
        finally:
            upload.discard()

    async def files(self, call: HttpCall) -> Response:
        purpose = call.request.query_params.get("purpose")
        found = [file for file in self._store.files(_owner(call)) if purpose in (None, file.purpose)]
        return _page(call, found, _file)

    async def file(self, call: HttpCall) -> Response:
        return JSONResponse(_file(self._asked_file(call)))

    async def delete_file(self, call: HttpCall) -> Response:
        file_id = call.request.path_params["file_id"]
        self._store.delete_file(_owner(call), file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    async def content(self, call: HttpCall) -> Response:
        file = self._asked_file(call)
        if not file.batch_id:
            return FileResponse(self._store.path_of(file), media_type=LINES)
        lines: Iterator[bytes] = self._jobs.lines(file)
        return StreamingResponse(lines, media_type=LINES, headers={"content-length": str(file.num_bytes)})

    def _asked_file(self, call: HttpCall) -> StoredFile:
        return self._store.file(_owner(call), call.request.path_params["file_id"])

    # ---- batches ---------------------------------------------------------------------------------------------------

    async def create(self, call: HttpCall) -> Response:
        body = validated(_BatchBody, call.body)
        owner, client = _owner(call), call.context.client
        expiry = None if body.output_expires_after is None else body.output_expires_after.seconds
        return JSONResponse(_batch(self._jobs.create(owner, client, body.input_file_id, body.metadata or {}, expiry)))

    async def batches(self, call: HttpCall) -> Response:
        return _page(call, self._store.batches(_owner(call)), _batch)

    async def batch(self, call: HttpCall) -> Response:
        return JSONResponse(_batch(self._store.batch(_owner(call), call.request.path_params["batch_id"])))

    async def cancel(self, call: HttpCall) -> Response:
        return JSONResponse(_batch(self._jobs.cancel(_owner(call), call.request.path_params["batch_id"])))


def routes_without_jobs(endpoints: Endpoints, dialect: Dialect) -> list[Route]:
    """What answers where jobs are off."""

    async def refuse(call: HttpCall) -> Response:
        raise NotFoundError("files and batches are off; the server's operator turns them on with --jobs-folder", "not_enabled")

    return [endpoints.route(path, refuse, dialect, method=method, is_work=False, read=read_nothing) for method, path in ROUTES]


def _expiry_of(fields: Mapping[str, str]) -> int | None:
    """The seconds that a form's `expires_after[anchor]` and `expires_after[seconds]` ask for."""
    given = {name: fields[key] for name in ("anchor", "seconds") if (key := f"expires_after[{name}]") in fields}
    if not given:
        return None
    seconds = given.get("seconds", "")
    body = {**given, "seconds": int(seconds)} if seconds.isascii() and seconds.isdigit() and len(seconds) < 10 else given
    try:
        return validated(_Expiry, body).seconds
    except InvalidRequestError as error:
        raise InvalidRequestError(f"expires_after[{error.field}]", error.rule) from None


def _owner(call: HttpCall) -> str:
    return call.context.key_name or ""


def _page(call: HttpCall, found: Sequence[Any], shown: Any) -> Response:
    """A part of a list, from the one after `after` on."""
    query = call.request.query_params
    limit = query.get("limit", str(DEFAULT_LIMIT))
    if not limit.isascii() or not limit.isdigit() or int(limit[:9]) < 1:
        raise InvalidRequestError("limit", "must be a whole number, 1 or more", repr(limit[:20]))
    if query.get("order", "desc") == "asc":
        found = list(reversed(found))
    if (after := query.get("after")) is not None:
        ids = [one.id for one in found]
        found = found[ids.index(after) + 1 :] if after in ids else []
    most = min(int(limit[:9]), MAX_LIMIT)
    data = [shown(one) for one in found[:most]]
    ends = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return JSONResponse({"object": "list", "data": data, **ends, "has_more": len(found) > most})


def _file(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
    }


def _batch(batch: StoredBatch) -> dict[str, Any]:
    errors = {"object": "list", "data": list(batch.errors)} if batch.errors else None
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": OPENAI_URL,
        "errors": errors,
        "input_file_id": batch.input_file_id,
        "completion_window": "24h",
        "status": batch.status,
        "output_file_id": None if batch.output_bytes is None else batch.output_file_id,
        "error_file_id": None if batch.error_bytes is None else batch.error_file_id,
        "created_at": batch.created_at,
        "expires_at": batch.expires_at,
        **{name: batch.times.get(status) for status, name in TIMES.items()},
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "metadata": batch.metadata or None,
    }
