"""OpenAI's files and batches over real HTTP: the unmodified client over a restart, and what has to be refused."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx2
import pytest
from fake_engine import FakeEngine
from outside import run_client
from patience import PATIENCE_S
from servers import running_server

from mii_serve.config import ContentSafetyConfig, DeployConfig
from mii_serve.gateway.app import serve_http
from mii_serve.gateway.multipart import Begin, FormParser
from mii_serve.server import job_store, jobs
from mii_serve.server.keys import KeyRing

KEY, OTHER = "studio-key-0123456789", "other-key-0123456789"


@contextlib.asynccontextmanager
async def served(
    folder: Path, engine: FakeEngine | None = None, *, has_jobs: bool = True, keys: KeyRing | None = None, **behind: object
) -> AsyncIterator[tuple[httpx2.AsyncClient, FakeEngine]]:
    """A server with a folder for jobs, and two keys."""
    file = folder / "keys"
    file.write_text(f"{KEY} name=studio\n{OTHER} name=other\n")
    file.chmod(0o600)
    engine = engine or FakeEngine(max_slots=4)
    flags = {"http_port": 0, **({"jobs_folder": str(folder / "jobs")} if has_jobs else {})}
    headers = {"authorization": f"Bearer {KEY}"}
    async with (
        running_server(folder, engine, max_waiting_samples=256, **behind) as server,
        serve_http(DeployConfig.load(flags), server.dispatcher, keys or KeyRing(file)) as address,
        httpx2.AsyncClient(base_url=f"http://{address}/v1", timeout=PATIENCE_S, headers=headers) as client,
    ):
        yield client, engine
        engine.gate.set()


def line(number: int, **body: object) -> str:
    members = {"prompt": f"a circle, number {number}", **body}
    return json.dumps({"custom_id": f"r{number}", "method": "POST", "url": "/v1/images/generations", "body": members}) + "\n"


async def uploaded(client: httpx2.AsyncClient, *lines: str) -> str:
    answer = await client.post("/files", files={"file": ("in.jsonl", "".join(lines))}, data={"purpose": "batch"})
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


async def created(client: httpx2.AsyncClient, file_id: str) -> dict:
    body = {"input_file_id": file_id, "endpoint": "/v1/images/generations", "completion_window": "24h"}
    answer = await client.post("/batches", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def until(client: httpx2.AsyncClient, batch_id: str, is_so: Callable[[dict], bool]) -> dict:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            batch = (await client.get(f"/batches/{batch_id}")).json()
            if is_so(batch):
                return batch
            await asyncio.sleep(0.02)


def has(status: str) -> Callable[[dict], bool]:
    return lambda batch: batch["status"] == status


@pytest.mark.slow
async def test_the_openai_clients_whole_life_over_a_restart(tmp_path: Path):
    engine = FakeEngine(max_slots=4)
    async with served(tmp_path, engine) as (client, _):
        engine.gate.clear()  # so that the restart is in the middle of the work
        begun = json.loads(await asyncio.to_thread(run_client, "openai", "openai_batches.py", _address(client), KEY, "begin"))
    assert begun["file"] == ["file", "batch", "in.jsonl", "processed"]
    assert begun["status"] == "validating" and begun["counts"]
    codes = [["invalid_value", 2], ["duplicate_custom_id", 3], ["invalid_json_line", 4], ["model_mismatch", 5]]
    assert begun["failed"] == ["failed", codes, None]
    assert begun["errors"] == {
        "purpose": ["BadRequestError", 400, "invalid_value"],
        "no file": ["NotFoundError", 404, "not_found"],
        "no batch": ["NotFoundError", 404, "not_found"],
        "endpoint": ["BadRequestError", 400, "invalid_value"],
    }
    async with served(tmp_path) as (client, _):
        arguments = _address(client), KEY, "end", begun["batch"]
        seen = json.loads(await asyncio.to_thread(run_client, "openai", "openai_batches.py", *arguments))
    assert seen["status"] == ["completed", 21, 20, 1, {"a": "b"}]
    assert seen["lines"][:3] == [["row-0", 200, [0]], ["row-1", 200, [1, 2]], ["row-2", 200, [2]]]
    assert len(seen["lines"]) == seen["streamed"] == 20
    assert seen["bytes"] and seen["pictures"] == ["89504e47"]
    assert seen["errors"] == [["row-20", 400]]
    assert seen["listed"] == [True, 4], "two uploads, an output and an error file"
    assert (seen["cancel"], seen["stranger"], seen["left"]) == ("completed", [0, 0], 0)
    assert seen["gone"] == ["NotFoundError", 404, "not_found"]


def _address(client: httpx2.AsyncClient) -> str:
    return str(client.base_url).rstrip("/").removesuffix("/v1")


async def test_a_job_that_was_running_goes_on_after_a_restart_and_makes_nothing_twice(tmp_path: Path):
    async with served(tmp_path) as (client, engine):
        batch = await created(client, await uploaded(client, *(line(n) for n in range(12))))
        await until(client, batch["id"], has("in_progress"))
        engine.gate.clear()
        in_use = await client.delete(f"/files/{batch['input_file_id']}")
        assert (in_use.status_code, in_use.json()["error"]["code"]) == (409, "conflict")
        await asyncio.sleep(0.1)
    async with served(tmp_path) as (client, engine):
        batch = await until(client, batch["id"], has("completed"))
        assert batch["request_counts"] == {"total": 12, "completed": 12, "failed": 0}
        text = (await client.get(f"/files/{batch['output_file_id']}/content")).text
        assert [json.loads(one)["custom_id"] for one in text.splitlines()] == [f"r{n}" for n in range(12)]
        assert batch["error_file_id"] is None


async def test_rows_that_fail_are_in_the_error_file_and_the_batch_is_completed(tmp_path: Path):
    async with served(tmp_path) as (client, _):
        many = {"scheduler": "lcm", "num_inference_steps": 60}
        batch = await created(client, await uploaded(client, line(0), line(1, **many)))
        batch = await until(client, batch["id"], has("completed"))
        assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
        [error] = [json.loads(one) for one in (await client.get(f"/files/{batch['error_file_id']}/content")).text.splitlines()]
        assert (error["custom_id"], error["response"]["status_code"]) == ("r1", 400)
        assert error["response"]["body"]["error"]["param"] == "num_inference_steps"


async def test_a_cancelled_job_keeps_what_it_has_made(tmp_path: Path):
    async with served(tmp_path) as (client, engine):
        batch = await created(client, await uploaded(client, *(line(n) for n in range(200))))
        await until(client, batch["id"], lambda batch: batch["request_counts"]["completed"] >= 20)
        engine.gate.clear()
        assert (await client.post(f"/batches/{batch['id']}/cancel")).json()["status"] == "cancelling"
        batch = await until(client, batch["id"], has("cancelled"))
        assert 20 <= batch["request_counts"]["completed"] < 200
        made = (await client.get(f"/files/{batch['output_file_id']}/content")).text.splitlines()
        assert len(made) == batch["request_counts"]["completed"]
        again = await client.post(f"/batches/{batch['id']}/cancel")
        assert (again.status_code, again.json()["status"]) == (200, "cancelled")


async def test_files_and_jobs_are_there_for_their_key_alone(tmp_path: Path):
    async with served(tmp_path) as (client, _):
        file_id = await uploaded(client, line(0))
        batch = await until(client, (await created(client, file_id))["id"], has("completed"))
        stranger = {"authorization": f"Bearer {OTHER}"}
        for path in (f"/files/{file_id}", f"/files/{batch['output_file_id']}/content", f"/batches/{batch['id']}"):
            assert (await client.get(path, headers=stranger)).status_code == 404
        assert (await client.get("/files", headers=stranger)).json()["data"] == []
        page = str(client.base_url).removesuffix("/v1/") + "/ui/jobs"
        assert (await client.get(page, headers=stranger)).json() == {"jobs": [], "num_jobs": 0}
        [listed] = (await client.get(page)).json()["jobs"]
        assert (listed["id"], listed["name"], listed["completed"]) == (batch["id"], "in.jsonl", 1)
        assert (await client.delete(f"/files/{file_id}", headers=stranger)).status_code == 404
        assert (await client.get("/files", headers={"authorization": "Bearer wrong-key"})).status_code == 401
        for known in (file_id, batch["output_file_id"]):
            assert (await client.delete(f"/files/{known}")).json()["deleted"]
        assert (await client.get("/files")).json()["data"] == []
        assert not list((tmp_path / "jobs").rglob("*.png"))


async def test_a_key_has_so_many_files_and_open_jobs_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(job_store, "MAX_OPEN_BATCHES", 1)
    monkeypatch.setattr(job_store, "MAX_FILES", 1)
    async with served(tmp_path) as (client, engine):
        engine.gate.clear()
        file_id = await uploaded(client, line(0))
        refused = await client.post("/files", files={"file": ("in.jsonl", line(0))}, data={"purpose": "batch"})
        assert refused.status_code == 429 and "retry-after" in refused.headers
        await created(client, file_id)
        body = {"input_file_id": file_id, "endpoint": "/v1/images/generations", "completion_window": "24h"}
        assert (await client.post("/batches", json=body)).status_code == 429
        engine.gate.set()
    assert not list((tmp_path / "jobs" / "uploads").iterdir())


async def test_without_a_folder_for_jobs_the_answer_names_the_flag(tmp_path: Path):
    async with served(tmp_path, has_jobs=False) as (client, _):
        for answer in (await client.get("/files"), await client.post("/batches", json={}), await client.delete("/files/x")):
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_enabled")
            assert "--jobs-folder" in answer.text


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("application/json", b"{}", 415),
        ("multipart/form-data", b"", 415),
        ("multipart/form-data; boundary=x", b"", 400),
        ("multipart/form-data; boundary=x", b"--x\r\nnothing\r\n\r\na\r\n--x--", 400),
        (
            "multipart/form-data; boundary=x",
            b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x--',
            400,
        ),
        ("multipart/form-data; boundary=x", b'--x\r\ncontent-disposition: form-data; name="file"\r\n\r\nbatch', 400),
    ],
)
async def test_what_is_no_upload_is_refused_and_leaves_nothing(tmp_path: Path, content_type: str, body: bytes, status: int):
    async with served(tmp_path) as (client, _):
        answer = await client.post("/files", content=body, headers={"content-type": content_type})
        assert answer.status_code == status, answer.text
    assert not list((tmp_path / "jobs" / "uploads").iterdir())


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_a_form_is_read_alike_in_pieces_of_any_size(size: int):
    content = b"a\r\n--xy\r\n\r\n--x\r--x\n" * 3
    body = b'--x-\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--x-\r\n'
    body += b'content-type: a/b\r\ncontent-disposition: form-data; name="file"; filename="in.jsonl"\r\n\r\n' + content
    body += b"\r\n--x---\r\n"
    parser, found = FormParser("x-"), list[tuple[Begin, bytearray]]()
    for start in range(0, len(body), size):
        for part in parser.feed(body[start : start + size]):
            if isinstance(part, Begin):
                found.append((part, bytearray()))
            else:
                found[-1][1].extend(part)
    assert parser.is_over
    assert found == [(Begin("purpose", None), b"batch"), (Begin("file", "in.jsonl"), content)]


async def test_content_safety_judges_a_prompt_before_any_work_and_a_picture_before_it_is_stored(tmp_path: Path):
    double = pytest.importorskip("content_safety_double")
    azure = pytest.importorskip("mii_serve.safety.azure")
    async with double.content_safety_double() as service:
        service.words["horse"] = ("Violence", 6)
        asked = ContentSafetyConfig(endpoint=service.url, key=double.KEY)
        async with azure.open_moderator(asked) as moderator, served(tmp_path, moderator=moderator) as (client, engine):
            batch = await created(client, await uploaded(client, line(0), line(1, prompt="a horse"), line(2)))
            batch = await until(client, batch["id"], has("completed"))
            assert batch["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
            [error] = (await client.get(f"/files/{batch['error_file_id']}/content")).text.splitlines()
            assert json.loads(error)["response"]["body"]["error"]["code"] == "moderation_blocked"
            assert len({sample.id.request_id for plan in engine.plans for sample in plan.joins}) == 2
    assert len(list((tmp_path / "jobs").rglob("*.png"))) == 2


async def test_a_job_that_has_not_ended_in_time_expires_and_keeps_what_it_has_made(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(jobs, "WINDOW_S", 0)
    monkeypatch.setattr(jobs, "GRACE_S", 0.0)
    async with served(tmp_path) as (client, engine):
        engine.gate.clear()
        batch = await created(client, await uploaded(client, line(0), line(1)))
        batch = await until(client, batch["id"], has("expired"))
        lines = (await client.get(f"/files/{batch['error_file_id']}/content")).text.splitlines()
        assert [json.loads(one)["error"]["code"] for one in lines] == ["batch_expired"] * 2
        assert batch["output_file_id"] is None


async def metric(client: httpx2.AsyncClient, name: str) -> float:
    text = (await client.get(str(client.base_url).removesuffix("/v1/") + "/metrics")).text
    return next(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))


async def test_files_go_when_their_time_is_over_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The wall clock jumps by an hour; a job that runs takes no notice."""
    async with served(tmp_path) as (client, engine):
        form = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
        soon = {**form, "expires_after[seconds]": "5"}
        refused = await client.post("/files", files={"file": ("in.jsonl", line(0))}, data=soon)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "expires_after[seconds]")
        file = (await client.post("/files", files={"file": ("in.jsonl", line(0) + line(1))}, data=form)).json()
        assert file["expires_at"] == file["created_at"] + 3600
        engine.gate.clear()
        body = {"input_file_id": file["id"], "endpoint": "/v1/images/generations", "completion_window": "24h"}
        expiry = {"output_expires_after": {"anchor": "created_at", "seconds": 3600}}
        batch = (await client.post("/batches", json={**body, **expiry})).json()
        await until(client, batch["id"], has("in_progress"))
        assert await metric(client, 'mii_serve_jobs{state="in_progress"}') == 1
        assert await metric(client, 'mii_serve_job_rows{state="open"}') == 2
        wall_clock, later = time.time, 3601.0
        monkeypatch.setattr(job_store.time, "time", lambda: wall_clock() + later)
        assert (await client.get(f"/files/{file['id']}")).status_code == 200, "a job reads it"
        engine.gate.set()
        batch = await until(client, batch["id"], has("completed"))
        assert (await client.get(f"/files/{file['id']}")).status_code == 404
        assert await metric(client, 'mii_serve_jobs{state="completed"}') == 1
        output = (await client.get(f"/files/{batch['output_file_id']}")).json()
        assert output["expires_at"] == output["created_at"] + 3600
        later = 2 * 3602.0
        for path in (f"/files/{output['id']}", f"/files/{output['id']}/content"):
            assert (await client.get(path)).status_code == 404
    async with served(tmp_path) as (client, _):
        batch = await until(client, batch["id"], lambda batch: batch["output_file_id"] is None)
        assert batch["status"] == "completed" and not list((tmp_path / "jobs").rglob("*.png"))


