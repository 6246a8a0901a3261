"""Admission of calls, the same for gRPC and HTTP: ids, API key, share, deadline, access log, and what errors become.

An edge describes a call that came in as an `IncomingCall` and hands it to `Admission.handle` with two functions: the work to do
for it, and how its protocol refuses. The work gets a `CallContext`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from mii_serve.errors import InvalidRequestError, MiiServeError, RateLimitedError
from mii_serve.metrics import FrontMetrics
from mii_serve.proto.metadata import AUTHORIZATION_KEY as AUTHORIZATION_KEY
from mii_serve.proto.metadata import CLIENT_ID_KEY, check_client_id, check_request_id
from mii_serve.proto.metadata import IDEMPOTENCY_KEY as IDEMPOTENCY_KEY
from mii_serve.proto.metadata import MAX_ID_CHARS as MAX_ID_CHARS
from mii_serve.proto.metadata import REQUEST_ID_KEY as REQUEST_ID_KEY
from mii_serve.proto.metadata import TIMEOUT_KEY as TIMEOUT_KEY
from mii_serve.proto.metadata import check_timeout_s as check_timeout_s
from mii_serve.server.access_log import AccessLog, CallLog, is_work
from mii_serve.server.keys import KeyRing

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallContext:
    """Everything about an admitted call but what it asks for.

    `request_id` is for logs and answers; several calls may have the same. `client` is whose share of a busy server the call
    takes, as `Request.client` is read. `deadline` is on `time.monotonic`'s clock, None where there is none. `key_name` is the
    API key it came with, None where the server requires none. `part` tells the requests of one call apart, for those calls
    that make several.
    """

    request_id: str
    client: str
    deadline: float | None = None
    key_name: str | None = None
    idempotency_key: str | None = None
    part: int | None = None
    log: CallLog = field(default_factory=CallLog)
    started_at: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float | None:
        """Seconds until the deadline; negative after it."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the call came in."""
        return time.monotonic() - self.started_at

    def for_part(self, part: int, separator: str = ".") -> CallContext:
        """The context of one of several requests of the call, which the log tells apart by the request id's ending."""
        return replace(self, request_id=f"{self.request_id}{separator}{part}", part=part)


@dataclass(slots=True, kw_only=True)
class IncomingCall:
    """A call that has not been admitted yet.

    `method` is "/package.Service/Method" or "VERB /route". `headers` have lower-case names. `address` is the caller's network
    (`network_of`). `timeout_s` is what the caller's protocol says; None for no deadline. `is_work` overrides whether the call
    counts against a key's limits. `problem` is what is wrong with its headers, and refuses it. The request id can be used at
    once, even where the caller's own is refused.
    """

    method: str
    headers: Mapping[str, str]
    address: str
    timeout_s: float | None = None
    idempotency_key: str | None = None
    is_work: bool | None = None
    problem: MiiServeError | None = None
    log: CallLog = field(default_factory=CallLog)
    request_id: str = field(init=False)

    def __post_init__(self) -> None:
        asked = self.headers.get(REQUEST_ID_KEY)
        self.request_id = str(uuid.uuid4())
        if asked is not None:
            try:
                self.request_id = check_request_id(asked)
            except InvalidRequestError as error:
                self.problem = self.problem or error


Work = Callable[[CallContext], Awaitable[None]]
Refuse = Callable[[MiiServeError], Awaitable[None]]

current_call: ContextVar[CallContext] = ContextVar("current_call")
"""The call that is being answered, for code that its protocol's library calls."""


class Admission:
    """Admits calls, and sees to it that each has an end that is logged once."""

    def __init__(self, metrics: FrontMetrics, keys: KeyRing | None = None) -> None:
        """Without `keys`, everybody may call."""
        self._access_log = AccessLog(metrics)
        self._keys = keys or KeyRing()

    async def handle(self, call: IncomingCall, work: Work, refuse: Refuse) -> None:
        """Admit the call, await the `work` for it, and `refuse` it with whatever is raised on the way.

        A `MiiServeError` is refused as it is; a cancellation is passed on; anything else is a defect: the traceback goes to the
        log, and the caller gets an error with the request id. What `refuse` returns or raises is final.
        """
        started_at, code = time.monotonic(), "CANCELLED"
        self._access_log.open(call.method, call.headers, call.log)
        try:
            if call.problem is not None:
                raise call.problem
            counts = is_work(call.method) if call.is_work is None else call.is_work
            with self._keys.admitted(call.headers.get(AUTHORIZATION_KEY), is_work=counts) as key_name:
                call.log.add_key(key_name)
                context = CallContext(
                    request_id=call.request_id,
                    client=_client_of(key_name, check_client_id(call.headers.get(CLIENT_ID_KEY)), call.address),
                    deadline=None if call.timeout_s is None else started_at + call.timeout_s,
                    key_name=key_name,
                    idempotency_key=call.idempotency_key,
                    log=call.log,
                    started_at=started_at,
                )
                current_call.set(context)
                await work(context)
            code = "OK"
        except MiiServeError as error:
            code = error.grpc_code
            if isinstance(error, RateLimitedError):
                call.log.add_key(error.key_name)
            await refuse(error)
        except asyncio.CancelledError:
            raise
        except Exception:
            code = "INTERNAL"
            logger.exception("unexpected error, request_id=%s", call.request_id)
            await refuse(MiiServeError(f"internal error, request id {call.request_id}"))
        finally:
            self._access_log.close(call.method, call.request_id, code, time.monotonic() - started_at, call.log)


def _client_of(key_name: str | None, client_id: str | None, address: str) -> str:
    """Whose share a request takes, as `Request.client` is read: the API key's; where the server requires none, the address's,
    and within it a share for each client id. Client ids alone would give a caller that makes up new ones a share for each.
    """
    if key_name is not None:
        return f"key {key_name}".encode("ascii", "backslashreplace").decode()
    return f"{address}/{client_id}" if client_id else address


def network_of(host: str) -> str:
    """The part of an address that identifies a caller: of IPv6 the first 64 bits, because one customer has all below them."""
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.version == 4 or ip.is_loopback:
        return str(ip)
    return str(ipaddress.ip_network((int(ip) >> 64 << 64, 64)).network_address)
