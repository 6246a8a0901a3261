"""The Open Inference Protocol over gRPC: the bytes that its clients send, good and bad."""

from __future__ import annotations

import asyncio
import io
import random
import struct
import time

import grpc
import pytest
from fake_engine import MAX_WORDS, FakeEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patience import PATIENCE_S
from PIL import Image
from servers import running_server

from mii_serve.errors import InvalidRequestError
from mii_serve.proto.oip import inference_pb2 as oip
from mii_serve.proto.oip_codec import parse_infer_request
from mii_serve.server.keys import KeyRing
from mii_serve.server.oip import OIP_SERVICE, REFUSED

CODES = {"INT32": "i", "INT64": "q", "UINT64": "Q", "FP32": "f", "FP64": "d", "FP16": "e", "BOOL": "?", "UINT8": "B"}


def raw(datatype: str, values: list) -> bytes:
    if datatype == "BYTES":
        return b"".join(struct.pack("<I", len(value)) + value for value in values)
    return struct.pack(f"<{len(values)}{CODES[datatype]}", *values)


def tensor(name: str, datatype: str, *values, shape: list[int] | None = None) -> tuple[oip.InferInputTensor, bytes]:
    given = [value.encode() if isinstance(value, str) else value for value in values]
    return oip.InferInputTensor(name=name, datatype=datatype, shape=[len(given)] if shape is None else shape), raw(
        datatype, given
    )


def request(*tensors, outputs: tuple[str, ...] = (), model: str = "fake", **parameters) -> oip.ModelInferRequest:
    """As tritonclient writes it."""
    message = oip.ModelInferRequest(
        model_name=model,
        id="mine",
        inputs=[one for one, _ in tensors],
        raw_input_contents=[contents for _, contents in tensors],
        outputs=[oip.InferRequestedOutputTensor(name=name) for name in outputs],
    )
    for name, value in parameters.items():
        kinds = {str: "string_param", bool: "bool_param", int: "int64_param", float: "double_param"}
        setattr(message.parameters[name], kinds[type(value)], value)
    return message


def prompts(*texts: str, shape: list[int] | None = None):
    return tensor("prompt", "BYTES", *texts, shape=shape)


def call(server, method: str, message, answer, **options):
    return server.channel.unary_unary(f"/{OIP_SERVICE}/{method}", lambda one: one.SerializeToString(), answer.FromString)(
        message, **options
    )


async def infer(server, *tensors, **more) -> tuple[dict[str, list], oip.ModelInferResponse]:
    """The outputs by name, and the whole answer."""
    answer = await call(server, "ModelInfer", request(*tensors, **more), oip.ModelInferResponse, timeout=PATIENCE_S)
    return {one.name: elements(one, data) for one, data in zip(answer.outputs, answer.raw_output_contents, strict=True)}, answer


def elements(output: oip.InferOutputTensor, data: bytes) -> list:
    if output.datatype != "BYTES":
        return list(struct.unpack(f"<{output.shape[0]}{CODES[output.datatype]}", data))
    found = []
    while data:
        (size,) = struct.unpack("<I", data[:4])
        found.append(data[4 : 4 + size])
        data = data[4 + size :]
    assert len(found) == output.shape[0]
    return found


def colour(seed: int) -> tuple[int, ...]:
    return tuple(random.Random(seed).randbytes(3))


def pixel(png: bytes) -> tuple[int, ...]:
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode) == ("PNG", "RGB")
    return image.getpixel((0, 0))


async def refused(awaitable) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return caught.value


async def test_each_prompt_is_an_image_and_image_k_is_made_from_seed_plus_k(two_slots):
    outputs, answer = await infer(
        two_slots, prompts("a", "a skull", "b"), tensor("seed", "UINT64", 2**64 - 1), num_inference_steps=3
    )
    assert [pixel(png) for png in outputs["generated_image"]] == [colour(2**64 - 1), (0, 0, 0), colour(1)]
    assert outputs["nsfw_content_detected"] == [False, True, False]
    assert outputs["seed"] == [2**64 - 1, 0, 1]
    assert [one.name for one in answer.outputs] == ["generated_image", "nsfw_content_detected", "seed"]
    assert (answer.id, answer.model_name, answer.model_version) == ("mine", "fake", "1")
    effective = answer.parameters
    assert (effective["num_inference_steps"].int64_param, effective["engine"].string_param) == (3, "fake")
    assert effective["guidance_scale"].double_param == 7.5 and effective["scheduler"].string_param == "pndm"


