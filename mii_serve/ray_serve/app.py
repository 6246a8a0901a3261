"""The application for `serve run mii_serve.ray_serve.app:build`: a Front, which Ray's proxies send calls to, and Replicas.

A front asks Serve for the replicas it runs, and sends work to them itself, over one connection each; Ray carries no request of
its own to a replica. So work is routed by the front's own account of it, and is made again elsewhere when a replica is lost. A
replica that Serve wants to end is no longer in the list; it ends when the fronts have done with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from mii_serve.logs import configure_logs
from mii_serve.ray_serve.arguments import Scale, read_arguments, settings_of
from mii_serve.ray_serve.front import FrontHost
from mii_serve.ray_serve.proxied import IS_STREAM, ProxiedCalls, method_of
from mii_serve.ray_serve.replica import ReplicaDescription, ReplicaHost
from mii_serve.ray_serve.scaling import METRIC, QueuedWork
from mii_serve.threads import wait_briefly
from mii_serve.tracing import start_tracing

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from mii_serve.config import DeployConfig

logger = logging.getLogger(__name__)

LIST_EVERY_S = 1.0
"""How old a front's list of replicas may be; after a connection broke, a new one is asked for at once."""
LOOK_EVERY_S = 0.1
LIST_TIMEOUT_S = 5.0
SHUTDOWN_MARGIN_S = 15.0
"""Beyond the drain, before Ray kills a process that it is ending."""
MANY = 100_000
"""Calls at once: who has to wait is for our own admission to say, which knows how much work each of them is."""

LOOK_BACK_S = 15.0
"""The time over which Ray takes the mean of the accepted work. Replicas report it every ten seconds, or as often as is set in
RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S."""
QUIET = {"enable_access_log": False}
"""Our own access log has a line for each call."""


