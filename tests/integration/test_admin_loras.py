"""LoRAs that come and go while the server runs: on all replicas, across a loss, and never under a request in flight."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import grpc
import httpx2
import pytest
import replicas
from patience import PATIENCE_S
from replicas import KILLED, Deployment, PoisonableEngine, deployment_of, request

from mii_serve.config import DeployConfig
from mii_serve.errors import ModelError
from mii_serve.gateway.app import serve_http
from mii_serve.server.keys import KeyRing
from mii_serve.types import Capabilities, LoraInfo

KEY = "admin-key-0123456789"
ADMIN = {"authorization": f"Bearer {KEY}"}


class FakeLoras:
    """A LoRA is a file of text, and the text is its revision."""

    of_the_start: ClassVar[dict[str, LoraInfo]] = {}

    def __init__(self) -> None:
        self.known = dict(self.of_the_start)
        self.forgotten: list[set[str]] = []

    def load(self, name: str, path: Path) -> LoraInfo:
        if not path.is_file():
            raise ModelError(f"lora: there is no file or folder {path}")
        return LoraInfo(name=name, revision=path.read_text(), rank=4)

    def add(self, adapter: LoraInfo) -> LoraInfo:
        self.known = {**self.known, adapter.name: adapter}
        return adapter

    def remove(self, name: str) -> None:
        self.known = {known: info for known, info in self.known.items() if known != name}

    def forget_unused(self, in_use: set[str]) -> None:
        self.forgotten.append(in_use)


class LoraEngine(PoisonableEngine):
    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.loras = FakeLoras()

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, loras=self.loras.known)

    @property
    def joined(self) -> list[tuple]:
        return [sample.params.lora_choice.parts for plan in self.plans for sample in plan.joins]


@pytest.fixture
async def deployment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(replicas, "PoisonableEngine", LoraEngine)
    async with deployment_of(tmp_path, 2) as deployment:
        yield deployment


@contextlib.asynccontextmanager
async def admin(deployment: Deployment, tmp_path: Path, *, has_keys: bool = True):
    if has_keys:
        file = tmp_path / "admin-keys"
        file.write_text(f"{KEY}\n")
        deployment.dispatcher.admin_keys = KeyRing(file)
    config = DeployConfig.load({"http_port": 0})
    async with (
        serve_http(config, deployment.dispatcher, KeyRing()) as address,
        httpx2.AsyncClient(base_url=f"http://{address}", timeout=PATIENCE_S, headers=ADMIN) as client,
    ):
        yield client


def write(folder: Path, name: str, revision: str) -> Path:
    (folder / name).write_text(revision)
    return folder / name


async def load(client: httpx2.AsyncClient, name: str, path: Path) -> httpx2.Response:
    return await client.post("/admin/loras", json={"name": name, "path": str(path)})


async def test_they_are_loaded_listed_and_removed_on_all_replicas(deployment, tmp_path):
    async with admin(deployment, tmp_path) as client:
        ink = await load(client, "ink", write(tmp_path, "ink", "r1"))
        assert (ink.status_code, ink.json()["revision"]) == (201, "r1")
        assert [lora["name"] for lora in (await client.get("/admin/loras")).json()["loras"]] == ["ink"]
        assert [lora.name for lora in (await deployment.dispatcher.server_info()).loras] == ["ink"]
        answer = await deployment.stub.Generate(request(loras={"ink": 0.5}, num_images_per_prompt=8))
        assert dict(answer.parameters.loras) == {"ink": 0.5}
        for replica in deployment.replicas.values():
            assert set(replica.engine.joined) == {(("r1", 0.5),)}
        taken = await load(client, "ink", tmp_path / "ink")
        assert (taken.status_code, "name" in taken.text) == (400, True)
        assert (await client.delete("/admin/loras/ink")).status_code == 204
        assert [replica.engine.loras.known for replica in deployment.replicas.values()] == [{}, {}]
        gone = await client.delete("/admin/loras/ink")
        assert (gone.status_code, "name" in gone.text) == (400, True)


async def test_a_request_in_flight_keeps_what_is_removed_and_replaced(deployment, tmp_path):
    async with admin(deployment, tmp_path) as client:
        await load(client, "ink", write(tmp_path, "ink", "r1"))
        deployment.hold()
        call = asyncio.ensure_future(deployment.stub.Generate(request(loras={"ink": 1.0})))
        await deployment.until(lambda: sum(deployment.images_on().values()) == 1)
        changing = asyncio.ensure_future(client.delete("/admin/loras/ink"))
        await deployment.until(lambda: not deployment.dispatcher.loras.known)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await deployment.stub.Generate(request(loras={"ink": 1.0}))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "loras" in refused.value.details()
        deployment.release()
        assert (await changing).status_code == 204
        assert (await load(client, "ink", write(tmp_path, "ink", "r2"))).status_code == 201
        assert dict((await call).parameters.loras) == {"ink": 1.0}
        assert [joined for one in deployment.replicas.values() for joined in one.engine.joined] == [(("r1", 1.0),)]
        await deployment.until(lambda: all(set() in one.engine.loras.forgotten for one in deployment.replicas.values()))


async def test_a_replica_that_comes_back_has_them_before_it_gets_work(deployment, tmp_path):
    async with admin(deployment, tmp_path) as client:
        await load(client, "ink", write(tmp_path, "ink", "r1"))
        await load(client, "old", write(tmp_path, "old", "r0"))
        await deployment.lose(0, KILLED)
        deployment.hold()
        call = asyncio.ensure_future(deployment.stub.Generate(request(loras={"ink": 1.0})))
        await deployment.until(lambda: deployment.images_on() == {1: 1})
        write(tmp_path, "old", "another")
        await deployment.lose(1, KILLED)
        await deployment.start(0)
        assert dict((await call).parameters.loras) == {"ink": 1.0}
        assert deployment.replicas[0].engine.joined == [(("r1", 1.0),)]
        # what has changed on the disk is not what was loaded, so it is withdrawn
        assert [lora["name"] for lora in (await client.get("/admin/loras")).json()["loras"]] == ["ink"]
        assert list(deployment.replicas[0].engine.loras.known) == ["ink"]


async def test_one_of_the_start_whose_files_are_not_the_same_on_all_replicas_is_withdrawn(deployment, monkeypatch):
    def of_the_start(revision: str) -> None:
        infos = {"base": LoraInfo(name="base", revision=revision, rank=4)}
        monkeypatch.setattr(FakeLoras, "of_the_start", infos)

    of_the_start("r1")
    for index in (0, 1):
        await deployment.lose(index, KILLED)
    for index in (0, 1):
        await deployment.start(index)
    assert list(deployment.dispatcher.loras.known) == ["base"]
    await deployment.lose(0, KILLED)
    of_the_start("r2")
    await deployment.start(0)
    assert not deployment.dispatcher.loras.known
    assert [replica.engine.loras.known for replica in deployment.replicas.values()] == [{}, {}]


async def test_only_an_admin_key_opens_and_wrong_inputs_change_nothing(deployment, tmp_path):
    async with admin(deployment, tmp_path, has_keys=False) as client:
        closed = await client.get("/admin/loras")
        assert (closed.status_code, closed.json()["error"]["code"]) == (403, "permission_denied")
        assert (await load(client, "ink", tmp_path / "ink")).status_code == 403
    async with admin(deployment, tmp_path) as client:
        stranger = {"authorization": "Bearer another-key-0123456789"}
        assert (await client.get("/admin/loras", headers=stranger)).status_code == 401
        missing = await load(client, "ink", tmp_path / "missing")
        assert (missing.status_code, "path" in missing.text, "there is no file" in missing.text) == (400, True, True)
        bad_name = await load(client, "a b", write(tmp_path, "ink", "r1"))
        assert (bad_name.status_code, "name" in bad_name.text) == (400, True)
        assert (await client.get("/admin/loras")).json() == {"loras": []}
        too_many = {f"n{i}": 1.0 for i in range(9)}
        for loras, field in (({"none": 1.0}, "loras"), ({"none": 11.0}, "loras.none"), (too_many, "loras")):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await deployment.stub.Generate(request(loras=loras))
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert refused.value.details().startswith(f"{field}: ")