async def test_a_full_disk_pauses_a_job_and_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs, "PAUSE_S", 0.05)
    is_full = True
    write = jobs.OutputFolder.write_pictures

    def written(self: jobs.OutputFolder, n: int, files: list[bytes]) -> list[tuple[int, str]]:
        if is_full and n == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, n, files)

    monkeypatch.setattr(jobs.OutputFolder, "write_pictures", written)
    async with served(tmp_path) as (client, _):
        batch = await created(client, await uploaded(client, *(line(n) for n in range(3))))
        async with asyncio.timeout(PATIENCE_S):
            while not await metric(client, "mii_serve_jobs_paused"):
                pass
        assert (await client.post("/images/generations", json={"prompt": "a circle"})).status_code == 200
        assert (await client.get(f"/batches/{batch['id']}")).json()["status"] == "in_progress"
        is_full = False
        batch = await until(client, batch["id"], has("completed"))
        assert batch["request_counts"] == {"total": 3, "completed": 3, "failed": 0}
        assert await metric(client, "mii_serve_jobs_paused") == 0


async def test_the_job_of_a_key_that_is_revoked_is_cancelled_and_says_so(tmp_path: Path):
    (tmp_path / "keys").write_text(f"{KEY} name=studio\n")
    keys = KeyRing(tmp_path / "keys")
    async with served(tmp_path, keys=keys) as (client, _):
        batch = await created(client, await uploaded(client, *(line(n) for n in range(100))))
        await until(client, batch["id"], lambda batch: batch["request_counts"]["completed"] >= 20)
        (tmp_path / "keys").write_text(f"{OTHER} name=other\n")
        keys.reload()
        assert (await client.get(f"/batches/{batch['id']}")).status_code == 401
        [stored] = (tmp_path / "jobs" / "batches").glob("*/meta.json")
        other = {"authorization": f"Bearer {OTHER}"}
        async with asyncio.timeout(PATIENCE_S):
            while (meta := json.loads(stored.read_text()))["status"] != "cancelled":
                assert (await client.get("/batches", headers=other)).json()["data"] == []
        assert meta["errors"][0]["code"] == "api_key_revoked" and 20 <= meta["completed"] < 100
        assert meta["completed"] <= len(list((tmp_path / "jobs").rglob("*.png"))), "what was made is kept"


async def test_a_job_that_is_cancelled_while_it_is_finished_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    may_end, sizes = threading.Event(), jobs.Renderer.sizes

    def slow(self: jobs.Renderer) -> tuple[int, int]:
        may_end.wait(PATIENCE_S)
        return sizes(self)

    monkeypatch.setattr(jobs.Renderer, "sizes", slow)
    async with served(tmp_path) as (client, _):
        batch = await created(client, await uploaded(client, line(0)))
        await until(client, batch["id"], has("finalizing"))
        for _ in range(2):
            answer = await client.post(f"/batches/{batch['id']}/cancel")
            assert (answer.status_code, answer.json()["status"]) == (200, "finalizing")
        may_end.set()
        batch = await until(client, batch["id"], has("completed"))
        assert batch["request_counts"]["completed"] == 1 and batch["cancelled_at"] is None