async def test_every_parameter_is_an_input_or_a_parameter_of_the_request(server):
    half = tensor("guidance_rescale", "FP16", 0.7)
    column = [2, 1]
    await infer(
        server,
        prompts("a", "b", shape=column),
        tensor("negative_prompt", "BYTES", "ugly", "", shape=column),
        tensor("num_inference_steps", "INT32", 3, 2, shape=column),
        tensor("guidance_scale", "FP32", 7.3, shape=[1, 1]),
        tensor("seed", "INT64", -1, 9, shape=column),
        half,
        height=128,
        scheduler="PNDMScheduler",
    )
    one, two = (sample.params for plan in server.engine.plans for sample in plan.joins)
    assert (one.prompt, one.negative_prompt, one.num_inference_steps) == ("a", "ugly", 3)
    assert (two.prompt, two.negative_prompt, two.num_inference_steps, two.seed) == ("b", "", 2, 9)
    assert {(each.guidance_scale, each.guidance_rescale, each.height, each.scheduler) for each in (one, two)} == {
        (7.3, 0.7, 128, "pndm")
    }


async def test_typed_contents_are_read_too_and_outputs_are_those_that_were_asked_for(server):
    message = oip.ModelInferRequest(model_name="fake")
    message.inputs.add(name="prompt", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"a")
    message.inputs.add(name="guidance_scale", datatype="FP32", shape=[1]).contents.fp32_contents.append(7.3)
    message.inputs.add(name="seed", datatype="UINT64", shape=[1]).contents.uint64_contents.append(5)
    message.outputs.add(name="seed")
    answer = await call(server, "ModelInfer", message, oip.ModelInferResponse)
    assert ([one.name for one in answer.outputs], answer.raw_output_contents) == (["seed"], [struct.pack("<Q", 5)])
    (sample,) = (sample for plan in server.engine.plans for sample in plan.joins)
    assert sample.params.guidance_scale == 7.3


