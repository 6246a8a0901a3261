"""`Client` against a real server."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from patience import PATIENCE_S
from scripted_server import (
    NUM_STEPS,
    RunningServer,
    all_events,
    colour,
    encoded,
    preview,
    queued,
    refusal,
    running,
)

from mii_serve.client import Client, Done, PictureReady, PreviewReady, Queued, Restarted, Started, Step
from mii_serve.errors import (
    ConfigError,
    DeadlineExceededError,
    EngineError,
    InvalidRequestError,
    MiiServeError,
    QueueFullError,
    RequestCancelledError,
    UnavailableError,
    UnsupportedError,
)
from mii_serve.types import Event, GenerationDefaults, GenerationRequest, ImageFormat


def test_generate_gives_pictures_with_what_was_done(server: RunningServer, client: Client) -> None:
    result = client.generate("a red circle", num_images_per_prompt=2, seed=7, guidance_scale=7.3, timeout=PATIENCE_S)
    assert [picture.getpixel((0, 0)) for picture in result.images] == [colour(0), colour(1)]
    assert [picture.mode for picture in result.images] == ["RGB", "RGB"]
    assert result.encoded == [encoded(ImageFormat.PNG, 0), encoded(ImageFormat.PNG, 1)]
    assert result.seeds == [7, 8]
    assert result.nsfw_content_detected == [False, False]
    assert (result.request_id, result.queued_s, result.total_s) == ("request-1", 0.25, 1.5)
    assert (result.parameters.prompt, result.parameters.guidance_scale) == ("a red circle", 7.3)
    assert (result.parameters.engine, result.parameters.model_revision) == ("reference", "r1")
    assert server.servicer.requests[0].params.guidance_scale == 7.3


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp", "raw_rgb"])
def test_every_format_is_decoded(client: Client, output_format: Any) -> None:
    result = client.generate("a", output_format=output_format, timeout=PATIENCE_S)
    assert result.images[0].size == (16, 8)
    assert result.encoded[0] == encoded(ImageFormat(output_format))
    red, green, blue = result.images[0].getpixel((3, 3))  # type: ignore[misc]
    assert abs(red - 200) < 8
    assert green < 12
    assert abs(blue - 10) < 12


@pytest.mark.parametrize(("flag", "flags"), [(True, [True]), (False, [False]), (None, None)])
def test_no_checker_means_no_flags(server: RunningServer, client: Client, flag: bool | None, flags: list[bool] | None) -> None:
    server.servicer.script = partial(all_events, flag=flag)
    assert client.generate("a", timeout=PATIENCE_S).nsfw_content_detected == flags


def test_a_stream_tells_every_event_in_order(client: Client) -> None:
    with client.stream("a", seed=7, timeout=PATIENCE_S) as stream:
        events = list(stream)
    assert events[:2] == [Queued(num_samples_ahead=2), Started(image_index=0)]
    assert events[2:5] == [Step(image_index=0, step=step, num_steps=NUM_STEPS) for step in (1, 2, 3)]
    picture, last = events[5:]
    assert isinstance(picture, PictureReady)
    assert (picture.seed, picture.nsfw_content_detected) == (7, False)
    assert picture.image.getpixel((0, 0)) == colour(0)
    assert isinstance(last, Done)
    assert (last.queued_s, last.total_s) == (0.25, 1.5)
    assert stream.request_id == "request-1"


def test_a_preview_has_pixels_too(server: RunningServer, client: Client) -> None:
    def script(request: GenerationRequest) -> Iterator[Event]:
        yield preview(request, 2)
        yield Restarted(image_indexes=(0,))
        yield from all_events(request)

    server.servicer.script = script
    shown, restarted, *_ = client.stream("a", preview_every=2, timeout=PATIENCE_S)
    assert isinstance(shown, PreviewReady)
    assert (shown.step, shown.image.size, shown.nsfw_content_detected) == (2, (16, 8), False)
    assert restarted == Restarted(image_indexes=(0,))
    assert server.servicer.requests[0].output.preview_every == 2


def test_a_streams_result_is_what_generate_gives(client: Client) -> None:
    stream = client.stream("a", num_images_per_prompt=2, seed=1, timeout=PATIENCE_S)
    assert isinstance(next(stream), Queued)
    assert stream.result() == client.generate("a", num_images_per_prompt=2, seed=1, timeout=PATIENCE_S)
    assert stream.result() == stream.result()


def test_cancel_reaches_the_server(server: RunningServer, client: Client) -> None:
    server.servicer.script = server.servicer.endless
    stream = client.stream("a", timeout=PATIENCE_S)
    assert isinstance(next(stream), Queued)
    stream.cancel()
    with pytest.raises(RequestCancelledError, match="the caller cancelled"):
        stream.result()
    assert server.servicer.ended.wait(PATIENCE_S)


def test_leaving_the_block_early_cancels(server: RunningServer, client: Client) -> None:
    server.servicer.script = server.servicer.endless
    with client.stream("a", timeout=PATIENCE_S) as stream:
        next(stream)
    assert server.servicer.ended.wait(PATIENCE_S)


def test_cancelling_a_finished_stream_changes_nothing(client: Client) -> None:
    stream = client.stream("a", timeout=PATIENCE_S)
    expected = stream.result()
    stream.cancel()
    assert stream.result() == expected


def test_closing_the_client_cancels_what_is_in_flight(server: RunningServer, client: Client) -> None:
    server.servicer.script = server.servicer.endless
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.generate, "a", timeout=PATIENCE_S)
        assert server.servicer.asked.wait(PATIENCE_S)
        client.close()
        with pytest.raises(RequestCancelledError):
            call.result(PATIENCE_S)
    assert server.servicer.ended.wait(PATIENCE_S)
    with pytest.raises(RuntimeError, match="is closed"):
        client.generate("a")


@pytest.mark.parametrize(
    "error",
    [
        QueueFullError("the queue is full"),
        DeadlineExceededError("it would not be ready in time"),
        RequestCancelledError("stopped"),
        UnsupportedError("no such thing"),
        UnavailableError("draining"),
        EngineError("the device failed"),
    ],
)
def test_an_error_arrives_as_the_server_raised_it(server: RunningServer, client: Client, error: MiiServeError) -> None:
    server.servicer.script = refusal(error)
    for call in (lambda: client.generate("a", timeout=PATIENCE_S), lambda: client.stream("a", timeout=PATIENCE_S).result()):
        with pytest.raises(type(error)) as caught:
            call()
        assert type(caught.value) is type(error)
        assert str(caught.value) == str(error)


def test_a_broken_rule_arrives_with_its_field(server: RunningServer, client: Client) -> None:
    server.servicer.script = refusal(InvalidRequestError("height", "must be a multiple of 8", "7"))
    with pytest.raises(InvalidRequestError) as caught:
        client.generate("a", height=7, timeout=PATIENCE_S)
    assert (caught.value.field, caught.value.rule) == ("height", "must be a multiple of 8, got 7")


def test_an_unknown_failure_is_the_root_error(server: RunningServer, client: Client) -> None:
    server.servicer.script = lambda request: iter(1)  # type: ignore[call-overload]
    with pytest.raises(MiiServeError) as caught:
        client.generate("a", timeout=PATIENCE_S)
    assert type(caught.value) is MiiServeError


def test_the_timeout_is_the_servers_deadline(server: RunningServer, client: Client) -> None:
    server.servicer.script = server.servicer.endless
    with pytest.raises(DeadlineExceededError, match=server.target):
        client.generate("a", timeout=0.2)
    assert server.servicer.ended.wait(PATIENCE_S)
    with pytest.raises(DeadlineExceededError):
        client.stream("a", timeout=0.2).result()


def test_an_unreachable_target_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody answers there
        target = f"127.0.0.1:{taken.getsockname()[1]}"
        with Client(target) as client:
            for call in (lambda: client.generate("a", timeout=PATIENCE_S), client.server_info, client.health):
                with pytest.raises(UnavailableError, match=f"no answer from {target}"):
                    call()
            with pytest.raises(UnavailableError, match=f"{target} is not ready after 0.3 s"):
                client.wait_ready(0.3)


def test_a_stream_that_ends_early_is_an_error(server: RunningServer, client: Client) -> None:
    server.servicer.script = lambda request: iter([queued()])
    with pytest.raises(MiiServeError, match="ended before"):
        list(client.stream("a", timeout=PATIENCE_S))
    with pytest.raises(MiiServeError, match=r"images \[\] of"):
        server.servicer.script = lambda request: list(all_events(request))[-1:]  # type: ignore[assignment, return-value]
        client.generate("a", timeout=PATIENCE_S)


def test_arguments_are_refused_without_a_call(server: RunningServer, client: Client) -> None:
    with pytest.raises(InvalidRequestError, match="one call for each prompt"):
        client.generate(["a", "b"])  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="timeout"):
        client.stream("a", timeout=0)
    with pytest.raises(ConfigError, match="HOST:PORT"):
        Client("http://localhost:1")
    assert server.servicer.requests == []


def test_server_info_is_typed(client: Client) -> None:
    info = client.server_info()
    assert (info.version, info.model, info.engine, info.has_safety_checker) == ("9.9", "scripted", "reference", True)
    assert info.defaults == GenerationDefaults(scheduler="ddim")
    assert (info.limits.max_images_per_prompt, info.limits.max_size_px) == (4, 768)
    assert info.schedulers["DDIMScheduler"] == "ddim"
    assert (info.activity.max_slots, info.activity.num_running, info.activity.num_steps) == (8, 3, 70)


def test_wait_ready_returns_once_the_server_serves(server: RunningServer, client: Client) -> None:
    server.set_serving(False)
    assert client.health() == "NOT_SERVING"
    with pytest.raises(UnavailableError, match="its health is NOT_SERVING"):
        client.wait_ready(1.0)
    turn_on = threading.Timer(0.2, server.set_serving, (True,))
    turn_on.start()
    client.wait_ready(PATIENCE_S)
    turn_on.join()
    assert client.health() == "SERVING"


def test_wait_ready_waits_for_a_server_that_is_not_there_yet() -> None:
    with running() as first:
        target = first.target
    with Client(target) as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.wait_ready, PATIENCE_S)
        time.sleep(0.2)
        with running(int(target.rpartition(":")[2])):
            waiting.result(PATIENCE_S)


def test_threads_share_one_client(server: RunningServer, client: Client) -> None:
    def one(seed: int) -> list[int]:
        return client.generate("a", seed=seed, timeout=PATIENCE_S).seeds

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(16))) == [[seed] for seed in range(16)]
    assert len(server.servicer.requests) == 16
