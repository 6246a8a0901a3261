"""One deployment from start to end: listen, start the replica, say when it is ready, serve, drain, exit."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

import grpc

from mii_serve.config import DeployConfig
from mii_serve.logs import finish_logs
from mii_serve.provenance import Provenance
from mii_serve.safety.azure import open_moderator
from mii_serve.safety.moderation import Moderator
from mii_serve.server.dispatcher import Dispatcher
from mii_serve.server.front import GrpcFront, bracketed, is_loopback
from mii_serve.server.keys import KeyRing
from mii_serve.server.open_files import connection_limits
from mii_serve.server.placement import place
from mii_serve.server.router import Router
from mii_serve.server.spare import Spares
from mii_serve.server.supervisor import ReplicaSupervisor
from mii_serve.server.tls import Tls
from mii_serve.types import ServerInfo

logger = logging.getLogger(__name__)

TELL_CALLERS_S = 0.4
"""After a second signal: for callers to get their error, and for killed replicas to be gone."""
FLUSH_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Where a deployment listens, as HOST:PORT, and what it serves. `http` is "off" without the extra of that name."""

    grpc: str
    http: str
    info: ServerInfo


class _StopRequests:
    """SIGTERM and SIGINT: the first asks for a drain, the second for an end at once."""

    def __init__(self) -> None:
        self.drain, self.at_once = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_stop)

    def _on_stop(self) -> None:
        (self.at_once if self.drain.is_set() else self.drain).set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Callbacks of a deployment that starts, and the server of HTTP beside it.

    `on_listening` gets the gRPC address as soon as it is open; `on_ready` is called once, after the warm-up picture;
    `open_http` serves, over so many connections at most, while its context is open, and gives its HOST:PORT, or None where HTTP
    is not installed.
    """

    on_listening: Callable[[str], None]
    on_ready: Callable[[Ready], None]
    open_http: Callable[[DeployConfig, Dispatcher, KeyRing, Tls | None, int], AbstractAsyncContextManager[str | None]]


def run_deployment(config: DeployConfig, listener: Listener) -> int:
    """Serve until a signal stops it; returns the process's exit code.

    Raises:
        ConfigError, ModelError, EngineError: the deployment did not start.
    """
    return asyncio.run(_deploy(config, listener))


async def _deploy(config: DeployConfig, listener: Listener) -> int:
    async with open_moderator(config.content_safety) as moderator:
        return await _serve(config, listener, moderator)


async def _serve(config: DeployConfig, listener: Listener, moderator: Moderator | None) -> int:
    environments, most = place(config), connection_limits(config.replicas)
    stop = _StopRequests()
    provenance = Provenance.of(config.provenance)
    router = Router(config.replicas, patience_s=config.replica_wait_s)
    dispatcher = Dispatcher(router, moderator=moderator, provenance=provenance)
    tls, keys = Tls.of(config), KeyRing(config.api_key_file)
    rings = [keys]
    if config.admin_key_file is not None:
        dispatcher.admin_keys = KeyRing(config.admin_key_file, setting="admin_key_file")
        rings.append(dispatcher.admin_keys)
    on_terminate = stop.drain.set if config.enable_mii_terminate else None
    front = GrpcFront(
        dispatcher,
        keys=keys,
        tls=tls,
        on_terminate=on_terminate,
        max_connections=most.grpc,
        max_connection_age_s=config.max_connection_age_s,
        served_names=config.served_model_name,
    )
    if not is_loopback(config.host):
        _warn_of_what_is_open(config)
    async with listener.open_http(config, dispatcher, keys, tls, most.http) as http:
        dispatcher.grpc_port = await front.listen(config.host, config.grpc_port)
        address = f"{bracketed(config.host)}:{dispatcher.grpc_port}"
        listener.on_listening(address)

        def on_first_ready(info: ServerInfo) -> None:
            listener.on_ready(Ready(grpc=address, http=http or "off", info=info))

        changed = asyncio.Event()
        spares = Spares(is_on=config.enable_spare_process)
        supervisors = [
            ReplicaSupervisor(config, index=index, environment=environment, spares=spares)
            for index, environment in enumerate(environments)
        ]
        key_files = config.api_key_file, config.admin_key_file
        if any(key_files) or tls is not None or provenance.is_signing:
            _reload_on_sighup(rings, tls, provenance, supervisors)
        running = [asyncio.create_task(supervisor.run(changed)) for supervisor in supervisors]
        following = asyncio.create_task(_follow(supervisors, changed, dispatcher, front, on_first_ready))
        draining = asyncio.create_task(stop.drain.wait())
        hurrying = asyncio.create_task(_end_at_once(stop, dispatcher, dict(zip(supervisors, running, strict=True))))
        try:
            await asyncio.wait((*running, following, draining), return_when=asyncio.FIRST_COMPLETED)
            for ended in (*running, following):
                if ended.done() and not ended.cancelled():
                    ended.result()  # raises why the deployment cannot go on
            await _drain(config, dispatcher, front)
        finally:
            for task in (*running, following, draining):
                task.cancel()
            await asyncio.gather(*running, following, draining, return_exceptions=True)
            await spares.close()
            await front.stop(0)
            for supervisor in supervisors:
                await dispatcher.detach(supervisor.index)
    hurrying.cancel()
    return 0


def _reload_on_sighup(
    rings: Sequence[KeyRing], tls: Tls | None, provenance: Provenance, supervisors: Sequence[ReplicaSupervisor]
) -> None:
    loop = asyncio.get_running_loop()

    def reload() -> None:
        for keys in rings:
            keys.reload()
        if tls is not None:
            tls.reload()
        if provenance.is_signing:
            loop.run_in_executor(None, provenance.reload)
            for supervisor in supervisors:
                supervisor.reload()

    loop.add_signal_handler(signal.SIGHUP, reload)


def _warn_of_what_is_open(config: DeployConfig) -> None:
    if config.api_key_file is None and config.tls_client_ca is None:
        logger.warning("everybody who reaches %s may make pictures; see --api-key-file and --tls-client-ca", config.host)
    if config.enable_mii_terminate and config.api_key_file is None and config.tls_client_ca is None:
        logger.warning("everybody who reaches %s may stop this server; see enable_mii_terminate", config.host)
    if config.tls_cert is None:
        logger.warning("prompts, pictures and API keys reach %s in plain text; see --tls-cert", config.host)


async def _follow(
    supervisors: Sequence[ReplicaSupervisor],
    changed: asyncio.Event,
    dispatcher: Dispatcher,
    front: GrpcFront,
    on_first_ready: Callable[[ServerInfo], None],
) -> None:
    """Attach to each replica whenever it is ready, and let health say whether there is one. Ready means all of them once."""
    attached: dict[int, int] = {}  # index → which life of the replica
    info: ServerInfo | None = None
    has_been_ready = False
    while True:
        await changed.wait()
        changed.clear()
        for supervisor in supervisors:
            index, life = supervisor.index, supervisor.num_restarts
            if attached.get(index) is not None and (not supervisor.is_ready or attached[index] != life):
                del attached[index]
                await dispatcher.detach(index, supervisor.loss)
            if supervisor.is_ready and index not in attached:
                try:
                    info = await dispatcher.attach(supervisor.address, index, num_restarts=life)
                    attached[index] = life
                except grpc.aio.AioRpcError as error:  # it died just now, and the supervisor will say so; or it is tried again
                    logger.warning("replica %d does not answer: %s", index, error.code().name)
        has_all = len(attached) == len(supervisors)
        await front.set_serving(bool(attached) and (has_been_ready or has_all))
        if has_all and info is not None and not has_been_ready:
            has_been_ready = True
            on_first_ready(info)
        if has_all:
            for supervisor in supervisors:
                supervisor.prepare_spare()


async def _drain(config: DeployConfig, dispatcher: Dispatcher, front: GrpcFront) -> None:
    logger.info("draining: no new requests, and the end when the running ones are done; a second signal ends it at once")
    await front.set_serving(False)
    if not await dispatcher.drain(config.drain_timeout_s):
        logger.warning("stopping with requests still running")
        dispatcher.stop()
    await front.stop(1.0)


async def _end_at_once(
    stop: _StopRequests, dispatcher: Dispatcher, running: Mapping[ReplicaSupervisor, asyncio.Task[None]]
) -> None:
    """At a second signal: tell the callers, kill the replicas, and end this process from here.

    What else it may be waiting for (a slow reader, a replica that does not end, a thread) is not waited for.
    """
    await stop.at_once.wait()
    logger.warning("stopping at once: a second signal came")
    dispatcher.stop()
    for task in running.values():
        task.cancel()  # no replica is started again
    killing = [asyncio.create_task(supervisor.kill()) for supervisor in running]
    await dispatcher.drain(TELL_CALLERS_S)
    await asyncio.wait(killing, timeout=TELL_CALLERS_S)
    await asyncio.sleep(FLUSH_S)  # their last messages are on their way
    finish_logs(FLUSH_S)
    os._exit(0)
