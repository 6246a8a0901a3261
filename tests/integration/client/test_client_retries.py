"""What the SDK tries again by itself, and what it does not."""

from __future__ import annotations

import pytest
from patience import PATIENCE_S
from scripted_server import RunningServer, all_events, refusal

from mii_serve.client import AsyncClient, Client
from mii_serve.errors import (
    ConfigError,
    DeadlineExceededError,
    EngineError,
    MiiServeError,
    ModerationFailedError,
    QueueFullError,
    RateLimitedError,
    UnavailableError,
)


def failing_first(server: RunningServer, *errors: MiiServeError) -> list[int]:
    """Let the server refuse with these, one call after the other, and then answer; counts the calls."""
    calls: list[int] = []

    def script(request):
        calls.append(1)
        chosen = refusal(errors[len(calls) - 1]) if len(calls) <= len(errors) else all_events
        yield from chosen(request)

    server.servicer.script = script
    return calls


@pytest.mark.parametrize(
    "error", [UnavailableError("draining"), QueueFullError("full", 0.05), RateLimitedError("too many", 0.05)], ids=repr
)
async def test_what_may_pass_is_tried_again(server: RunningServer, error: MiiServeError) -> None:
    calls = failing_first(server, error)
    with Client(server.target) as client:
        assert client.generate("a", timeout=PATIENCE_S).images
    assert len(calls) == 2
    calls = failing_first(server, error)
    async with AsyncClient(server.target) as client:
        assert (await client.generate("a", timeout=PATIENCE_S)).images
    assert len(calls) == 2


@pytest.mark.parametrize(
    "error",
    [
        EngineError("broken"),
        DeadlineExceededError("late"),
        QueueFullError("full"),
        QueueFullError("full", 3600),
        ModerationFailedError("no verdict"),
    ],
    ids=repr,
)
def test_what_will_not_pass_is_not(server: RunningServer, error: MiiServeError) -> None:
    calls = failing_first(server, error)
    with Client(server.target) as client, pytest.raises(type(error)):
        client.generate("a", timeout=PATIENCE_S)
    assert len(calls) == 1


def test_retries_have_a_bound_and_can_be_off(server: RunningServer) -> None:
    for max_retries in (0, 1):
        calls = failing_first(server, *[UnavailableError("x")] * 9)
        with Client(server.target, max_retries=max_retries) as client, pytest.raises(UnavailableError):
            client.generate("a", timeout=PATIENCE_S)
        assert len(calls) == 1 + max_retries


def test_a_pause_longer_than_the_time_left_is_not_begun(server: RunningServer) -> None:
    calls = failing_first(server, QueueFullError("full", 2 * PATIENCE_S))
    with Client(server.target) as client, pytest.raises(QueueFullError) as caught:
        client.generate("a", timeout=PATIENCE_S)
    assert len(calls) == 1
    assert caught.value.retry_after_s == 2 * PATIENCE_S


def test_a_stream_is_not_made_again(server: RunningServer) -> None:
    calls = failing_first(server, UnavailableError("x"))
    with Client(server.target) as client, pytest.raises(UnavailableError):
        client.stream("a", timeout=PATIENCE_S).result()
    assert len(calls) == 1


@pytest.mark.parametrize("value", [-1, 1.5, True, "2"])
def test_the_number_of_retries_is_checked(value: object) -> None:
    with pytest.raises(ConfigError, match="max_retries"):
        Client("localhost:1", max_retries=value)
