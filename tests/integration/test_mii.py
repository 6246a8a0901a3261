"""DeepSpeed-MII's wire over real gRPC: both generations of its request, as the bytes its clients send."""

from __future__ import annotations

import asyncio
import random
from urllib.parse import unquote

import grpc
import pytest
from fake_engine import MAX_WORDS, FakeEngine
from google.protobuf import empty_pb2
from patience import PATIENCE_S
from servers import running_server

from mii_serve.proto.mii import pictures_pb2 as mii
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.server.keys import KeyRing
from mii_serve.server.mii import MII_SERVICES, NOT_SERVED

NEW, OLD = "/legacymodelresponse.ModelResponse", "/modelresponse.ModelResponse"


def value(of: object) -> mii.Value:
    kind = {str: "svalue", int: "ivalue", float: "fvalue", bool: "bvalue"}[type(of)]
    return mii.Value(**{kind: of})


def request(*prompts: str, negative: list[str] | None = None, **kwargs: object) -> bytes:
    """What MIIClient of deepspeed-mii 0.2.2 to 0.3.3 sends."""
    texts = [text.encode() for text in (negative if negative is not None else [""] * len(prompts))]
    message = mii.PictureRequest(prompt=prompts, second=texts)
    for name, of in kwargs.items():
        message.query_kwargs[name].CopyFrom(value(of))
    return message.SerializeToString(deterministic=True)


def old_request(*prompts: str, **kwargs: object) -> bytes:
    """What MIIClient of deepspeed-mii up to 0.2.1 sends: the map of kwargs where the negative prompts are now."""
    entries = [mii.KwargEntry(key=name, value=value(of)).SerializeToString() for name, of in kwargs.items()]
    return mii.PictureRequest(prompt=prompts, second=entries).SerializeToString()


def send(server, wire: bytes, method: str = f"{NEW}/Txt2ImgReply", **settings):
    return server.channel.unary_unary(method, response_deserializer=mii.ImageReply.FromString)(wire, **settings)


async def refused(awaitable) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return caught.value


def colour(seed: int) -> bytes:
    """A pixel of the fake engine's picture."""
    return random.Random(seed).randbytes(3)


class TestPictures:
    async def test_a_reply_holds_raw_pixels_one_size_and_the_flags(self, server):
        reply = await send(server, request("a red circle", "a white skull", seed=5, height=64, width=128))
        assert list(reply.images) == [colour(5) * (64 * 128), bytes(64 * 128 * 3)]
        assert list(reply.nsfw_content_detected) == [False, True]
        assert (reply.mode, reply.size_w, reply.size_h) == ("RGB", 128, 64)
        assert reply.time_taken > 0

    async def test_picture_k_of_a_reply_is_made_from_seed_plus_k(self, server):
        reply = await send(server, request("a", "b", "c", seed=7, num_images_per_prompt=2))
        assert [image[:3] for image in reply.images] == [colour(7 + k) for k in range(6)]

    async def test_without_a_seed_every_call_draws_another(self, server):
        assert len({(await send(server, request("a"))).images[0][:3] for _ in range(4)}) > 1

    async def test_a_seed_of_minus_one_is_any_seed(self, server):
        assert len({(await send(server, request("a", seed=-1))).images[0][:3] for _ in range(4)}) > 1

    async def test_what_did_not_fit_is_told_beside_the_reply(self, server):
        long = " ".join(["word"] * MAX_WORDS + ["красный", "хвост"])
        call = send(server, request("a", long))
        assert len((await call).images) == 2
        told = dict(await call.trailing_metadata())
        assert [unquote(entry) for entry in told["x-mii-dropped-prompt"].split(",")] == ["", "красный хвост"]
        await (short := send(server, request("a")))
        assert "x-mii-dropped-prompt" not in dict(await short.trailing_metadata())

    async def test_prompts_of_one_call_share_the_slots(self, two_slots):
        await send(two_slots, request("a", "b", num_inference_steps=20))
        assert max(len(plan.steps) for plan in two_slots.engine.plans) == 2

    async def test_what_is_asked_for_arrives(self, server):
        kwargs = {"num_inference_steps": 3, "guidance_scale": 7.3, "seed": 2**62, "scheduler": "PNDMScheduler"}
        await send(server, request("a", negative=["ugly"], **kwargs))
        (sample,) = (sample for plan in server.engine.plans for sample in plan.joins)
        params = sample.params
        assert (params.prompt, params.negative_prompt, params.scheduler, params.seed) == ("a", "ugly", "pndm", 2**62)
        assert (params.num_inference_steps, params.guidance_scale) == (3, 7.3), "not 7.300000190734863"

    async def test_a_negative_prompt_may_be_a_kwarg_for_all(self, server):
        await send(server, request("a", "b", negative_prompt="ugly"))
        assert {sample.params.negative_prompt for plan in server.engine.plans for sample in plan.joins} == {"ugly"}

    async def test_the_call_is_counted_and_logged_like_any_other(self, server, caplog):
        with caplog.at_level("INFO", "mii_serve.server.access_log"):
            await send(
                server, request("secret words", "b", seed=3, num_images_per_prompt=2), metadata=(("x-request-id", "me"),)
            )
        line = next(record.getMessage() for record in caplog.records)
        assert "request_id=me method=Txt2ImgReply code=OK" in line
        assert "num_prompts=2" in line and "seed=3" in line and "queued_s=" in line
        assert "secret" not in caplog.text
        text = (await server.dispatcher.metrics_text()).decode()
        assert 'mii_serve_requests_total{code="OK",method="Txt2ImgReply"} 1.0' in text


