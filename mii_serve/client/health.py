"""What `grpc.health.v1` says of a server, and how long to wait until it is ready. No I/O: the clients ask."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2

from mii_serve.client.calls import typed_error
from mii_serve.errors import DeadlineExceededError, UnavailableError

RETRY_PAUSE_S = 0.2
"""Between two health checks of a server that is not ready yet."""

HEALTH_OF_ALL = health_pb2.HealthCheckRequest(service="")


def health_name(answer: health_pb2.HealthCheckResponse) -> str:
    """The status's name; UNKNOWN for one that only a newer server knows."""
    names: dict[int, str] = {number: name for name, number in health_pb2.HealthCheckResponse.ServingStatus.items()}
    return names.get(answer.status, "UNKNOWN")


class Readiness:
    """What `wait_ready` has seen so far, and what to say if its time runs out."""

    def __init__(self, target: str, timeout: float) -> None:
        self._target = target
        self._timeout = timeout
        self._last = ""

    def is_ready(self, answer: health_pb2.HealthCheckResponse) -> bool:
        self._last = f"its health is {health_name(answer)}"
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def note_failure(self, error: grpc.RpcError) -> None:
        """Remember a health check that got no answer.

        Raises:
            MiiServeError: the failure is another one, and waiting does not help.
        """
        failure = typed_error(error, self._target)
        if isinstance(failure, DeadlineExceededError):
            return
        if not isinstance(failure, UnavailableError):
            raise failure from error
        self._last = str(failure)

    def timeout_error(self) -> UnavailableError:
        reason = self._last or "no answer"
        return UnavailableError(f"{self._target} is not ready after {self._timeout:g} s: {reason}")