class Replica:
    """One engine. Its ranks are processes that it starts itself, so one placement group has all of their devices."""

    async def __init__(self, settings: Mapping[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        wait_briefly()
        self._config = settings_of(settings)
        _start_logs(self._config)
        self._host = ReplicaHost(self._config, ray.util.get_node_ip_address())
        await self._host.start()

    async def describe(self) -> ReplicaDescription:
        return self._host.describe()

    def check_health(self) -> None:
        self._host.check()

    def record_autoscaling_stats(self) -> dict[str, float]:
        return {METRIC: self._host.queued_work_s}

    async def __del__(self) -> None:
        if hasattr(self, "_host"):
            await self._host.stop(self._config.drain_timeout_s)


@serve.ingress()
class Front:
    """Answers what Ray's proxies send it: gRPC by the methods that are added below, HTTP by the application it builds."""

    async def __init__(self, settings: Mapping[str, Any], replicas: Any) -> None:  # type: ignore[misc]  # Serve awaits it
        """`replicas` is Ray's handle of the other deployment."""
        config = settings_of(settings)
        _start_logs(config)
        if config.api_key_file is None:
            logger.warning("Ray's gRPC proxy listens on all addresses, and there is no api_key_file; %s", _who_may_call(config))
        self._replicas = replicas
        self._host = FrontHost(config)
        await self._host.start()
        self._following = asyncio.create_task(self._follow())
        await self._host.until_ready()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._host.http

    @property
    def calls(self) -> ProxiedCalls:
        return self._host.calls

    async def _follow(self) -> None:
        """Keep the front's replicas those that Serve runs."""
        while True:
            try:
                await self._look()
            except Exception:  # without a list, the front goes on with what it has
                logger.exception("the replicas could not be listed")
            for _ in range(round(LIST_EVERY_S / LOOK_EVERY_S)):
                await asyncio.sleep(LOOK_EVERY_S)
                if self._host.has_broken:
                    break

    async def _look(self) -> None:
        answers: list[Any] = []
        try:
            with contextlib.suppress(DeploymentUnavailableError):  # there are none
                asked = self._replicas.broadcast("describe")
                answers = await asked.results_async(timeout_s=LIST_TIMEOUT_S, return_exceptions=True)
        except TimeoutError:
            logger.warning("not all replicas say within %g s where they are", LIST_TIMEOUT_S)
            return
        described = [answer for answer in answers if isinstance(answer, ReplicaDescription)]
        others = [answer for answer in answers if not isinstance(answer, ReplicaDescription | RayActorError)]
        if others:
            logger.warning("a replica does not say where it is: %r", others[0])
        await self._host.update(described, is_complete=not others)

    async def __del__(self) -> None:
        if hasattr(self, "_following"):
            await self._host.close()
            self._following.cancel()


for _name in IS_STREAM:
    setattr(Front, _name, method_of(_name))


def build(arguments: dict[str, Any]) -> Any:
    """The application with these arguments (`arguments.py`).

    Raises:
        ConfigError: naming the argument and the rule.
    """
    scale, settings, config = read_arguments(arguments)
    replica = serve.deployment(Replica, name="Replica", **replica_options(scale, config)).bind(settings)
    return serve.deployment(Front, name="Front", **front_options(config)).bind(settings, replica)


def replica_options(scale: Scale, config: DeployConfig) -> dict[str, Any]:
    """How Ray runs the replicas. Ray's count of their requests says nothing, because requests do not go through Ray."""
    ranks = config.tensor_parallel
    resources = {"num_cpus": scale.num_cpus * ranks, "num_gpus": scale.num_gpus * ranks}
    threads = {"OMP_NUM_THREADS": str(max(1, int(scale.num_cpus)))}  # of each rank
    options: dict[str, Any] = {
        "ray_actor_options": {**resources, "runtime_env": {"env_vars": threads}},
        "max_ongoing_requests": MANY,
        "logging_config": QUIET,
        "health_check_period_s": 5,
        "health_check_timeout_s": 10,
        "graceful_shutdown_wait_loop_s": 2 * LIST_EVERY_S,  # then the fronts have another list
        "graceful_shutdown_timeout_s": config.drain_timeout_s + SHUTDOWN_MARGIN_S,
    }
    if ranks > 1:
        bundle = {"CPU": resources["num_cpus"], "GPU": resources["num_gpus"]}
        options["placement_group_bundles"] = [{name: amount for name, amount in bundle.items() if amount}]
        options["placement_group_strategy"] = "STRICT_PACK"
    if scale.max_replicas is None:
        return {**options, "num_replicas": config.replicas}
    policy = {
        "policy_function": f"{QueuedWork.__module__}:{QueuedWork.__name__}",
        "policy_kwargs": {"target_s": scale.target_queued_s},
    }
    bounds = {"min_replicas": config.replicas, "initial_replicas": config.replicas, "max_replicas": scale.max_replicas}
    delays = {"upscale_delay_s": scale.upscale_delay_s, "downscale_delay_s": scale.downscale_delay_s}
    return {**options, "autoscaling_config": {**bounds, **delays, "policy": policy, "look_back_period_s": LOOK_BACK_S}}


def front_options(config: DeployConfig) -> dict[str, Any]:
    """How Ray runs the front: one, because shares, limits of API keys and idempotency keys are kept in it."""
    return {
        "num_replicas": 1,
        "ray_actor_options": {"num_cpus": 1},
        "max_ongoing_requests": MANY,
        "logging_config": QUIET,
        "max_surge_percent": 100,  # at a redeploy the new one starts first: callers notice nothing
        "graceful_shutdown_timeout_s": 2 * config.drain_timeout_s + SHUTDOWN_MARGIN_S,
    }


def _start_logs(config: DeployConfig) -> None:
    configure_logs(config.log_level, config.log_format)
    start_tracing()


def _who_may_call(config: DeployConfig) -> str:
    from mii_serve.server.front import is_loopback

    return "the setting host admits this machine only" if is_loopback(config.host) else "everybody may make pictures"
