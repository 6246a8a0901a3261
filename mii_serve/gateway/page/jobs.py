"""The batch jobs of a caller as the page lists them: `/ui/jobs`. What the page does to them goes through `/v1`."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response

from mii_serve.gateway.middleware import HttpCall
from mii_serve.server.job_store import StoredBatch
from mii_serve.server.jobs import Jobs

MAX_LISTED = 20
"""The newest; programs list all with `/v1/batches`."""


class PageJobs:
    """A caller sees the jobs of its own API key."""

    def __init__(self, jobs: Jobs) -> None:
        self._store = jobs.store

    async def list(self, call: HttpCall) -> Response:
        owner = call.context.key_name or ""
        names = {file.id: file.name for file in self._store.files(owner)}
        found = self._store.batches(owner)
        shown = [_job(batch, names) for batch in found[:MAX_LISTED]]
        return JSONResponse({"jobs": shown, "num_jobs": len(found)}, headers={"cache-control": "no-store"})


def _job(batch: StoredBatch, names: dict[str, str]) -> dict[str, Any]:
    files = ((batch.output_file_id, "pictures"), (batch.error_file_id, "errors"))
    return {
        "id": batch.id,
        "name": names.get(batch.input_file_id, ""),
        "status": batch.status,
        "is_open": batch.is_open,
        "created_at": batch.created_at,
        "total": batch.total,
        "completed": batch.completed,
        "failed": batch.failed,
        "problem": batch.errors[0]["message"] if batch.errors else "",
        "files": [{"id": file_id, "name": names[file_id], "kind": kind} for file_id, kind in files if file_id in names],
    }
