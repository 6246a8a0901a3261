"""What the docs say of names, bounds and open addresses is read out of the code."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from starlette.routing import Route

from mii_serve.config import DeployConfig
from mii_serve.engine.batched.engine import CPU_SLOTS, MAX_SLOTS
from mii_serve.gateway import image_links, json_body, listener, middleware, protocol
from mii_serve.gateway.app import GRACE_S, build_app
from mii_serve.proto.codec import MAX_REQUEST_BYTES
from mii_serve.proto.metadata import MAX_ID_CHARS
from mii_serve.samplers.names import SAMPLERS
from mii_serve.server import front, idempotency, open_files, router
from mii_serve.server.bounded_write import ABORT_TIMEOUT_S, WRITE_TIMEOUT_S
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.keys import KeyRing

ROOT = Path(__file__).resolve().parents[2]
SPACINGS = ("karras", "exponential", "beta", "lu", "flow")


def page(name: str) -> str:
    """A page's text as one line, so that a claim may be broken anywhere."""
    return " ".join((ROOT / name).read_text().split())


WIRE, CONFIGURATION = page("docs/architecture/03-wire.md"), page("docs/architecture/04-configuration.md")
REQUEST, HTTP = page("docs/architecture/02-request.md"), page("docs/architecture/10-http.md")


class TestOpenAddresses:
    """Of a server with keys, asked without one."""

    @pytest.fixture
    def app(self, tmp_path):
        file = tmp_path / "keys"
        file.write_text("a-key-that-is-long-enough\n")
        return build_app(Dispatcher(), KeyRing(file))

    def test_the_page_lists_every_one_that_needs_no_key(self, app):
        (said,) = re.findall(r"<!-- open -->(.*?)<!-- end -->", CONFIGURATION)
        listed = {name if " " in name else f"GET {name}" for name in re.findall(r"`([^`]+)`", said)}
        found = set()
        for route in app.routes:
            for method in route.methods - {"HEAD"}:
                if asyncio.run(status_of(app, method, route)) != 401:
                    found.add(f"{method} {route.path.partition('/{')[0]}")
        assert found == listed

    def test_the_page_on_http_names_every_route_that_is_not_the_pages(self, app):
        for route in app.routes:
            if not route.path.startswith("/ui/"):
                path = re.sub(r":\w+}", "}", route.path)
                assert f"{path}`" in HTTP.replace("{id}", "{model}"), route.path


async def status_of(app, method: str, route: Route) -> int:
    path, sent = re.sub(r"\{[^}]*\}", "x", route.path), []
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "headers": headers,
    }
    scope |= {"query_string": b"", "root_path": "", "scheme": "http", "server": ("localhost", 80), "client": ("127.0.0.1", 1)}

    async def receive():
        await asyncio.sleep(0)
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message):
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]["status"]


class TestSchedulerNames:
    """The tables of names on the page on the wire make all there are and no others."""

    def test_every_solver_and_its_spacings_are_on_the_page(self):
        text = (ROOT / "docs/architecture/03-wire.md").read_text()
        rows = dict(re.findall(r"^\| ([^|`]+) \| (.*) \|$", text, re.MULTILINE))
        solvers = {
            name
            for kind in ("solvers", "with an order", "DPM-Solver++", "DPM-Solver")
            for name in _ranges_out(rows[kind].partition("; without")[0])
        }
        assert solvers == {name for name in SAMPLERS if name.rpartition("_")[2] not in SPACINGS}
        families = {"UniPC": "unipc", "DEIS": "deis", "all of DPM-Solver": "dpm"}
        (three,) = re.findall(r"`_karras`, `_exponential`, `_beta` for (.*?);", rows["a spacing behind it"])
        plain = set(re.findall(r"`(\w+)`", three))
        for solver in solvers:
            said = solver in plain or any(name in three and solver.startswith(stem) for name, stem in families.items())
            assert {f"{solver}_{spacing}" in SAMPLERS for spacing in SPACINGS[:3]} == {said}, solver
            is_multistep = re.fullmatch(r"dpm(\+\+)?_[123]m(_sde)?", solver) is not None
            assert (f"{solver}_lu" in SAMPLERS) == is_multistep, solver
            has_flow = solver == "sa_solver" or (solver.startswith(("unipc", "deis", "dpm")) and solver != "dpm++_sde")
            assert (f"{solver}_flow" in SAMPLERS) == has_flow, solver

    @pytest.mark.parametrize("name", ["README.md", "docs/decisions/0008-the-models-own-scheduler.md"])
    def test_their_number_is_right(self, name):
        assert re.findall(r"(\d+) (?:others|names) ", page(name)) == [str(len(SAMPLERS))]


def _ranges_out(cell: str) -> set[str]:
    """`a_1m` to `a_3m` are three names."""
    names = set(re.findall(r"`([a-z0-9_+]+)`", cell))
    for first, last in re.findall(r"`([a-z0-9_+]+)` to `([a-z0-9_+]+)`", cell):
        begin, end = (re.fullmatch(r"(.*_)(\d)(.*)", name) for name in (first, last))
        names |= {f"{begin[1]}{order}{begin[3]}" for order in range(int(begin[2]), int(end[2]) + 1)}
    return names


