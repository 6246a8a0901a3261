"""A replica in the process that a cluster manager gave it, and the address at which fronts reach it.

Its port takes work from callers with its token, over TLS with a certificate of its own. Both are made at the start, and the
description has them, for those to whom it is passed on.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import logging
import secrets
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mii_serve.config import DeployConfig
from mii_serve.engine import Engine
from mii_serve.errors import EngineError
from mii_serve.provenance import Provenance
from mii_serve.replica.local import build_loop, build_warm_engine
from mii_serve.replica.service import ListenOn, replica_server
from mii_serve.server.front import bracketed
from mii_serve.server.membership import Member
from mii_serve.server.replica_client import ReplicaAddress
from mii_serve.server.watch import Progress

logger = logging.getLogger(__name__)

VALID_FOR = datetime.timedelta(days=3650)
"""A certificate is used for one life of its replica."""
CLOCK_SKEW = datetime.timedelta(days=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaDescription:
    """What a front has to know to reach a replica. `failure` is why it makes no more pictures."""

    name: str
    target: str
    certificate: bytes
    token: str = field(repr=False)
    failure: str | None = None

    def member(self) -> Member:
        credentials = grpc.ssl_channel_credentials(self.certificate)
        address = ReplicaAddress(target=self.target, credentials=credentials, token=self.token)
        return Member(name=self.name, address=address, failure=self.failure)


class ReplicaHost:
    """Owns the engine, its thread, its loop and the port. Belongs to one event loop."""

    def __init__(
        self, config: DeployConfig, address: str, *, build: Callable[[DeployConfig], Engine] = build_warm_engine
    ) -> None:
        """`address` is the IP address to listen on."""
        self._config = config
        self._ip = address
        self._build = build
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._progress = Progress()
        self._description: ReplicaDescription | None = None

    async def start(self) -> None:
        """Make the engine's warm-up picture, then listen.

        Raises:
            ConfigError, ModelError, EngineError: as `mii_serve deploy` would.
        """
        config = self._config
        provenance = Provenance.of(config.provenance)
        engine = await asyncio.get_running_loop().run_in_executor(self._thread, self._build, config)
        self._loop = build_loop(config, engine, self._thread, provenance)
        self._turns = asyncio.create_task(self._loop.run())
        key, certificate = self_signed(self._ip)
        token, host = secrets.token_urlsafe(32), bracketed(self._ip)
        credentials = grpc.ssl_server_credentials([(key, certificate)])
        listen_on = ListenOn(address=f"{host}:0", credentials=credentials, token=token)
        self._server, port = replica_server(self._loop, config.deployment_name, listen_on)
        await self._server.start()
        self._description = ReplicaDescription(
            name=uuid.uuid4().hex, target=f"{host}:{port}", certificate=certificate, token=token
        )
        logger.info("a replica is ready on %s:%d", host, port)

    @property
    def description(self) -> ReplicaDescription:
        assert self._description is not None
        return self._description

    @property
    def queued_work_s(self) -> float:
        return self._loop.queued_work_s

    def describe(self) -> ReplicaDescription:
        """The description as it is now."""
        if self.description.failure is None and self._turns.done():
            self._description = ReplicaDescription(
                name=self.description.name,
                target=self.description.target,
                certificate=self.description.certificate,
                token=self.description.token,
                failure=f"its engine failed: {self._turns.exception()}",
            )
        return self.description

    def check(self) -> None:
        """Raises:
        EngineError: it makes no pictures any more, and only another life helps.
        """
        if (failure := self.describe().failure) is not None:
            raise EngineError(failure)
        self._progress.note(self._loop.activity())
        if self._progress.stuck_s > self._config.hang_timeout_s:
            raise EngineError(f"images are in work and no step was completed for {self._progress.stuck_s:.0f} s")

    async def stop(self, grace_s: float) -> None:
        """Wait until every front has done with it and gone, for `grace_s` at most, and free the device."""
        await self._server.stop(grace_s)
        self._turns.cancel()
        with contextlib.suppress(asyncio.CancelledError, EngineError):
            await self._turns
        await asyncio.get_running_loop().run_in_executor(self._thread, self._loop.engine.close)
        self._thread.shutdown()


def self_signed(address: str) -> tuple[bytes, bytes]:
    """A private key and a certificate for this IP address, both as PEM."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mii_serve replica")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + VALID_FOR)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return private, certificate.public_bytes(serialization.Encoding.PEM)