PROMPT = prompts("a")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (request(), "inputs.prompt: is missing"),
        (request(prompts("")), "inputs.prompt: must not be empty"),
        (request(prompts("a", "")), "inputs.prompt[1]: must not be empty"),
        (request(PROMPT, PROMPT), "inputs.prompt: must not be there twice"),
        (request(PROMPT, tensor("STEPS", "INT32", 3)), "inputs.STEPS: is not known here; did you mean num_inference_steps?"),
        (request(PROMPT, cfg_scale=3), "parameters.cfg_scale: is not known here; did you mean guidance_scale?"),
        (request(PROMPT, sequence_id=3), "parameters.sequence_id: is not supported: no request depends on another"),
        (request(PROMPT, tensor("height", "INT32", 99)), "inputs.height: must be a multiple of 8 in [64, 1024], got 99"),
        (request(prompts("a", "b"), tensor("height", "INT32", 64, 99)), "inputs.height[1]: must be a multiple of 8"),
        (request(PROMPT, height=99), "parameters.height: must be a multiple of 8 in [64, 1024], got 99"),
        (request(PROMPT, height="64"), "parameters.height: must be a whole number"),
        (
            request(PROMPT, tensor("seed", "INT64", 3), seed=3),
            "parameters.seed: must be left out, because there is an input seed",
        ),
        (request(PROMPT, tensor("seed", "FP32", 3.0)), "inputs.seed.datatype: must be INT32, INT8,"),
        (request(PROMPT, tensor("seed", "INT64", -7)), "inputs.seed: must be in [0, 2**64 - 1], got -7"),
        (
            request(PROMPT, tensor("seed", "INT64", 1, 2)),
            "inputs.seed.shape: must be of one element, or of one for each of the 1 prompts",
        ),
        (request(tensor("prompt", "BYTES", b"\xff")), "inputs.prompt[0]: must be valid UTF-8 text"),
        (request(PROMPT, outputs=("image",)), "outputs.image: is not known here"),
        (request(PROMPT, outputs=("seed", "seed")), "outputs: must not name one twice"),
        (request(PROMPT, timeout=-1), "parameters.timeout: must be a whole number of microseconds"),
        (request(PROMPT, priority=9), "parameters.priority: must be 1 (high)"),
        (
            request(prompts(*"abcde"), num_images_per_prompt=13),
            "parameters.num_images_per_prompt: must be for at most 64 images",
        ),
        (request(prompts(*["a"] * 65)), "inputs.prompt.shape: must be of at most 64 elements, got 65"),
        # lengths that lie, shapes that are none
        (request((PROMPT[0], b"\x05\0\0\0a")), "inputs.prompt: must have 1 elements, each a length of 4 bytes"),
        (request((PROMPT[0], b"\xff\xff\xff\xffa")), "inputs.prompt: must have 1 elements, each a length of 4 bytes"),
        (request((PROMPT[0], b"\x01\0\0")), "inputs.prompt: must have 1 elements, each a length of 4 bytes"),
        (request((PROMPT[0], PROMPT[1] * 2)), "inputs.prompt: must have 1 elements, each a length of 4 bytes"),
        (request(prompts("a", shape=[2])), "inputs.prompt: must have 2 elements, each a length of 4 bytes"),
        (request(prompts("a", shape=[-1])), "inputs.prompt.shape: must have dimensions of 1 or more, got [-1]"),
        (request(prompts(shape=[0])), "inputs.prompt.shape: must have dimensions of 1 or more, got [0]"),
        (request(prompts("a", shape=[2**62, 2**62])), "inputs.prompt.shape: must have one dimension at most that is not 1"),
        (request(prompts("a", shape=[2**62])), "inputs.prompt.shape: must be of at most 64 elements"),
        (request(prompts("a", shape=[1] * 9)), "inputs.prompt.shape: must have at most 8 dimensions, got 9"),
        (
            request(PROMPT, (tensor("seed", "INT64", 1)[0], b"\0" * 7)),
            "inputs.seed: must have 8 bytes, 1 elements of INT64, got 7",
        ),
        (
            request((oip.InferInputTensor(name="prompt", datatype="STRING", shape=[1]), b"")),
            "inputs.prompt.datatype: must be one of BYTES,",
        ),
        (
            oip.ModelInferRequest(model_name="fake", inputs=[PROMPT[0]]),
            "inputs.prompt.contents: must have the 1 elements of its shape, got 0",
        ),
        (
            oip.ModelInferRequest(model_name="fake", inputs=[PROMPT[0]], raw_input_contents=[b"", b""]),
            "raw_input_contents: must be none, or one for each",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_broken_rule_names_the_tensor_or_the_parameter(server, message, said):
    error = await refused(call(server, "ModelInfer", message, oip.ModelInferResponse))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and error.details().startswith(said), error.details()
    assert not server.engine.plans


CONTENTS = st.binary(max_size=24)
NAMES = st.sampled_from(["prompt", "negative_prompt", "seed", "guidance_scale", "x"])
DATATYPES = st.sampled_from(["BYTES", "INT64", "FP32", "BOOL", "UINT8", "FP16", "", "STRING"])
SIZES = st.sampled_from([-(2**63), -1, 0, 1, 1, 2, 3, 65, 2**63 - 1])


@st.composite
def tampered(draw) -> bytes:
    names = draw(st.lists(NAMES, max_size=3))
    message = oip.ModelInferRequest(
        inputs=[
            oip.InferInputTensor(name=name, datatype=draw(DATATYPES), shape=draw(st.lists(SIZES, max_size=3))) for name in names
        ],
        raw_input_contents=draw(st.lists(CONTENTS | st.just(b"\x01\0\0\0a"), max_size=len(names))),
    )
    wire = bytearray(message.SerializeToString())
    for _ in range(draw(st.integers(0, 2))):
        if wire:
            wire[draw(st.integers(0, len(wire) - 1))] = draw(st.integers(0, 255))
    return bytes(wire)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tampered())
def test_any_bytes_are_a_request_or_a_typed_error(wire):
    from google.protobuf.message import DecodeError

    try:
        asked = parse_infer_request(wire)
    except (DecodeError, InvalidRequestError) as error:
        assert len(str(error)) < 1000
    else:
        assert all(len(one.values) <= 64 for one in asked.inputs)


async def test_a_crowded_message_costs_little(server):
    """A million inputs, parameters or dimensions are counted, not looked at."""
    many = b"\x2a\x00" * 400_000
    wide = oip.ModelInferRequest(inputs=[oip.InferInputTensor(name="prompt", datatype="BYTES", shape=[1] * 400_000)])
    for wire in (many, wide.SerializeToString()):
        started = time.process_time()
        with pytest.raises(InvalidRequestError, match=r"must (be|have) at most 64"):
            parse_infer_request(wire)
        assert time.process_time() - started < 2


