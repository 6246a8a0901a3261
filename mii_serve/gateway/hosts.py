"""Which host names this server answers to over HTTP, and which sites' pages may use it.

A page of any site can let its own name resolve to 127.0.0.1 and then talk to a server there as if it were the site's own (DNS
rebinding). What such a page cannot do is change the `Host` header, which names the site; nor, on its POSTs, `Origin`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from mii_serve.config import DeployConfig
from mii_serve.errors import MiiServeError
from mii_serve.gateway.cors import Origins
from mii_serve.gateway.errors import OtherHostError, OtherOriginError, openai_problem, problem_response
from mii_serve.gateway.middleware import Endpoint
from mii_serve.server.front import is_loopback

ALL = "*"
LOOPBACK_NAMES = ("localhost", "*.localhost")
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
MAX_HOST_CHARS = 300
"""No name of the DNS is as long, port and brackets included."""
SHOWN_CHARS = 80
NO_REQUEST_ID = "-"
"""In errors of requests that are refused before they have one."""


class AllowedHosts:
    """The hosts that may be named. `allows` is about what stands in a header, port and all.

    `origins` are those of other sites whose pages may use the server.
    """

    def __init__(
        self, names: Iterable[str] = (ALL,), *, allow_loopback_addresses: bool = False, origins: Origins | None = None
    ) -> None:
        self._names = frozenset(_plain(name) for name in names)
        self._allow_loopback_addresses = allow_loopback_addresses
        self._origins = origins or Origins()

    @classmethod
    def of(cls, config: DeployConfig) -> AllowedHosts:
        """What the setting says. Without it, a server on a loopback address answers to this machine's own names only, and any
        other to every name: probes and load balancers come by addresses and names that it does not know.
        """
        origins = Origins(config.http.cors_origins)
        if config.http.allowed_hosts is not None:
            return cls((*LOOPBACK_NAMES, *config.http.allowed_hosts), allow_loopback_addresses=True, origins=origins)
        if not is_loopback(config.host):
            return cls()
        return cls((*LOOPBACK_NAMES, config.host), allow_loopback_addresses=True, origins=origins)

    @property
    def allow_all(self) -> bool:
        return ALL in self._names

    def allows(self, header: str) -> bool:
        if self.allow_all:
            return True
        host = _without_port(header) if len(header) <= MAX_HOST_CHARS else None
        if host is None:
            return False
        if self._allow_loopback_addresses and _is_loopback_address(host):
            return True
        parents = (host[i:] for i, char in enumerate(host) if char == ".")
        return host in self._names or any(f"*{parent}" in self._names for parent in parents)

    def allows_origin(self, header: str) -> bool:
        """`header` is a page's origin, `https://name:port`, or `null` for one without a name."""
        try:
            return (
                self.allow_all
                or self._origins.allows(header)
                or (len(header) <= 2 * MAX_HOST_CHARS and self.allows(urlsplit(header).netloc))
            )
        except ValueError:  # brackets that hold no address
            return False


class HostCheck:
    """ASGI middleware: refuses what is meant for another host, or comes from another site's page, before anything is read."""

    def __init__(self, app: ASGIApp, hosts: AllowedHosts) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._problem(scope)) is not None:
            await refusal_for(scope, error)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _problem(self, scope: Scope) -> MiiServeError | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host"), headers.get("origin")
        if host is not None and not self._hosts.allows(host):  # HTTP/1.0, which has none, is spoken by no browser
            rule = "must name this server; http.allowed_hosts says which names it has"
            return OtherHostError("host", rule, repr(host[:SHOWN_CHARS]))
        if origin is not None and scope["method"] not in _SAFE_METHODS and not self._hosts.allows_origin(origin):
            rule = "must be a page of a host in http.allowed_hosts, or in http.cors_origins"
            return OtherOriginError("origin", rule, repr(origin[:SHOWN_CHARS]))
        return None


def refusal_for(scope: Scope, error: MiiServeError) -> Response:
    """In the dialect of the route's callers."""
    for route in scope["app"].routes:
        if route.matches(scope)[0] is Match.FULL and isinstance(route.endpoint, Endpoint):
            return route.endpoint.dialect.refusal(error, NO_REQUEST_ID)
    return problem_response(openai_problem(error))


def _without_port(header: str) -> str | None:
    """The host in lower case, an IPv6 address without brackets; None for what is none."""
    if header.startswith("["):
        host, bracket, port = header[1:].partition("]")
        is_whole = bracket == "]" and (not port or port.startswith(":"))
        return host.lower() if is_whole and _is_port(port[1:]) else None
    host, _, port = header.partition(":")
    return _plain(host) if host and _is_port(port) else None


def _is_port(text: str) -> bool:
    return not text or (text.isascii() and text.isdigit() and len(text) <= 5)


def _plain(name: str) -> str:
    return name.strip("[]").removesuffix(".").lower()


def _is_loopback_address(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
