"""Messages to gRPC callers, with a bound on how long a caller may take nothing in.

A caller whose window stays full is given up: the call ends CANCELLED, and where even that does not reach them, their
connection is closed, because gRPC keeps what it has taken over for as long as the connection stands.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import grpc

from mii_serve.errors import RequestCancelledError
from mii_serve.server.call import network_of

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
else:
    Context = grpc.aio.ServicerContext

logger = logging.getLogger(__name__)

WRITE_TIMEOUT_S = 60.0
"""As over HTTP: a caller who takes in nothing for so long is taken to have gone."""
ABORT_TIMEOUT_S = 5.0
"""The status that ends a call waits behind the messages that the caller does not read."""
OPEN_FILES = Path("/proc/self/fd")


class CallerTakesNothingError(RequestCancelledError):
    """The caller is still there, and their window has been full for `WRITE_TIMEOUT_S`."""


async def write(context: Context, message: Any) -> None:
    """Hand over one message.

    Raises:
        RequestCancelledError: the caller has gone, or takes nothing in.
    """
    try:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await context.write(message)
    except TimeoutError:
        raise CallerTakesNothingError("the caller takes in nothing") from None
    except grpc.aio.BaseError:  # only a call that is over cannot be written to
        raise RequestCancelledError("the caller has gone away") from None


async def end_unread(context: Context, code: grpc.StatusCode, text: str) -> None:
    """End the call of a caller who takes nothing in; if they do not take the status either, end their connection."""
    try:
        async with asyncio.timeout(ABORT_TIMEOUT_S):
            await context.abort(code, text)
    except TimeoutError:
        peer = str(context.peer())
        num_closed = await asyncio.to_thread(close_connection, peer)
        logger.warning("%s takes in nothing: %s", peer, "its connection is closed" if num_closed else "its call is given up")


def close_connection(peer: str) -> int:
    """Shut down this process's connections from a peer in gRPC's words, `ipv4:1.2.3.4:5`; how many there were.

    gRPC's server has no call for this. The files of a process are listed on Linux only; elsewhere nothing is closed.
    """
    if (wanted := _address(peer)) is None or not OPEN_FILES.is_dir():
        return 0
    num_closed = 0
    for file in OPEN_FILES.iterdir():
        with contextlib.suppress(OSError):  # it was closed meanwhile, or has no peer
            if stat.S_ISSOCK(os.fstat(int(file.name)).st_mode):
                with socket.socket(fileno=os.dup(int(file.name))) as connection:
                    if connection.family != socket.AF_UNIX and _seen_as(connection.getpeername()) == wanted:
                        connection.shutdown(socket.SHUT_RDWR)
                        num_closed += 1
    return num_closed


def address_of(peer: str) -> str:
    """The network of a peer in gRPC's words; where it has no address, the peer as it is."""
    return peer if (address := _address(peer)) is None else network_of(address[0])


def _address(peer: str) -> tuple[str, int] | None:
    kind, _, rest = unquote(peer).partition(":")
    host, _, port = rest.rpartition(":")
    return _seen_as((host.strip("[]"), int(port))) if kind in ("ipv4", "ipv6") and port.isdigit() else None


def _seen_as(address: tuple[Any, ...]) -> tuple[str, int]:
    """IPv4 reaches a socket of IPv6 as `::ffff:1.2.3.4`."""
    host = ipaddress.ip_address(str(address[0]).partition("%")[0])
    return str(getattr(host, "ipv4_mapped", None) or host), int(address[1])
