"""However a client writes an address, it is the same one."""

from __future__ import annotations

import pytest

from mii_serve.gateway.paths import NormalizedPaths


async def seen(path: str, raw: bytes) -> tuple[str, str]:
    found = {}

    async def app(scope, receive, send):
        found.update(scope)

    await NormalizedPaths(app)({"type": "http", "path": path, "raw_path": raw, "headers": [(b"host", b"given")]}, None, None)
    return found["path"], dict(found["headers"])[b"host"].decode()


@pytest.mark.parametrize(
    ("written", "path", "host"),
    [
        ("/", "/", "given"),
        ("//", "/", "given"),
        ("/score/", "/score", "given"),
        ("/v1//images/generations//", "/v1/images/generations", "given"),
        ("/models/org/name/", "/models/org/name", "given"),
        ("http://named:1/score", "/score", "named:1"),
        ("HTTP://named", "/", "named"),
        ("https://named//v1/models/", "/v1/models", "named"),
        ("*", "*", "given"),
        ("/http://x/y", "/http:/x/y", "given"),
    ],
)
async def test_one_address_for_all_spellings(written, path, host):
    assert await seen(written, written.encode()) == (path, host)
