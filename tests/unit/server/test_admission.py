"""How a call is admitted, what becomes of errors, and what is written of it."""

from __future__ import annotations

import asyncio
import logging
import uuid
from dataclasses import replace

import pytest
from replica_doubles import PARAMS, done_of, image_of

from mii_serve.errors import (
    InvalidRequestError,
    MiiServeError,
    QueueFullError,
    RateLimitedError,
    RequestCancelledError,
    UnauthenticatedError,
)
from mii_serve.metrics import FrontMetrics
from mii_serve.proto.metadata import AUTHORIZATION_KEY, CLIENT_ID_KEY, MAX_ID_CHARS, REQUEST_ID_KEY
from mii_serve.server.access_log import CallLog, is_work
from mii_serve.server.call import Admission, CallContext, IncomingCall, current_call, network_of
from mii_serve.server.keys import KeyRing
from mii_serve.types import PARAMETERS, Queued, Restarted, Started, Step

GENERATE = "/mii_serve.v1.ImageGeneration/Generate"
KEY = "0123456789abcdef"


class Edge:
    """What an edge does with calls: it answers or refuses, and each of that is noted."""

    def __init__(self, keys: KeyRing | None = None) -> None:
        self.metrics = FrontMetrics()
        self.admission = Admission(self.metrics, keys)
        self.contexts: list[CallContext] = []
        self.refused: list[MiiServeError] = []

    async def handle(self, error: BaseException | None = None, **fields: object) -> IncomingCall:
        call = IncomingCall(**{"method": GENERATE, "headers": {}, "address": "10.0.0.1", **fields})

        async def work(context: CallContext) -> None:
            self.contexts.append(context)
            assert current_call.get() is context
            if error is not None:
                raise error

        async def refuse(refusal: MiiServeError) -> None:
            self.refused.append(refusal)

        await self.admission.handle(call, work, refuse)
        return call

    def count(self, code: str, method: str = "Generate") -> float:
        labels = {"method": method, "code": code}
        return self.metrics.registry.get_sample_value("mii_serve_requests_total", labels) or 0.0

    def cancelled(self, where: str) -> float:
        return self.metrics.registry.get_sample_value("mii_serve_cancelled_total", {"where": where}) or 0.0


@pytest.fixture
def edge() -> Edge:
    return Edge()


@pytest.fixture
def lines(caplog):
    """What the access log wrote."""
    caplog.set_level(logging.INFO, "mii_serve.server.access_log")
    return lambda: [record.request for record in caplog.records if hasattr(record, "request")]


class TestEnds:
    async def test_success_is_logged_and_counted_once(self, edge, lines):
        call = await edge.handle()
        assert len(edge.contexts) == 1 and not edge.refused
        [line] = lines()
        assert (line["request_id"], line["method"], line["code"]) == (call.request_id, "Generate", "OK")
        assert edge.count("OK") == 1

    @pytest.mark.parametrize("error", [QueueFullError("full", 1.0), InvalidRequestError("seed", "is wrong")])
    async def test_a_refusal_is_passed_on_as_it_is(self, edge, lines, error):
        await edge.handle(error)
        assert edge.refused == [error]
        [line] = lines()
        assert line["code"] == error.grpc_code and edge.count(error.grpc_code) == 1

    async def test_a_defect_is_logged_with_its_traceback_and_told_without_it(self, edge, lines, caplog):
        call = await edge.handle(KeyError("a secret"))
        [error] = edge.refused
        assert type(error) is MiiServeError and str(error) == f"internal error, request id {call.request_id}"
        assert "a secret" in caplog.text and call.request_id in caplog.text
        [line] = lines()
        assert line["code"] == "INTERNAL" and edge.count("INTERNAL") == 1

    @pytest.mark.parametrize("where", ["waiting", "running"])
    async def test_a_cancellation_is_passed_on_and_not_refused(self, edge, lines, where):
        log = CallLog()
        if where == "running":
            log.add_event(Started(image_index=0))
        with pytest.raises(asyncio.CancelledError):
            await edge.handle(asyncio.CancelledError(), log=log)
        assert not edge.refused
        [line] = lines()
        assert line["code"] == "CANCELLED" and edge.count("CANCELLED") == edge.cancelled(where) == 1

    async def test_work_that_says_that_its_caller_left_counts_as_cancelled(self, edge):
        await edge.handle(RequestCancelledError("left"))
        assert edge.count("CANCELLED") == edge.cancelled("waiting") == 1 and len(edge.refused) == 1

    async def test_what_refusing_raises_is_final(self, edge, lines):
        async def work(context: CallContext) -> None:
            raise QueueFullError("full", 1.0)

        async def refuse(error: MiiServeError) -> None:
            raise ConnectionError("the caller has gone")

        call = IncomingCall(method=GENERATE, headers={}, address="10.0.0.1")
        with pytest.raises(ConnectionError):
            await edge.admission.handle(call, work, refuse)
        assert [line["code"] for line in lines()] == ["RESOURCE_EXHAUSTED"]

    async def test_calls_that_make_no_images_are_counted_and_not_logged(self, edge, lines):
        await edge.handle(method="/mii_serve.v1.ImageGeneration/GetServerInfo")
        await edge.handle(method="GET /health")
        assert not lines() and edge.count("OK", "GetServerInfo") == edge.count("OK", "GET /health") == 1


