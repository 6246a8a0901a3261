"""API keys: the file, the comparison, the limits, the reload."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mii_serve.errors import ConfigError, RateLimitedError, UnauthenticatedError
from mii_serve.server.keys import ApiKey, KeyRing

STUDIO, GUEST = "studio-key-0123456789", "guest-key-0123456789"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text(
        f"# who may call\n\n{STUDIO} name=studio requests_per_minute=2\n{GUEST} max_concurrent_requests=1 # a guest\n"
    )
    file.chmod(0o600)
    return file


def name_of(keys: KeyRing, authorization: str | None, **how) -> str | None:
    with keys.admitted(authorization, **how) as name:
        return name


def test_without_a_file_everybody_may_call():
    assert name_of(KeyRing(), None) is None


def test_each_key_has_a_name(file):
    keys = KeyRing(file)
    assert name_of(keys, f"Bearer {STUDIO}") == "studio"
    assert name_of(keys, f"bearer  {GUEST} ") == "key-4"


@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer ", STUDIO, f"Basic {STUDIO}"])
def test_a_call_without_a_key_is_told_how_to_bring_one(file, given):
    with pytest.raises(UnauthenticatedError, match="authorization: Bearer KEY"):
        name_of(KeyRing(file), given)


@pytest.mark.parametrize("given", [STUDIO[:-1], STUDIO + "0", STUDIO.upper(), "\udcff\udcfe", "é"])
def test_an_unknown_key_is_refused_and_not_repeated(file, given):
    with pytest.raises(UnauthenticatedError) as caught:
        name_of(KeyRing(file), f"Bearer {given}")
    assert given not in str(caught.value)


def test_requests_by_the_minute(file):
    clock = Clock()
    keys = KeyRing(file, clock=clock)
    for _ in range(2):
        name_of(keys, f"Bearer {STUDIO}")
    with pytest.raises(RateLimitedError, match="'studio' may make 2 requests a minute") as caught:
        name_of(keys, f"Bearer {STUDIO}")
    assert caught.value.retry_after_s == pytest.approx(30)
    name_of(keys, f"Bearer {STUDIO}", is_work=False)
    name_of(keys, f"Bearer {GUEST}")
    clock.now += 30
    name_of(keys, f"Bearer {STUDIO}")
    with pytest.raises(RateLimitedError):
        name_of(keys, f"Bearer {STUDIO}")
    clock.now += 1e6
    for _ in range(2):
        name_of(keys, f"Bearer {STUDIO}")
    with pytest.raises(RateLimitedError):
        name_of(keys, f"Bearer {STUDIO}")


def test_requests_at_once(file):
    keys = KeyRing(file)
    with keys.admitted(f"Bearer {GUEST}"):
        with pytest.raises(RateLimitedError, match="1 requests at once"):
            name_of(keys, f"Bearer {GUEST}")
        name_of(keys, f"Bearer {STUDIO}")
    with pytest.raises(ZeroDivisionError), keys.admitted(f"Bearer {GUEST}"):
        raise ZeroDivisionError
    name_of(keys, f"Bearer {GUEST}")


def test_the_file_is_read_again_when_asked(file, caplog):
    keys = KeyRing(file)
    file.write_text(f"{GUEST}\n")
    name_of(keys, f"Bearer {STUDIO}")
    keys.reload()
    with pytest.raises(UnauthenticatedError):
        name_of(keys, f"Bearer {STUDIO}")
    name_of(keys, f"Bearer {GUEST}")
    for broken in ("", "short name=a b=c"):
        file.write_text(broken)
        keys.reload()
        name_of(keys, f"Bearer {GUEST}")
    file.unlink()
    keys.reload()
    name_of(keys, f"Bearer {GUEST}")
    assert caplog.text.count("the API keys stay as they were") == 3


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "has no key, so no caller could be admitted"),
        ("# nothing\n", "has no key"),
        (f"{STUDIO} {GUEST}", "line 1: after the key come only name, requests_per_minute, max_concurrent_requests"),
        (f"{STUDIO} requests_per_minute=0", "line 1: requests_per_minute: Input should be greater than or equal to 1"),
        (f"{STUDIO} name=a/b", "line 1: name: "),
        (f"{STUDIO} digest=1", "line 1"),
        ("clé-0123456789-0123456789", "line 1: a key is printable ASCII"),
        (f"{STUDIO}\n{STUDIO}", "the same key twice"),
        (f"{STUDIO} name=a\n{GUEST} name=a", "the same name twice"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_without_showing_a_key(tmp_path, text, rule):
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"^api_key_file: ") as caught:
        KeyRing(file)
    assert rule in str(caught.value)
    assert STUDIO not in str(caught.value) and GUEST not in str(caught.value)


def test_what_is_risky_is_said(tmp_path, caplog):
    file = tmp_path / "keys"
    file.write_text("secret\n")
    file.chmod(0o644)
    with caplog.at_level(logging.WARNING):
        KeyRing(file)
    assert "every user of this machine can read" in caplog.text
    assert "short enough to be guessed" in caplog.text
    assert "secret" not in caplog.text


def test_no_key_is_in_a_repr():
    assert "digest" not in repr(ApiKey(digest=b"x", name="a"))
