"""The work that bytes from outside cause grows as their number does, for every parser of them.

Work is counted, not timed: lines of Python, calls, the items that a call of a scanning method looks at, and how often a key
from outside is compared with another.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import sys
from collections.abc import Callable, Iterator
from types import FrameType, ModuleType
from typing import Any

import h11
import pytest
from fake_engine import FakeEngine
from starlette.datastructures import Headers
from starlette.requests import Request

from mii_serve.errors import MiiServeError
from mii_serve.gateway import hosts, json_body, middleware, paths
from mii_serve.gateway.dialects import azure_score, huggingface, openai
from mii_serve.gateway.errors import OverLimitError
from mii_serve.gateway.page import messages
from mii_serve.proto import codec, metadata, mii_codec
from mii_serve.proto.mii import pictures_pb2 as mii
from mii_serve.proto.v1 import image_generation_pb2 as pb
from mii_serve.server import call, suggestions
from mii_serve.server.keys import KeyRing
from mii_serve.types import GenerationRequest, ImageFormat, ResolvedRequest

SMALL, TIMES = 500, 8
SLACK = 1.5
"""Of linear growth; sorting takes a little more than that, a square would take eight times as much."""
SCANS = frozenset(
    {"count", "index", "remove", "insert", "find", "replace", "split", "partition", "rpartition", "join", "strip"}
)
CAPABILITIES = FakeEngine().capabilities


class CountedKey(str):
    """A key that counts how often it is compared."""

    __slots__ = ()
    num_compared = 0

    def __eq__(self, other: object) -> bool:
        CountedKey.num_compared += 1
        return str.__eq__(self, other)

    def __hash__(self) -> int:
        return str.__hash__(self)


class Work:
    def __init__(self) -> None:
        self.amount = 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        before = sys.gettrace(), sys.getprofile()
        CountedKey.num_compared = 0
        sys.setprofile(self._called)
        sys.settrace(self._entered)
        try:
            yield
        finally:
            sys.settrace(before[0])
            sys.setprofile(before[1])
            self.amount += CountedKey.num_compared

    def _entered(self, frame: FrameType, event: str, argument: object) -> Any:
        self.amount += 1
        return self._entered

    def _called(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call":
            owner = getattr(argument, "__self__", None)
            is_scan = argument.__name__ in SCANS and not isinstance(owner, ModuleType)
            self.amount += len(owner) if is_scan and hasattr(owner, "__len__") else 1


def work_of(parse: Callable[[Any], object], given: object) -> int:
    work = Work()
    with work.counted(), contextlib.suppress(MiiServeError):
        parse(given)
    return work.amount


def body_of(raw: bytes) -> Request:
    pieces = [raw[i : i + 16] for i in range(0, len(raw), 16)] or [b""]

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    return Request({"type": "http", "headers": [(b"content-type", b"application/json")]}, receive)


def read(raw: bytes) -> object:
    return asyncio.run(json_body.read_json(body_of(raw), 2**24))


def decoded(raw: bytes) -> Any:
    """What the dialects get of a body; its keys count."""
    return json.loads(raw, object_pairs_hook=lambda pairs: {CountedKey(name): value for name, value in pairs})


def keys(n: int, *, twice: bool = False, value: str = "1") -> bytes:
    names = [f"k{i}" for i in range(n)] + ([f"k{n - 1}"] if twice else [])
    return ("{" + ",".join(f'"{name}":{value}' for name in names) + "}").encode()


def score_body(**split: object) -> bytes:
    return json.dumps({"input_data": {"columns": ["prompt"], **split}}).encode()


BODIES: dict[str, Callable[[int], bytes]] = {
    "distinct keys": keys,
    "the last key twice": lambda n: keys(n, twice=True),
    "one key always": lambda n: ("{" + ",".join(['"k":1'] * n) + "}").encode(),
    "objects with keys twice": lambda n: ("[" + ",".join(['{"a":1}'] * n) + ',{"b":1,"b":2}]').encode(),
    "nesting": lambda n: b"[" * n + b"]" * n,
    "nested objects": lambda n: b'{"a":' * n + b"1" + b"}" * n,
    "unclosed": lambda n: b'{"a":[' * n,
    "numbers": lambda n: json.dumps([1.5] * n).encode(),
    "one number": lambda n: b"[" + b"9" * n + b"]",
    "one fraction": lambda n: b"[0." + b"9" * n + b"e" + b"9" * n + b"]",
    "one text": lambda n: json.dumps("é\\\n" * n).encode(),
    "an open text": lambda n: b'"' + b"\\u00e9" * n,
    "white space": lambda n: b" " * n,
    "no text": lambda n: b"\xff" * n,
    "NaN": lambda n: b"[" + b"1," * n + b"NaN]",
}


@pytest.mark.parametrize("name", BODIES)
def test_reading_json(name, monkeypatch):
    found = json_body._object
    monkeypatch.setattr(json_body, "_object", lambda pairs: found([(CountedKey(key), value) for key, value in pairs]))
    check(read, BODIES[name])


def openai_body(raw: Any) -> object:
    return openai.parse(json_body.validated(openai.ImagesBody, raw), CAPABILITIES)


read_score = functools.partial(azure_score.parse, max_rows=2**24)
read_task = functools.partial(huggingface.parse, image_format=ImageFormat.PNG)


DIALECTS: dict[str, tuple[Callable[[Any], object], Callable[[int], bytes]]] = {
    "rows": (read_score, lambda n: score_body(data=["a"] * n)),
    "rows that are arrays": (read_score, lambda n: score_body(data=[["a"]] * n)),
    "rows that are objects": (read_score, lambda n: score_body(data=[{"prompt": "a"}] * n, index=[1] * n)),
    "a row with many keys": (read_score, lambda n: score_body(data=[{"prompt": "a", **{f"k{i}": 1 for i in range(n)}}])),
    "a column": (read_score, lambda n: score_body(data={"prompt": ["a"] * n})),
    "columns": (read_score, lambda n: score_body(data=["a"], columns=["prompt"] * n)),
    "parameters": (read_score, lambda n: score_body(data=["a"], parameters={f"k{i}": 1 for i in range(n)})),
    "members of /score": (read_score, keys),
    "members of OpenAI's": (openai_body, keys),
    "a long size": (openai_body, lambda n: json.dumps({"prompt": "a", "size": "1" * n + "x"}).encode()),
    "a size of spaces": (openai_body, lambda n: json.dumps({"prompt": "a", "size": " " * n + "1" + " " * n}).encode()),
    "a long model": (openai_body, lambda n: json.dumps({"prompt": "a", "model": "m" * n, "n": 1}).encode()),
    "a long format": (openai_body, lambda n: json.dumps({"prompt": "a", "output_format": "p" * n}).encode()),
    "members of Hugging Face's": (read_task, keys),
    "parameters of Hugging Face's": (
        read_task,
        lambda n: json.dumps({"inputs": "a", "parameters": {f"k{i}": 1 for i in range(n)}}).encode(),
    ),
    "members of the page's": (messages.parse, keys),
    "a long seed": (messages.parse, lambda n: json.dumps({"prompt": "a", "seed": " 1" * n}).encode()),
}


@pytest.mark.parametrize("name", DIALECTS)
def test_reading_what_the_json_says(name):
    parse, make = DIALECTS[name]
    check(lambda raw: parse(decoded(raw)), make)


@pytest.mark.parametrize("form", [lambda n: ["a"] * n, lambda n: [["a"]] * n, lambda n: {"prompt": ["a"] * n}])
def test_no_row_is_looked_at_where_there_are_more_than_one_call_may_have(form):
    bodies_of = [decoded(score_body(data=form(num_rows))) for num_rows in (100, 8000)]
    few, many = (work_of(functools.partial(azure_score.parse, max_rows=64), body) for body in bodies_of)
    assert few == many
    with pytest.raises(OverLimitError, match="at most 64 images in all, got 8000"):
        azure_score.parse(bodies_of[1], max_rows=64)


def kwargs_of_old_mii(n: int) -> bytes:
    entries = [mii.KwargEntry(key=f"k{i}", value=mii.Value(ivalue=1)).SerializeToString() for i in range(n)]
    return mii.PictureRequest(prompt=["a"], second=entries).SerializeToString()


def resolved(request: GenerationRequest) -> ResolvedRequest:
    params = CAPABILITIES.resolve(request.params, fallback_seed=1)
    return ResolvedRequest(params=params, output=request.output)


def mii_call(wire: bytes) -> object:
    return mii_codec.decode_mii_request(mii_codec.parse_mii_request(wire), resolved, fallback_seed=1)


def v1_call(wire: bytes) -> object:
    return resolved(codec.decode_request(pb.GenerateRequest.FromString(wire)))


def unknown_fields(n: int) -> bytes:
    """Fields of one byte each, with numbers from 1000 on."""
    return b"".join(
        bytes([(number & 15) << 3 | 0x80, number >> 4 & 0x7F | 0x80, number >> 11, 0]) for number in range(1000, 1000 + n)
    )


MESSAGES: dict[str, tuple[Callable[[bytes], object], Callable[[int], bytes]]] = {
    "unknown fields": (v1_call, unknown_fields),
    "a long prompt": (v1_call, lambda n: pb.GenerateRequest(prompt="aé '" * n).SerializeToString()),
    "a long scheduler": (v1_call, lambda n: pb.GenerateRequest(prompt="a", scheduler="s" * n).SerializeToString()),
    "MII's prompts": (mii_call, lambda n: mii.PictureRequest(prompt=["a"] * n).SerializeToString()),
    "MII's negative prompts": (mii_call, lambda n: mii.PictureRequest(prompt=["a"], second=[b"n"] * n).SerializeToString()),
    "MII's older kwargs": (mii_call, kwargs_of_old_mii),
    "MII's newer kwargs": (
        mii_call,
        lambda n: mii_codec.encode_mii_request(["a"], [], {f"k{i}": 1 for i in range(n)}).SerializeToString(),
    ),
    "MII's unknown fields": (mii_call, unknown_fields),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_reading_messages(name):
    check(*MESSAGES[name])


def heads(raw: bytes) -> object:
    """One byte at a time, as the slowest caller sends them."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=2**16)
    with contextlib.suppress(h11.RemoteProtocolError):
        for byte in raw:
            connection.receive_data(bytes([byte]))
            connection.next_event()
    return None