class TestContext:
    async def test_it_is_what_the_call_says(self, edge):
        call = await edge.handle(
            headers={REQUEST_ID_KEY: "mine", CLIENT_ID_KEY: "my client"}, timeout_s=5.0, idempotency_key="k", log=CallLog(a=1)
        )
        [context] = edge.contexts
        assert (context.request_id, context.client, context.idempotency_key) == ("mine", "10.0.0.1/my client", "k")
        assert context.left_s == 5.0 and context.key_name is None and context.log is call.log

    async def test_the_time_that_is_left_shrinks(self, edge):
        await edge.handle(timeout_s=5.0)
        await edge.handle()
        await asyncio.sleep(7.0)
        assert (edge.contexts[0].left_s, edge.contexts[1].left_s) == (-2.0, None)
        assert edge.contexts[0].seconds == 7.0

    async def test_parts_of_a_call_have_ids_of_their_own_and_the_same_rest(self, edge):
        await edge.handle(headers={REQUEST_ID_KEY: "mine"}, timeout_s=5.0)
        part = edge.contexts[0].for_part(3)
        assert (part.request_id, part.part, part.deadline) == ("mine.3", 3, edge.contexts[0].deadline)


class TestIds:
    async def test_a_call_without_one_gets_one(self, edge):
        ids = {(await edge.handle()).request_id for _ in range(3)}
        assert len(ids) == 3 and all(uuid.UUID(one) for one in ids)

    @pytest.mark.parametrize("asked", ["", "two words", "x" * (MAX_ID_CHARS + 1), "é", "a\nb"])
    async def test_one_that_breaks_the_rule_refuses_the_call_under_another_id(self, edge, asked):
        call = await edge.handle(headers={REQUEST_ID_KEY: asked})
        [error] = edge.refused
        assert isinstance(error, InvalidRequestError) and error.field == REQUEST_ID_KEY
        assert uuid.UUID(call.request_id) and not edge.contexts

    async def test_what_the_edge_found_wrong_comes_first(self, edge):
        problem = InvalidRequestError("timeout", "is wrong")
        await edge.handle(headers={REQUEST_ID_KEY: "two words"}, problem=problem)
        assert edge.refused == [problem]

    async def test_a_client_id_has_a_rule(self, edge):
        await edge.handle(headers={CLIENT_ID_KEY: "é"})
        assert [error.field for error in edge.refused] == [CLIENT_ID_KEY] and not edge.contexts


