"""A benchmark of a real deployment is accepted; one of a server that gives other pictures is not, however fast it is."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from deployments import Deployment

from mii_serve.cli import main
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.proto.v1.image_generation_pb2_grpc import (
    ImageGenerationServicer,
    ImageGenerationStub,
    add_ImageGenerationServicer_to_server,
)

LOAD = ("--mix", "2: num_inference_steps=3; 1: num_inference_steps=2, guidance_scale=1, scheduler=euler_a", "--warmup", "1")


class _Cheat(ImageGenerationServicer):
    """Stands before a real server, makes one picture, and gives it to everybody."""

    def __init__(self, behind: str) -> None:
        self._channel = grpc.insecure_channel(behind)
        self._stub = ImageGenerationStub(self._channel)
        self._events: list[pb.GenerateEvent] = []

    def GetServerInfo(self, request, context):  # noqa: N802
        return self._stub.GetServerInfo(request)

    def GenerateStream(self, request, context):  # noqa: N802
        if not self._events:
            self._events = list(self._stub.GenerateStream(request))
        yield from self._events

    def close(self) -> None:
        self._channel.close()


@contextlib.contextmanager
def cheating(behind: str) -> Iterator[str]:
    cheat = _Cheat(behind)
    server = grpc.server(ThreadPoolExecutor(1))
    add_ImageGenerationServicer_to_server(cheat, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0)
        cheat.close()


def bench(*flags: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["bench", *flags, *LOAD])
    return int(left.value.code or 0)


def test_a_deployment_is_measured_and_its_pictures_are_the_references(deployment: Deployment, tmp_path: Path, capsys):
    result, page = tmp_path / "a.json", tmp_path / "a.html"
    flags = ("--target", deployment.grpc, "--metrics", deployment.http, "--rate", "20", "--requests", "12", "--goodput", "60")
    assert bench(*flags, "--check", "2", "-o", str(result), "--html", str(page)) == 0, capsys.readouterr().err
    written = json.loads(result.read_text())
    assert written["check"]["is_ok"] is True
    assert written["summary"]["codes"] == {"OK": 12}
    assert {one["kind"] for one in written["check"]["pictures"]} == {one["name"] for one in written["settings"]["mix"]}
    assert written["observed"]["images_per_call"] >= 1
    assert written["server"]["engine"] == "native"
    assert page.is_file()


@pytest.mark.parametrize("protocol", ["http", "mii"])
def test_the_other_protocols_are_measured_and_checked_alike(protocol, deployment: Deployment, tmp_path: Path, capsys):
    result = tmp_path / "a.json"
    target = deployment.http if protocol == "http" else deployment.grpc
    flags = ("--protocol", protocol, "--target", target, "--requests", "6", "--concurrency", "2")
    assert bench(*flags, "--check", "2", "--check-model", "demo", "-o", str(result)) == 0, capsys.readouterr().err
    written = json.loads(result.read_text())
    assert written["summary"]["codes"] == {"OK": 6}
    assert written["check"]["is_ok"] is True and len(written["check"]["pictures"]) == 2


def test_a_fast_server_with_the_wrong_pictures_is_rejected(deployment: Deployment, tmp_path: Path, capsys):
    result = tmp_path / "a.json"
    with cheating(deployment.grpc) as target:
        code = bench("--target", target, "--requests", "6", "--concurrency", "1", "--check", "2", "-o", str(result))
    assert code == 5
    said = capsys.readouterr()
    assert "REJECTED" in said.out
    assert "error: rejected" in said.err
    assert json.loads(result.read_text())["check"]["is_ok"] is False