class TestTheOldGeneration:
    @pytest.mark.parametrize("service", [NEW, OLD])
    async def test_its_kwargs_are_found(self, server, service):
        wire = old_request("a", "b", num_inference_steps=2, guidance_scale=7.1, seed=9, height=64)
        reply = await send(server, wire, f"{service}/Txt2ImgReply")
        assert [image[:3] for image in reply.images] == [colour(9), colour(10)]
        joined = [sample.params for plan in server.engine.plans for sample in plan.joins]
        assert {(one.num_inference_steps, one.guidance_scale, one.negative_prompt) for one in joined} == {(2, 7.1, "")}

    async def test_bytes_written_by_hand(self, server):
        # 1: "a"; 2: {1: "seed", 2: {2: 9}}; 2: {1: "guidance_scale", 2: {3: 7.5}}
        wire = b"\n\x01a" + b"\x12\x0a\n\x04seed\x12\x02\x10\x09" + b"\x12\x17\n\x0eguidance_scale\x12\x05\x1d\x00\x00\xf0\x40"
        assert (await send(server, wire, f"{OLD}/Txt2ImgReply")).images[0][:3] == colour(9)

    async def test_its_bad_kwargs_are_named_too(self, server):
        error = await refused(send(server, old_request("a", stepps=3)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT and "'stepps'" in error.details()

    async def test_negative_prompts_are_not_taken_for_kwargs(self, server):
        for text in ("blurry", "\n\x01", "\n\x01a", "\n\x01a\x12", "ü" * 5):
            reply = await send(server, request("a", negative=[text]))
            assert len(reply.images) == 1


class TestRefusals:
    @pytest.mark.parametrize(
        ("wire", "text"),
        [
            (request("a", stepps=3, colour="red"), "'colour', 'stepps'"),
            (request("a", output_type="latent"), "'output_type'"),
            (request("a", output_type="np", return_dict=False), "'output_type', 'return_dict'"),
            (request("a", num_inference_steps=-5), "num_inference_steps: must be in [1, 1000], got -5"),
            (request("a", num_inference_steps=2.5), "num_inference_steps: must be a whole number"),
            (request("a", guidance_scale=True), "guidance_scale: must be a number"),
            (request("a", guidance_scale=float("nan")), "guidance_scale: must be a finite number"),
            (request("a", guidance_scale="7"), "guidance_scale: must be a number"),
            (request("a", height=65), "height: must be a multiple of 8"),
            (request("a", height=2**40), "height: must be a multiple of 8"),
            (request("a", seed=-2), "seed: must be in"),
            (request("a", seed=True), "seed: must be a whole number"),
            (request("a", scheduler="fast"), "scheduler: must be one of"),
            (request("a", scheduler=1), "scheduler: must be text"),
            (request("a", negative_prompt=1), "negative_prompt: must be text"),
            (request("a", negative=["x"], negative_prompt="y"), "negative_prompt: must not be in query_kwargs too"),
            (request("a", "b", negative=["x"]), "negative_prompt: must be none, or one for each prompt, got 1 for 2"),
            (request(), "prompt: must be one text or more"),
            (request("a", " "), "prompt[1]: must not be empty"),
            (request(""), "prompt: must not be empty"),
            (request("a", "x" * 5000), "prompt[1]: must be at most 4096 characters"),
            (request(*"a" * 65), "prompt: must be at most 64 in one call, got 65"),
            (request(*"a" * 13, num_images_per_prompt=5), "must be at most 64 in one call, got 65"),
            (request(*"a" * 43, height=1024, width=1024), "must be at most 42 at 1024x1024"),
            (request("a", scheduler="lcm", num_inference_steps=100), "num_inference_steps: "),
            (b"\n\x02\xff\xff", "request: must be a well-formed message"),
            (b"\n\x01a\x12\x01\xff", "negative_prompt[0]: must be valid UTF-8"),
            (b"\n\x01a\x2a\x01a", "request: has fields this server does not know, got field numbers [5]"),
            (b"\n\x01a\x1a\x03\n\x01k", "query_kwargs: must each have a value"),
        ],
    )
    async def test_an_invalid_call_is_told_what_is_wrong_and_costs_nothing(self, server, wire, text):
        error = await refused(send(server, wire))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert text in error.details()
        assert not server.engine.plans

    async def test_names_of_any_kind_fit_into_the_status(self, server):
        error = await refused(send(server, request("a", **{chr(0x1F600 + i) * 5000: 1 for i in range(40)})))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert len(error.details()) < 1000

    @pytest.mark.parametrize("service", MII_SERVICES)
    async def test_other_tasks_are_unimplemented_and_say_what_is_there(self, server, service):
        for name in NOT_SERVED:
            error = await refused(send(server, b"\n\x01a", f"/{service}/{name}"))
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED
            assert "Txt2ImgReply" in error.details()

    async def test_terminate_is_denied(self, server):
        error = await refused(send(server, b"", f"{NEW}/Terminate"))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert (await send(server, request("a"))).images

    async def test_the_longest_request_id_is_good_for_any_number_of_prompts(self, server):
        metadata = (("x-request-id", "x" * 100),)
        assert len((await send(server, request(*"abcdefgh"), metadata=metadata)).images) == 8

    async def test_idempotency_keys_are_for_the_other_service(self, server):
        error = await refused(send(server, request("a"), metadata=(("x-idempotency-key", "k"),)))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


class TestEndings:
    async def test_a_caller_that_hangs_up_takes_all_its_prompts_along(self, two_slots):
        activity = two_slots.loop.activity
        two_slots.engine.gate.clear()  # or a fast machine ends some of them before the caller has gone
        call = asyncio.ensure_future(send(two_slots, request("a", "b", "c", num_inference_steps=1000)))
        await two_slots.until(lambda: activity().num_requests == 3)
        call.cancel()
        await two_slots.until(lambda: activity().num_cancelled_requests == 3)
        two_slots.engine.gate.set()
        await two_slots.until(lambda: activity().num_running == activity().num_waiting == 0)
        assert (await send(two_slots, request("a"))).images

    async def test_a_deadline_ends_all_prompts(self, server):
        server.engine.gate.clear()
        error = await refused(send(server, request("a", "b", num_inference_steps=1000), timeout=0.3))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        server.engine.gate.set()
        activity = server.loop.activity
        await server.until(lambda: activity().num_cancelled_requests == 2 and activity().num_running == 0)

    async def test_a_prompt_that_fails_ends_the_others(self, two_slots):
        two_slots.engine.fail_sample_of("me-1")
        call = send(two_slots, request("a", "b", num_inference_steps=1000), metadata=(("x-request-id", "me"),))
        assert (await refused(call)).code() is grpc.StatusCode.INTERNAL
        await two_slots.until(lambda: two_slots.loop.activity().num_running == 0)
        assert two_slots.loop.activity().num_steps < 1000

    async def test_a_call_too_big_for_the_queue_is_refused_whole(self, server):
        server.engine.gate.clear()  # one slot, and a queue of eight
        error = await refused(send(server, request(*"abcdefghijkl", num_inference_steps=1000)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        server.engine.gate.set()
        await server.until(lambda: server.loop.activity().num_running == server.loop.activity().num_waiting == 0)

    async def test_garbage_gets_a_status_and_harms_nobody(self, server):
        generator = random.Random(0)
        for _ in range(200):
            error = await refused(send(server, generator.randbytes(generator.randint(1, 200))))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (await send(server, request("a"))).images

    async def test_a_reply_as_large_as_allowed_arrives(self, tmp_path):
        async with running_server(tmp_path, FakeEngine(), max_waiting_samples=64) as server:
            reply = await send(server, request(*"a" * 42, height=1024, width=1024, num_inference_steps=1), timeout=PATIENCE_S)
            assert len(reply.images) == 42 and reply.ByteSize() > 126 * 2**20


class TestWhoMayCall:
    KEY = "studio-key-0123456789"

    @pytest.fixture
    def ring(self, tmp_path):
        file = tmp_path / "keys"
        file.write_text(f"{self.KEY} name=studio requests_per_minute=1\n")
        return KeyRing(file)

    async def test_without_a_key_there_is_nothing_here(self, tmp_path, ring):
        async with running_server(tmp_path, FakeEngine(), keys=ring) as server:
            for method in ("Txt2ImgReply", "Terminate", "GeneratorReply"):
                error = await refused(send(server, request("a"), f"{NEW}/{method}"))
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED, method
            metadata = (("authorization", f"Bearer {self.KEY}"),)
            assert (await send(server, request("a"), metadata=metadata)).images
            error = await refused(send(server, request("a"), metadata=metadata))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, "the key's limit holds here too"

    async def test_terminate_drains_where_the_operator_allows_it_and_never_without_a_key(self, tmp_path, ring):
        asked = asyncio.Event()
        async with running_server(tmp_path, FakeEngine(), keys=ring, on_terminate=asked.set) as server:
            terminate = server.channel.unary_unary(
                f"{NEW}/Terminate", empty_pb2.Empty.SerializeToString, empty_pb2.Empty.FromString
            )
            error = await refused(terminate(empty_pb2.Empty()))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED and not asked.is_set()
            await terminate(empty_pb2.Empty(), metadata=(("authorization", f"Bearer {self.KEY}"),))
            assert asked.is_set()

    async def test_both_wires_draw_the_same_picture(self, server):
        ours = await server.stub.Generate(
            pb.GenerateRequest(prompt="a", seed=4, output=pb.OutputOptions(format="IMAGE_FORMAT_RAW_RGB"))
        )
        assert (await send(server, request("a", seed=4))).images[0] == ours.images[0].data
