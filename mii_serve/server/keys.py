"""API keys: who may call, how often, and how much at once.

The file has one key per line, with what is to be known about it; `#` starts a comment:

    9f1c…  name=studio  requests_per_minute=120  max_concurrent_requests=8

Everything but the key may be left out. Only digests of the keys are kept in memory, and every one is compared in constant time.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mii_serve.errors import ConfigError, RateLimitedError, UnauthenticatedError

logger = logging.getLogger(__name__)

SETTING = "api_key_file"
SHORT_KEY = 16
"""Characters below which a key can be guessed; allowed, with a warning."""
SHORTEST_RETRY_S = 0.1


class ApiKey(BaseModel):
    """One line of the file. `digest` is the SHA-256 of the key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: bytes = Field(repr=False)
    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    requests_per_minute: int | None = Field(None, ge=1)
    max_concurrent_requests: int | None = Field(None, ge=1)


class _Usage:
    """What one key has used: a bucket that refills steadily and holds a minute's worth, and the calls in progress."""

    def __init__(self) -> None:
        self.num_running = 0
        self._used = 0.0
        self._looked_at = float("-inf")

    def take(self, per_minute: int, now: float) -> float:
        """Count one request; 0 where it is allowed, else seconds until it would be."""
        self._used = max(0.0, self._used - (now - self._looked_at) * per_minute / 60.0)
        self._looked_at = now
        if self._used + 1.0 > per_minute:
            return (self._used + 1.0 - per_minute) * 60.0 / per_minute
        self._used += 1.0
        return 0.0


class KeyRing:
    """The keys of a deployment. Without a file, everybody may call."""

    def __init__(
        self, file: Path | None = None, *, clock: Callable[[], float] = time.monotonic, setting: str = SETTING
    ) -> None:
        """Read the file, which is the value of the `setting`.

        Raises:
            ConfigError: it cannot be read, or a line breaks a rule; the line is named, never its key.
        """
        self._file = file
        self._clock = clock
        self._setting = setting
        self._keys = _read(file, setting) if file is not None else None
        self._usage: dict[str, _Usage] = {}

    def reload(self) -> None:
        """Read the file again. One that cannot be used changes nothing."""
        if self._file is None:
            return
        try:
            self._keys = _read(self._file, self._setting)
        except ConfigError as error:
            logger.error("the API keys stay as they were: %s", error)
        else:
            logger.info("%d API keys read", len(self._keys))

    def has(self, name: str) -> bool:
        """Whether a key of this name may call. Where there are no keys, everybody may."""
        return self._keys is None or any(key.name == name for key in self._keys)

    @contextlib.contextmanager
    def admitted(self, authorization: str | None, *, is_work: bool = True) -> Iterator[str | None]:
        """Let a call with this `authorization` header in while the block runs; gives the key's name.

        Only work counts against the key's limits.

        Raises:
            UnauthenticatedError: no key, or an unknown one.
            RateLimitedError: too many requests with this key, by the minute or at once.
        """
        if self._keys is None:
            yield None
            return
        key = _matching(self._keys, authorization)
        if not is_work:
            yield key.name
            return
        usage = self._usage.setdefault(key.name, _Usage())
        if key.max_concurrent_requests is not None and usage.num_running >= key.max_concurrent_requests:
            raise RateLimitedError(
                f"the API key {key.name!r} may have {key.max_concurrent_requests} requests at once", 1.0, key_name=key.name
            )
        if key.requests_per_minute is not None and (wait_s := usage.take(key.requests_per_minute, self._clock())):
            text = f"the API key {key.name!r} may make {key.requests_per_minute} requests a minute"
            raise RateLimitedError(text, max(SHORTEST_RETRY_S, wait_s), key_name=key.name)
        usage.num_running += 1
        try:
            yield key.name
        finally:
            usage.num_running -= 1


def _matching(keys: list[ApiKey], authorization: str | None) -> ApiKey:
    scheme, _, given = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not given.strip():
        raise UnauthenticatedError("this server wants an API key, as 'authorization: Bearer KEY'")
    digest = _digest(given.strip())
    found = None
    for key in keys:  # all of them, always: how long it takes must not tell which one was near
        if hmac.compare_digest(key.digest, digest):
            found = key
    if found is None:
        raise UnauthenticatedError("this server does not know that API key")
    return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _read(file: Path, setting: str) -> list[ApiKey]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        is_open_to_all = file.stat().st_mode & 0o004
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(setting, f"cannot read {file}: {error}") from None
    if is_open_to_all:
        logger.warning("every user of this machine can read %s; chmod 600 is better", file)
    words_of = {number: line.partition("#")[0].split() for number, line in enumerate(lines, 1)}
    keys = [_parsed(setting, number, words) for number, words in words_of.items() if words]
    if not keys:
        raise ConfigError(setting, f"{file} has no key, so no caller could be admitted")
    for what, values in (("key", [key.digest for key in keys]), ("name", [key.name for key in keys])):
        if len(set(values)) < len(values):
            raise ConfigError(setting, f"{file} has the same {what} twice")
    return keys


def _parsed(setting: str, number: int, words: list[str]) -> ApiKey:
    key, *rest = words
    if not key.isascii() or not key.isprintable():
        raise ConfigError(setting, f"line {number}: a key is printable ASCII text")
    if len(key) < SHORT_KEY:
        logger.warning("%s: the key in line %d is short enough to be guessed", setting, number)
    fields = dict(word.partition("=")[::2] for word in rest)
    known = [name for name in ApiKey.model_fields if name != "digest"]
    if not fields.keys() <= set(known):  # not repeated here: it may be a second key
        raise ConfigError(setting, f"line {number}: after the key come only {', '.join(known)}, as NAME=VALUE")
    try:
        return ApiKey.model_validate({"name": f"key-{number}", **fields, "digest": _digest(key)})
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"])
        raise ConfigError(setting, f"line {number}: {field}: {problem['msg']}") from None
