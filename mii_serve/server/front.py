"""The front's listeners: the public gRPC port with health and reflection, and, where installed, the HTTP port."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from mii_serve.errors import ConfigError
from mii_serve.proto.codec import MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES
from mii_serve.server.call import Admission
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.interceptor import CallInterceptor
from mii_serve.server.keys import KeyRing
from mii_serve.server.mii import MII_SERVICES, MiiService
from mii_serve.server.model_names import ModelNames
from mii_serve.server.oip import OIP_SERVICE, OipService
from mii_serve.server.open_files import MAX_CONNECTIONS
from mii_serve.server.service import SERVICE_NAME, FrontService
from mii_serve.server.tls import Tls

IDLE_TIMEOUT_MS = 60_000
HANDSHAKE_TIMEOUT_MS = 15_000
MAX_STREAMS = 1024
"""Calls at once over one connection; a client keeps the others back until there is room."""
_SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a second server on the same port
    # A client whose machine is gone without a word is noticed within a minute, and its slots are freed.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),  # which gRPC 1.85 waits for instead
    ("grpc.keepalive_permit_without_calls", 1),
    # Clients may ping as often as every ten seconds; gRPC's own bound, five minutes, hangs up on those behind a strict proxy.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    # Connections are few: those without a call make room for others. A client that calls again connects again by itself.
    ("grpc.max_connection_idle_ms", IDLE_TIMEOUT_MS),
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
)


class GrpcFront:
    """The public gRPC server. Listens at once; SERVING only while `set_serving` says so."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        *,
        keys: KeyRing | None = None,
        tls: Tls | None = None,
        on_terminate: Callable[[], None] | None = None,
        max_connections: int = MAX_CONNECTIONS,
        max_connection_age_s: float | None = None,
        served_names: Sequence[str] = (),
    ) -> None:
        """Health and reflection are open to all; the keys are for what costs something. Without `tls` it is plain text.

        `on_terminate` is what DeepSpeed-MII's `Terminate` does; without it, the call is refused. A connection as old as
        `max_connection_age_s` takes no new calls, and closes when its last one has ended. `served_names` are the operator's
        names for the model.
        """
        self._tls = tls
        options = [*_SERVER_OPTIONS, ("grpc.max_allowed_incoming_connections", max_connections)]
        if max_connection_age_s is not None:
            options.append(("grpc.max_connection_age_ms", round(max_connection_age_s * 1000)))
        self._server = grpc.aio.server(interceptors=(CallInterceptor(Admission(dispatcher.metrics, keys)),), options=options)
        self.health = health.aio.HealthServicer()
        add_services(self._server, dispatcher, self.health, on_terminate, served_names)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def listen(self, host: str, port: int) -> int:
        """Start and answer the port, chosen by the system when 0 was asked for.

        Raises:
            ConfigError: the address cannot be bound.
        """
        await self.set_serving(False)
        try:
            address = f"{bracketed(host)}:{port}"
            if self._tls is None:
                bound = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(address, self._tls.grpc_credentials())
        except RuntimeError as error:
            raise ConfigError("grpc_port", f"cannot listen on {bracketed(host)}:{port}; is it in use?") from error
        await self._server.start()
        return bound

    async def set_serving(self, is_serving: bool) -> None:
        state = health_pb2.HealthCheckResponse.SERVING if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", SERVICE_NAME, OIP_SERVICE, *MII_SERVICES):
            await self.health.set(name, state)

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)


def add_services(
    server: grpc.aio.Server,
    dispatcher: Dispatcher,
    health_service: health.aio.HealthServicer,
    on_terminate: Callable[[], None] | None = None,
    served_names: Sequence[str] = (),
) -> None:
    """Register what the front answers: the v1 service, MII's, the Open Inference Protocol's and health."""
    FrontService(dispatcher).add_to(server)
    server.add_generic_rpc_handlers(MiiService(dispatcher, on_terminate).handlers())
    server.add_generic_rpc_handlers((OipService(dispatcher, ModelNames(dispatcher, served_names)).handler(),))
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)


def bracketed(host: str) -> str:
    """An IPv6 address needs brackets before a port."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on this host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def bind_tcp(setting: str, host: str, port: int) -> socket.socket:
    """A bound, not yet listening, TCP socket.

    Raises:
        ConfigError: naming the setting, when the address cannot be bound.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(setting, f"cannot listen on {bracketed(host)}:{port}: {error.strerror}") from error
    return listener