class TestConfiguration:
    def test_the_example_is_a_file_that_can_be_read(self, tmp_path):
        (example,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/architecture/04-configuration.md").read_text(), re.DOTALL)
        (tmp_path / "example.yaml").write_text(example)
        assert DeployConfig.load({}, tmp_path / "example.yaml").limits.max_images_per_prompt == 4

    def test_defaults_that_are_told(self, monkeypatch):
        config = DeployConfig.load({})
        assert f"left out, what warm-up finds, at most {MAX_SLOTS}" in CONFIGURATION
        assert f"there are {MAX_SLOTS} slots on a GPU and {CPU_SLOTS} on a CPU" in page("docs/architecture/05-batching.md")
        for name in ("max_body_bytes", "max_images", "max_steps", "keep_alive_s", "timeout_s"):
            (told,) = re.findall(rf"\| `http.{name}` \| ([\d ]+?)( MiB)? \|", HTTP)
            number = int(told[0].replace(" ", "")) * (1024 * 1024 if told[1] else 1)
            assert number == getattr(config.http, name), name
        assert f"`drain_timeout_s` ({config.drain_timeout_s:g} s)" in page("README.md")
        assert f"`drain_timeout_s`, {config.drain_timeout_s:g} s unless" in page("docs/architecture/01-parts.md")
        assert f"`hang_timeout_s`, {config.hang_timeout_s:g} s unless" in REQUEST

    def test_bounds_on_connections(self):
        assert f"on each port by {open_files.MAX_CONNECTIONS}," in CONFIGURATION
        assert f"{open_files.RESERVED_FILES} files and {open_files.FILES_PER_REPLICA} for each replica" in CONFIGURATION
        assert f"keeps {listener.NUM_IDLE} out of the reach" in CONFIGURATION
        assert f"without a call for {front.IDLE_TIMEOUT_MS // 1000} s" in CONFIGURATION
        assert f"{front.MAX_STREAMS} calls at once may share a connection" in CONFIGURATION
        assert f"not shaken hands after {front.HANDSHAKE_TIMEOUT_MS // 1000} s" in CONFIGURATION
        assert f"fewer than {open_files.MIN_CONNECTIONS} on each port" in CONFIGURATION


class TestBounds:
    def test_over_http(self):
        head_s = protocol.HEAD_TIMEOUT_S
        assert f"may have {protocol.MAX_HEAD_BYTES // 1024} KiB and take {head_s:g} s;" in HTTP
        assert f"closed, after {2 * head_s:g} s at the latest" in HTTP
        assert f"a head above {protocol.MAX_HEAD_BYTES // 1024} KiB" in HTTP
        assert f"body must arrive within {json_body.BODY_TIMEOUT_S:g} s" in HTTP
        assert f"drops up to {json_body.MAX_DISCARDED_BYTES // 1024**2} MiB of it" in HTTP
        assert f"reads nothing for {middleware.SEND_TIMEOUT_S:g} s is given up" in HTTP
        assert f"is closed within {(protocol.UNREAD_LOOKS + 1) * head_s:g} s" in HTTP
        assert f"slow callers have {GRACE_S} s to read" in HTTP
        assert f"without an event for {middleware.KEEPALIVE_S:g} s sends a comment" in HTTP
        assert f"more than {image_links.MAX_STORED_BYTES // 1024**2} MiB of such images" in HTTP
        assert image_links.STORED_S == 600 and "works for ten minutes" in HTTP

    def test_over_grpc(self):
        assert f"a whole request | {MAX_REQUEST_BYTES // 1024**2} MiB |" in WIRE
        assert WIRE.count(f"up to {MAX_ID_CHARS} printable ASCII characters") == 3
        assert f"stays full for {WRITE_TIMEOUT_S:g} s is given up" in WIRE
        assert f"within {ABORT_TIMEOUT_S:g} s more" in WIRE
        assert f"Kept are at most {idempotency.MAX_BYTES // 1024**2} MiB" in WIRE
        assert idempotency.KEEP_S == 600 and "one that comes within ten minutes" in WIRE
        assert idempotency.GRACE_S == 10 and "goes on for ten seconds" in WIRE

    def test_of_a_requests_life(self):
        from mii_serve.client import retries

        assert f"or {router.MAX_WAITING} requests wait for a replica" in REQUEST
        assert f"| {router.MAX_LOSSES} replicas were lost under it" in REQUEST
        assert f"{router.MAX_REMEMBERED} such kinds are remembered" in REQUEST
        assert f"`max_retries` times ({retries.MAX_RETRIES})" in REQUEST
        assert f"begins with {retries.FIRST_BACKOFF_S:g} s and doubles" in REQUEST
        assert f"longer than {retries.LONGEST_PAUSE_S:g} s" in REQUEST