def headers(raw: bytes) -> Headers:
    return Headers(raw=[(b"x%d" % i, b"1") for i in range(len(raw))])


def plain_path(path: str) -> object:
    return paths._normalized({"path": path, "raw_path": path.encode(), "headers": [(b"host", b"a")]})


HEADERS: dict[str, tuple[Callable[[Any], object], Callable[[int], object]]] = {
    "a head": (heads, lambda n: b"GET / HTTP/1.1\r\nHost: a\r\nx: " + b"y" * n),
    "a head of many lines": (heads, lambda n: b"GET / HTTP/1.1\r\nHost: a\r\n" + b"x: y\r\n" * (n // 4) + b"\r\n"),
    "a folded head": (heads, lambda n: b"GET / HTTP/1.1\r\nHost: a\r\nx: y\r\n" + b" z\r\n" * (n // 4) + b"\r\n"),
    "ids among many headers": (lambda raw: middleware._id_headers(headers(raw), "id"), lambda n: b"x" * n),
    "media types": (huggingface.accepted, lambda n: ",".join(["text/html;q=0.1;a;b"] * n)),
    "options of a media type": (huggingface.accepted, lambda n: "image/png" + ";a=1" * n),
    "a content type": (json_body._check_media_type, lambda n: "application/json" + ' ; charset="utf-8"' * n),
    "a host": (hosts.AllowedHosts(["localhost"], allow_loopback_addresses=True).allows, lambda n: "a." * n),
    "digits of a host": (
        hosts.AllowedHosts(["localhost"], allow_loopback_addresses=True).allows,
        lambda n: "[" + "1:" * n + "]",
    ),
    "an origin": (hosts.AllowedHosts(["localhost"]).allows_origin, lambda n: "http://" + "a." * n),
    "a key": (
        lambda text: KeyRing().admitted(middleware.authorization_of({"authorization": text})).__enter__(),
        lambda n: "Bearer " * n,
    ),
    "a request id": (metadata.check_request_id, lambda n: "i" * n),
    "a client id": (metadata.check_client_id, lambda n: " i" * n),
    "an idempotency key": (metadata.check_idempotency_key, lambda n: "k" * n),
    "a path": (plain_path, lambda n: "//a" * n + "/" * n),
    "a whole address": (plain_path, lambda n: "http://" + "a:" * n + "//b" * n),
    "an address": (call.network_of, lambda n: "1:" * n),
}


@pytest.mark.parametrize("name", HEADERS)
def test_reading_headers(name):
    check(*HEADERS[name])


def check(parse: Callable[[Any], object], make: Callable[[int], object], size: int = SMALL) -> None:
    few, many = make(size), make(size * TIMES)
    work_of(parse, few)  # what is imported or kept at the first time is not its work
    little, much = work_of(parse, few), work_of(parse, many)
    assert much <= little * TIMES * SLACK, f"{little} for {size} and {much} for {TIMES} times as much"


def test_the_meter_sees_a_square():
    def quadratic(pairs: list[tuple[str, int]]) -> list[str]:
        names = [name for name, _ in pairs]
        return [name for name in names if names.count(name) > 1]

    with pytest.raises(AssertionError):
        check(quadratic, lambda n: [(f"k{i}", 1) for i in range(n)], size=100)
    with pytest.raises(AssertionError):
        check(
            lambda names: [name for name in names if name in [*names[:-1], "z"]],
            lambda n: [CountedKey(f"k{n - i}") for i in range(n)],
            size=100,
        )


MODULES = (
    *(azure_score, hosts, huggingface, json_body, messages, middleware, openai, paths, suggestions),
    *(codec, metadata, mii_codec, call),
)
UNBOUNDED_INSIDE_UNBOUNDED = re.compile(r"[+*}]\)[+*{]")


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_no_pattern_for_outside_text_repeats_a_repetition(module):
    patterns = [str(value.pattern) for value in vars(module).values() if isinstance(value, re.Pattern)]
    assert not [pattern for pattern in patterns if UNBOUNDED_INSIDE_UNBOUNDED.search(pattern)]
