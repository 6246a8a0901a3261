"""TLS, mutual TLS and API keys at the real front: who is refused has cost nothing."""

from __future__ import annotations

import datetime
from pathlib import Path

import grpc
import pytest
import trustme
from fake_engine import FakeEngine
from grpc_health.v1 import health_pb2, health_pb2_grpc
from patience import PATIENCE_S
from servers import RunningServer, running_server

from mii_serve.client import AsyncClient
from mii_serve.errors import ConfigError, InvalidRequestError, RateLimitedError, UnauthenticatedError, UnavailableError
from mii_serve.server.keys import KeyRing
from mii_serve.server.tls import Tls

KEY = "studio-key-0123456789"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def write_server_pair(folder: Path, authority: trustme.CA, **settings) -> tuple[Path, Path]:
    issued = authority.issue_cert("localhost", **settings)
    cert, key = folder / "server.pem", folder / "server.key"
    cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    key.write_bytes(issued.private_key_pem.bytes())
    return cert, key


def trusting(authority: trustme.CA, client: trustme.LeafCert | None = None) -> grpc.ChannelCredentials:
    roots = authority.cert_pem.bytes()
    if client is None:
        return grpc.ssl_channel_credentials(roots)
    chain = b"".join(blob.bytes() for blob in client.cert_chain_pems)
    return grpc.ssl_channel_credentials(roots, client.private_key_pem.bytes(), chain)


async def draw(server: RunningServer, **settings) -> int:
    target = f"localhost:{server.target.rpartition(':')[2]}"
    async with AsyncClient(target, max_retries=0, **settings) as client:
        return len((await client.generate("a red circle", timeout=PATIENCE_S)).images)


class TestApiKeys:
    @pytest.fixture
    async def server(self, tmp_path):
        file = tmp_path / "keys"
        file.write_text(f"{KEY} name=studio requests_per_minute=2\nother-key-0123456789\n")
        async with running_server(tmp_path, FakeEngine(), keys=KeyRing(file)) as server:
            yield server

    async def test_the_right_key_opens(self, server):
        assert await draw(server, api_key=KEY) == 1

    @pytest.mark.parametrize("settings", [{}, {"api_key": "wrong"}, {"api_key": KEY + "0"}])
    async def test_without_it_nothing_is_done(self, server, settings):
        with pytest.raises(UnauthenticatedError):
            await draw(server, **settings)
        async with AsyncClient(server.target, **settings) as client:
            with pytest.raises(UnauthenticatedError):
                await client.server_info()
            with pytest.raises(UnauthenticatedError):
                await client.stream("a").result()
            assert await client.health() == "SERVING"
        assert server.loop.activity().num_requests == 0

    async def test_who_has_no_key_is_not_told_what_is_wrong_with_the_request(self, server):
        async with AsyncClient(server.target) as client:
            with pytest.raises(UnauthenticatedError):
                await client.generate("a", num_inference_steps=-1)

    async def test_a_limit_is_of_one_key_and_says_when(self, server):
        for _ in range(2):
            await draw(server, api_key=KEY)
        with pytest.raises(RateLimitedError) as caught:
            await draw(server, api_key=KEY)
        assert caught.value.retry_after_s == pytest.approx(30, abs=2)
        await draw(server, api_key="other-key-0123456789")

    async def test_health_needs_no_key(self, server):
        stub = health_pb2_grpc.HealthStub(server.channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING

    @pytest.mark.parametrize("key", ["", "é", "a\nb"])
    async def test_what_is_no_key_never_leaves_the_client(self, key):
        with pytest.raises(ConfigError, match="api_key"):
            AsyncClient("localhost:1", api_key=key)


class TestTls:
    @pytest.fixture
    async def server(self, tmp_path, authority):
        tls = Tls(*write_server_pair(tmp_path, authority), None)
        async with running_server(tmp_path, FakeEngine(), tls=tls) as server:
            server.tls = tls
            yield server

    async def test_who_trusts_the_certificate_is_served(self, server, authority):
        assert await draw(server, credentials=trusting(authority)) == 1

    async def test_plain_text_and_strangers_get_nothing(self, server):
        for settings in ({}, {"credentials": trusting(trustme.CA())}):
            with pytest.raises(UnavailableError):
                await draw(server, **settings)
        assert server.loop.activity().num_requests == 0

    async def test_an_expired_certificate_is_refused_by_the_client(self, tmp_path, authority):
        past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
        tls = Tls(*write_server_pair(tmp_path, authority, not_after=past), None)
        async with running_server(tmp_path, FakeEngine(), tls=tls) as server:
            with pytest.raises(UnavailableError):
                await draw(server, credentials=trusting(authority))

    async def test_a_renewed_certificate_is_served_without_a_restart(self, server, tmp_path):
        renewed = trustme.CA()
        write_server_pair(tmp_path, renewed)
        server.tls.reload()
        assert await draw(server, credentials=trusting(renewed)) == 1
        (tmp_path / "server.pem").write_text("broken")
        server.tls.reload()
        assert await draw(server, credentials=trusting(renewed)) == 1


class TestMutualTls:
    @pytest.fixture
    async def server(self, tmp_path, authority):
        ca = tmp_path / "clients.pem"
        authority.cert_pem.write_to_path(str(ca))
        tls = Tls(*write_server_pair(tmp_path, authority), ca)
        async with running_server(tmp_path, FakeEngine(), tls=tls) as server:
            yield server

    async def test_a_client_with_a_certificate_is_served(self, server, authority):
        assert await draw(server, credentials=trusting(authority, authority.issue_cert("me@example.org"))) == 1

    async def test_one_without_a_foreign_or_an_expired_one_is_not(self, server, authority):
        past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
        for client in (None, trustme.CA().issue_cert("me@example.org"), authority.issue_cert("me@example.org", not_after=past)):
            with pytest.raises(UnavailableError):
                await draw(server, credentials=trusting(authority, client))
        assert server.loop.activity().num_requests == 0


class TestFilesThatCannotBeUsed:
    def test_they_are_named(self, tmp_path, authority):
        cert, key = write_server_pair(tmp_path, authority)
        other = tmp_path / "other.key"
        other.write_bytes(trustme.CA().issue_cert("localhost").private_key_pem.bytes())
        nothing = tmp_path / "nothing.pem"
        nothing.write_text("no certificate")
        for files, text in (
            ((tmp_path / "missing", key, None), "tls_cert: cannot read"),
            ((cert, other, None), "tls_key: .* are no pair"),
            ((nothing, key, None), "tls_key: .* are no pair"),
            ((cert, key, nothing), "tls_client_ca: .* holds no certificate"),
        ):
            with pytest.raises(ConfigError, match=text):
                Tls(*files)


async def test_an_idempotency_key_belongs_to_its_api_key(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\nother-key-0123456789\n")
    async with running_server(tmp_path, FakeEngine(), keys=KeyRing(file)) as server:
        for key in (KEY, "other-key-0123456789"):
            async with AsyncClient(server.target, api_key=key) as client:
                await client.generate("a", idempotency_key="mine")
        assert server.loop.activity().num_requests == 2
        async with AsyncClient(server.target, api_key=KEY) as client:
            with pytest.raises(InvalidRequestError, match="another request"):
                await client.generate("b", idempotency_key="mine")
