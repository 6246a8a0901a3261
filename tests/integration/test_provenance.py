"""Every file that leaves the server is marked and signed, over every protocol; raw pixels are said to carry nothing."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import c2pa
import grpc
import pytest
from fake_engine import FakeEngine
from patience import PATIENCE_S
from PIL import Image
from signing import SigningFiles, write_signing_files
from web import Web, events_of, web

from mii_serve.errors import ProvenanceError
from mii_serve.proto.metadata import PROVENANCE_KEY
from mii_serve.proto.mii import pictures_pb2 as mii
from mii_serve.proto.status import decode_error
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.provenance import Provenance
from mii_serve.provenance.report import FileReport, report_on
from mii_serve.safety.moderation import ModerationVerdict

PROMPT = "a red circle, very secret"
FORMATS = (pb.IMAGE_FORMAT_PNG, pb.IMAGE_FORMAT_JPEG, pb.IMAGE_FORMAT_WEBP)


class Moderator:
    """Finds every image harmless until it is told to block them all."""

    is_blocking = False

    async def check_texts(self, prompt: str, negative_prompt: str) -> None: ...

    async def check_image(self, image: bytes) -> ModerationVerdict:
        return ModerationVerdict(categories={"Violence": 4} if self.is_blocking else {})

    async def close(self) -> None: ...


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> SigningFiles:
    return write_signing_files(tmp_path_factory.mktemp("signing"))


@pytest.fixture
def moderator() -> Moderator:
    return Moderator()


@pytest.fixture
async def served(tmp_path: Path, files: SigningFiles, moderator: Moderator) -> AsyncIterator[Web]:
    behind = {"provenance": Provenance(**files.settings), "moderator": moderator}
    async with web(tmp_path, FakeEngine(max_slots=4), behind=behind) as running:
        yield running


def checked(file: bytes, files: SigningFiles) -> FileReport:
    """What the file carries: everything that it should, and not the prompt."""
    report = report_on(file, "file", files.ca.read_text())
    assert report.is_marked and report.credentials is not None and report.credentials.state == "Trusted"
    assert report.xmp is not None and (report.xmp.model, report.credentials.model) == ("fake", "fake")
    assert b"secret" not in file
    return report


async def test_every_file_of_every_protocol(served: Web, files: SigningFiles) -> None:
    stub, seen = served.server.stub, list[bytes]()
    for image_format in FORMATS:
        output = pb.OutputOptions(format=image_format)
        call = stub.Generate(pb.GenerateRequest(prompt=PROMPT, output=output, num_images_per_prompt=2))
        seen += [image.data for image in (await call).images]
        assert dict(await call.trailing_metadata())[PROVENANCE_KEY] == "xmp, c2pa"
    output = pb.OutputOptions(preview_every=1)
    async for event in stub.GenerateStream(pb.GenerateRequest(prompt=PROMPT, output=output)):
        if (kind := event.WhichOneof("event")) in ("image", "preview"):
            seen.append(getattr(event, kind).data)

    async def posted(path: str, body: object) -> str:
        answer = await served.post(path, body)
        assert answer.status_code == 200, answer.text
        return answer.text

    def decoded(text: str) -> bytes:
        return base64.b64decode(text)

    scored = json.loads(await posted("/score", {"input_data": {"columns": ["prompt"], "index": [0], "data": [PROMPT]}}))
    seen.append(decoded(scored[0]["generated_image"]))
    for output_format in ("png", "jpeg", "webp"):
        drawn = json.loads(await posted("/v1/images/generations", {"prompt": PROMPT, "output_format": output_format}))
        seen.append(decoded(drawn["data"][0]["b64_json"]))
    streamed = await posted("/v1/images/generations", {"prompt": PROMPT, "stream": True, "partial_images": 1})
    seen += [decoded(value["b64_json"]) for _, value in events_of(streamed)]
    seen.append((await served.post("/", {"inputs": PROMPT})).content)
    assert len(seen) >= 6 + 1 + 1 + 3 + 2 + 1
    for file in seen:
        checked(file, files)


async def test_raw_pixels_are_whole_and_the_answer_says_that_they_carry_no_mark(served: Web) -> None:
    output = pb.OutputOptions(format=pb.IMAGE_FORMAT_RAW_RGB)
    call = served.server.stub.Generate(pb.GenerateRequest(prompt=PROMPT, output=output, seed=3))
    image = (await call).images[0]
    assert dict(await call.trailing_metadata())[PROVENANCE_KEY] == "none"
    wire = mii.PictureRequest(prompt=[PROMPT], second=[b""])
    wire.query_kwargs["seed"].ivalue = 3
    method = "/legacymodelresponse.ModelResponse/Txt2ImgReply"
    answer = served.server.channel.unary_unary(method, response_deserializer=mii.ImageReply.FromString)(
        wire.SerializeToString()
    )
    assert list((await answer).images) == [image.data]
    assert dict(await answer.trailing_metadata())[PROVENANCE_KEY] == "none"
    png = await served.server.stub.Generate(pb.GenerateRequest(prompt=PROMPT, seed=3))
    assert Image.open(io.BytesIO(png.images[0].data)).tobytes() == image.data


async def test_black_pictures_are_marked_too(served: Web, files: SigningFiles, moderator: Moderator) -> None:
    flagged = (await served.server.stub.Generate(pb.GenerateRequest(prompt="a skull, very secret"))).images[0]
    moderator.is_blocking = True
    blocked = (await served.server.stub.Generate(pb.GenerateRequest(prompt=PROMPT))).images[0]
    assert (flagged.nsfw_content_detected, blocked.moderation_blocked) == (True, True)
    for image in (flagged, blocked):
        checked(image.data, files)
        assert Image.open(io.BytesIO(image.data)).getextrema() == ((0, 0),) * 3


async def test_a_picture_that_cannot_be_signed_is_a_typed_error(served: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise c2pa.C2paError("no")

    stub = served.server.stub
    with monkeypatch.context() as broken_library:
        broken_library.setattr(c2pa, "Builder", broken)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Generate(pb.GenerateRequest(prompt=PROMPT))
    error = decode_error(refused.value.code(), refused.value.details(), refused.value.trailing_metadata())
    assert isinstance(error, ProvenanceError) and "signed" in str(error)
    assert (await stub.Generate(pb.GenerateRequest(prompt=PROMPT))).images, "others are not affected"


async def test_the_files_of_the_commands_are_the_servers(served: Web, files: SigningFiles, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n")
    target = ("--target", served.server.target)
    for command in (
        ("generate", PROMPT, "--no-embed-metadata", "-o", "out.webp", *target),
        ("batch", "in.jsonl", "-o", "job", "--format", "jpeg", *target),
    ):
        ran = await asyncio.to_thread(
            subprocess.run,
            (sys.executable, "-m", "mii_serve", *command),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert ran.returncode == 0, ran.stderr
    drawn = [tmp_path / "out.webp", *(tmp_path / "job" / "pictures").rglob("*.jp*g")]
    assert len(drawn) == 2
    for file in drawn:
        checked(file.read_bytes(), files)