class TestKeys:
    @pytest.fixture
    def ring(self, tmp_path) -> KeyRing:
        file = tmp_path / "keys"
        file.write_text(f"{KEY} name=studio max_concurrent_requests=1 requests_per_minute=2\n")
        file.chmod(0o600)
        return KeyRing(file)

    async def test_without_one_the_call_is_refused(self, ring):
        edge = Edge(ring)
        await edge.handle()
        assert [type(error) for error in edge.refused] == [UnauthenticatedError] and not edge.contexts

    async def test_with_one_the_share_is_the_keys_whatever_client_it_names(self, ring):
        edge = Edge(ring)
        await edge.handle(headers={AUTHORIZATION_KEY: f"Bearer {KEY}", CLIENT_ID_KEY: "another"})
        assert [(context.client, context.key_name) for context in edge.contexts] == [("key studio", "studio")]

    async def test_the_keys_name_is_in_the_line_and_the_metrics_and_the_key_is_not(self, ring, lines, caplog):
        edge = Edge(ring)
        for _ in range(3):  # the last is one too many
            await edge.handle(headers={AUTHORIZATION_KEY: f"Bearer {KEY}"})
        await edge.handle()
        assert [line.get("key") for line in lines()] == ["studio"] * 3 + [None]
        value = edge.metrics.registry.get_sample_value
        for code, count in (("OK", 2), ("RESOURCE_EXHAUSTED", 1), ("UNAUTHENTICATED", None)):
            assert value("mii_serve_key_requests_total", {"key": "studio", "code": code}) == count
        assert value("mii_serve_key_request_duration_seconds_count", {"key": "studio"}) == 3
        assert KEY not in caplog.text

    async def test_only_work_counts_against_its_limits(self, ring):
        edge, headers = Edge(ring), {AUTHORIZATION_KEY: f"Bearer {KEY}"}
        for _ in range(5):
            await edge.handle(method="GET /health", headers=headers)
            await edge.handle(headers=headers, is_work=False)
        assert not edge.refused
        for _ in range(3):
            await edge.handle(headers=headers)
        assert [type(error) for error in edge.refused] == [RateLimitedError]

    async def test_a_call_that_ends_in_any_way_gives_its_place_back(self, ring):
        edge, headers = Edge(ring), {AUTHORIZATION_KEY: f"Bearer {KEY}"}
        await edge.handle(KeyError("a defect"), headers=headers)
        with pytest.raises(asyncio.CancelledError):
            await edge.handle(asyncio.CancelledError(), headers=headers)
        assert not ring._usage["studio"].num_running


class TestLog:
    def test_parameters_without_the_prompts(self):
        log = CallLog()
        log.add_params(PARAMS)
        not_used = {"clip_skip", "eta", "prompt_syntax"}
        assert set(log) == {parameter.name for parameter in PARAMETERS} - {"prompt", "negative_prompt", *not_used}
        assert (log["seed"], log["num_inference_steps"]) == (5, 4)

    def test_events_are_counted_by_what_they_say(self):
        log, image = CallLog(), image_of(PARAMS, 0)
        flagged = [replace(image, nsfw_content_detected=True, moderation_blocked=is_blocked) for is_blocked in (True, None)]
        events = [Queued(num_samples_ahead=1), Started(image_index=0), Step(image_index=0, step=1, num_steps=4)]
        for event in (*events, Restarted(image_indexes=(0,)), Restarted(image_indexes=()), image, *flagged, done_of(PARAMS)):
            log.add_event(event)
        assert log == {"is_started": True, "num_restarts": 2, "num_flagged": 2, "num_blocked": 1, "queued_s": 0.0}

    async def test_all_of_it_is_in_the_line_and_the_metrics(self, edge, lines):
        log = CallLog()
        for event in (Started(image_index=0), Restarted(image_indexes=(0,)), done_of(PARAMS)):
            log.add_event(event)
        await edge.handle(log=log)
        [line] = lines()
        assert (line["is_started"], line["num_restarts"], line["queued_s"]) == (True, 1, 0.0)
        value = edge.metrics.registry.get_sample_value
        assert value("mii_serve_requests_restarted_total") == value("mii_serve_queue_seconds_count") == 1


@pytest.mark.parametrize(
    ("method", "is_so"),
    [
        *((method, True) for method in (GENERATE, "/x.Y/GenerateStream", "/mii.ModelResponse/Txt2ImgReply", "POST /score")),
        *((method, False) for method in ("/x.Y/GetServerInfo", "GET /", "/grpc.health.v1.Health/Check")),
    ],
)
def test_what_makes_images(method, is_so):
    assert is_work(method) == is_so


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("10.1.2.3", "10.1.2.3"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("::1", "::1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("fe80::1%eth0", "fe80::"),
        ("unix", "unix"),
    ],
)
def test_callers_are_told_apart_by_network(host, network):
    assert network_of(host) == network