async def test_what_the_server_says_of_itself_and_its_model(server):
    assert (await call(server, "ServerLive", oip.ModelReference(), oip.ServerLiveResponse)).live
    assert (await call(server, "ServerReady", oip.ModelReference(), oip.ServerReadyResponse)).ready
    about = await call(server, "ServerMetadata", oip.ModelReference(), oip.ServerMetadataResponse)
    assert about.name == "mii_serve" and "binary_tensor_data" in about.extensions
    for name, version, is_ready in (("fake", "", True), ("test", "1", True), ("fake", "2", False), ("other", "", False)):
        model = oip.ModelReference(name=name, version=version)
        assert (await call(server, "ModelReady", model, oip.ModelReadyResponse)).ready is is_ready
    model = await call(server, "ModelMetadata", oip.ModelReference(name="fake"), oip.ModelMetadataResponse)
    inputs = {one.name: one.datatype for one in model.inputs}
    assert (model.name, list(model.versions), inputs["prompt"], inputs["seed"]) == ("fake", ["1"], "BYTES", "UINT64")
    assert [(one.name, one.datatype, list(one.shape)) for one in model.outputs] == [
        ("generated_image", "BYTES", [-1]),
        ("nsfw_content_detected", "BOOL", [-1]),
        ("seed", "UINT64", [-1]),
    ]
    config = (await call(server, "ModelConfig", oip.ModelReference(name="fake"), oip.ModelConfigResponse)).config
    assert [one.name for one in config.input if not one.optional] == ["prompt"]
    index = await call(server, "RepositoryIndex", oip.ModelReference(), oip.RepositoryIndexResponse)
    assert [(one.name, one.state) for one in index.models] == [("fake", "READY")]


async def test_what_is_not_served_is_refused_by_name(server):
    for method in REFUSED:
        error = await refused(call(server, method, oip.ModelReference(), oip.ModelReference))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED and error.details().startswith(f"{method} is not served here: ")
    for model, version in (("other", ""), ("fake", "7")):
        message = request(PROMPT, model=model)
        message.model_version = version
        error = await refused(call(server, "ModelInfer", message, oip.ModelInferResponse))
        assert error.code() is grpc.StatusCode.NOT_FOUND and model in error.details()
    big = await refused(
        call(server, "ModelInfer", request(tensor("prompt", "BYTES", b"a" * 10_000_000)), oip.ModelInferResponse)
    )
    assert big.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_keys_logs_and_counts_are_those_of_every_call(tmp_path, caplog):
    file = tmp_path / "keys"
    file.write_text("studio-key-0123456789 name=studio\n")
    file.chmod(0o600)
    async with running_server(tmp_path, FakeEngine(max_slots=4), keys=KeyRing(file)) as server:
        for method, answer in (("ServerLive", oip.ServerLiveResponse), ("ServerReady", oip.ServerReadyResponse)):
            await call(server, method, oip.ModelReference(), answer)
        for method in ("ModelInfer", "ModelMetadata", "ModelReady", "RepositoryIndex"):
            error = await refused(call(server, method, oip.ModelReference(name="fake"), oip.ModelReference))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED, method
        long = " ".join(["word"] * MAX_WORDS + ["secrets"])
        with caplog.at_level("INFO", "mii_serve.server.access_log"):
            metadata = (("authorization", "Bearer studio-key-0123456789"), ("x-request-id", "me"))
            answering = call(server, "ModelInfer", request(prompts("b", long)), oip.ModelInferResponse, metadata=metadata)
            await answering
            trailing = dict(await answering.trailing_metadata())
        assert trailing["x-mii-dropped-prompt"] == ",secrets" and trailing["x-mii-provenance"]
        line = next(record.getMessage() for record in caplog.records)
        assert "request_id=me method=ModelInfer code=OK" in line and "num_prompts=2" in line and "key=studio" in line
        assert "secrets" not in caplog.text
        text = (await server.dispatcher.metrics_text()).decode()
        assert 'mii_serve_requests_total{code="OK",method="ModelInfer"} 1.0' in text


async def test_who_leaves_or_is_late_frees_the_slots_and_who_is_too_many_is_refused(tmp_path):
    async with running_server(tmp_path, FakeEngine(), max_waiting_samples=2) as server:
        server.engine.gate.clear()
        leaving = asyncio.ensure_future(infer(server, prompts("a", "b"), num_inference_steps=1000))
        await server.until(lambda: server.loop.activity().num_waiting == 1)
        waiting = asyncio.ensure_future(infer(server, prompts("c"), timeout=300_000))
        await server.until(lambda: server.loop.activity().num_waiting == 2)
        full = await refused(infer(server, prompts("d")))
        assert full.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        late = await refused(waiting)
        assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        leaving.cancel()
        await server.until(lambda: not server.dispatcher._active)
        server.engine.gate.set()
        await server.until(lambda: not server.loop.activity().num_running)
        assert server.loop.activity().num_images == 0


async def test_one_prompt_that_fails_ends_the_others(two_slots):
    two_slots.engine.fail_sample_of("me-1")
    metadata = (("x-request-id", "me"),)
    message = request(prompts("a", "b"), num_inference_steps=1000)
    error = await refused(call(two_slots, "ModelInfer", message, oip.ModelInferResponse, metadata=metadata))
    assert error.code() is grpc.StatusCode.INTERNAL
    await two_slots.until(lambda: not two_slots.loop.activity().num_running)
    assert two_slots.loop.activity().num_images == 0
