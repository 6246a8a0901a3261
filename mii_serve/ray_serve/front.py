"""The front of `mii_serve deploy` without processes of its own: its replicas are those that a list names.

Callers reach it in two ways: through a proxy, with `calls` (gRPC) and `http` (ASGI), and on its own ports, where nothing is
lost on the way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

from mii_serve.config import DeployConfig
from mii_serve.errors import ConfigError, EngineError, PermissionDeniedError
from mii_serve.gateway.app import build_app, serve_http
from mii_serve.gateway.errors import openai_problem, problem_response
from mii_serve.gateway.hosts import AllowedHosts
from mii_serve.provenance import Provenance
from mii_serve.ray_serve.proxied import FROM_ELSEWHERE, ProxiedCalls
from mii_serve.ray_serve.replica import ReplicaDescription
from mii_serve.safety.azure import open_moderator
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.front import GrpcFront, bind_tcp, bracketed, is_loopback
from mii_serve.server.keys import KeyRing
from mii_serve.server.membership import Membership
from mii_serve.server.open_files import connection_limits
from mii_serve.server.router import Router
from mii_serve.server.tls import Tls

logger = logging.getLogger(__name__)

RETRY_PORT_S = 1.0
"""An own port may be in use for a while: by the front that this one replaces."""


class FrontHost:
    """Owns dispatcher, membership and own ports. Belongs to one event loop."""

    def __init__(self, config: DeployConfig) -> None:
        self._config = config
        self._stack = contextlib.AsyncExitStack()
        self._opening: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises:
        ConfigError: a setting breaks a rule, or names a file that cannot be used.
        """
        config = self._config
        moderator = await self._stack.enter_async_context(open_moderator(config.content_safety))
        router = Router(0, patience_s=config.replica_wait_s)
        provenance = Provenance.of(config.provenance)
        self._dispatcher = Dispatcher(router, moderator=moderator, provenance=provenance)
        self._membership = Membership(self._dispatcher)
        self._keys, self._tls = KeyRing(config.api_key_file), Tls.of(config)
        self._limits = connection_limits(config.replicas)
        self._front = GrpcFront(
            self._dispatcher,
            keys=self._keys,
            tls=self._tls,
            max_connections=self._limits.grpc,
            max_connection_age_s=config.max_connection_age_s,
            served_names=config.served_model_name,
        )
        self.calls = ProxiedCalls(self._dispatcher, self._keys, self._front.health, config.host)
        hosts = AllowedHosts.of(config)
        app = build_app(
            self._dispatcher,
            self._keys,
            config.http,
            config.served_model_name,
            hosts=hosts,
            embeddings=tuple(config.embedding),
        )
        self.http: ASGIApp = LocalCallers(app) if is_loopback(config.host) else app
        await self._front.set_serving(False)
        self._opening = asyncio.create_task(self._open_ports())

    @property
    def has_broken(self) -> bool:
        return self._membership.has_broken

    async def update(self, descriptions: Iterable[ReplicaDescription], *, is_complete: bool) -> None:
        """Have the replicas that are described here, and no others if the list `is_complete`."""
        await self._membership.update([one.member() for one in descriptions], is_complete=is_complete)
        await self._front.set_serving(self._dispatcher.is_ready)

    async def until_ready(self) -> None:
        """Wait for the first replica.

        Raises:
            EngineError: there was none in `startup_timeout_s`.
        """
        try:
            async with asyncio.timeout(self._config.startup_timeout_s):
                while not self._dispatcher.is_ready:  # noqa: ASYNC110 - replicas come and go; what counts is now
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise EngineError(f"no replica was ready within {self._config.startup_timeout_s:g} s") from None

    async def close(self) -> None:
        """Finish what is running, for `drain_timeout_s` at most, and end everything."""
        await self._front.set_serving(False)
        if not await self._dispatcher.drain(self._config.drain_timeout_s):
            logger.warning("stopping with requests still running")
            self._dispatcher.stop()
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.gather(self._opening, return_exceptions=True)
        await self._front.stop(1.0)
        await self._stack.aclose()
        await self._membership.close()

    async def _open_ports(self) -> None:
        config = self._config
        self._dispatcher.grpc_port = await self._own_grpc_port()
        http = await self._own_http_port()
        logger.info("own ports: grpc=%s:%d http=%s", bracketed(config.host), self._dispatcher.grpc_port, http)

    async def _own_grpc_port(self) -> int:
        retry = _PortRetry()
        while True:
            try:
                bind_tcp("grpc_port", self._config.host, self._config.grpc_port).close()  # gRPC logs each failure of its own
                return await self._front.listen(self._config.host, self._config.grpc_port)
            except ConfigError as error:
                await retry.after(error)

    async def _own_http_port(self) -> str:
        retry, limit = _PortRetry(), self._limits.http
        while True:
            try:
                serving = serve_http(self._config, self._dispatcher, self._keys, self._tls, limit)
                return await self._stack.enter_async_context(serving)
            except ConfigError as error:
                await retry.after(error)


class _PortRetry:
    def __init__(self) -> None:
        self._is_logged = False

    async def after(self, error: ConfigError) -> None:
        if not self._is_logged:
            logger.warning("%s; tried again until it is free", error)
            self._is_logged = True
        await asyncio.sleep(RETRY_PORT_S)


class LocalCallers:
    """ASGI middleware: answers callers of a loopback address only, whatever the proxy listens on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope.get("client")
        if scope["type"] == "http" and (client is None or not is_loopback(client[0])):
            error = PermissionDeniedError(FROM_ELSEWHERE)
            await problem_response(openai_problem(error))(scope, receive, send)
        else:
            await self._app(scope, receive, send)
