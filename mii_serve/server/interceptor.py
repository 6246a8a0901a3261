"""Every gRPC call on its way in: admitted like an HTTP call, and the one place where errors become gRPC statuses."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc

from mii_serve.errors import MiiServeError, RequestCancelledError
from mii_serve.proto.codec import well_formed
from mii_serve.proto.metadata import IDEMPOTENCY_KEY, REQUEST_ID_KEY
from mii_serve.proto.mii_codec import MII_PACKAGES
from mii_serve.proto.status import encode_error
from mii_serve.server.bounded_write import CallerTakesNothingError, Context, address_of, end_unread, write
from mii_serve.server.call import Admission, CallContext, IncomingCall
from mii_serve.server.oip import OIP_PROBES, OIP_SERVICE

_OWN = ("/mii_serve.", *(f"/{package}.ModelResponse/" for package in MII_PACKAGES), f"/{OIP_SERVICE}/")

if TYPE_CHECKING:  # grpc's classes are generic in their type stubs only
    Handler = grpc.RpcMethodHandler[Any, Any] | None
else:
    Handler = grpc.RpcMethodHandler


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Admits the calls of our services, MII's and the Open Inference Protocol's; probes answer for themselves."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]], details: grpc.HandlerCallDetails
    ) -> Handler:
        handler = await continuation(details)
        if handler is None or not details.method.startswith(_OWN) or details.method in OIP_PROBES:
            return handler
        headers = {key: value for key, value in details.invocation_metadata or () if isinstance(value, str)}
        parse = well_formed(handler.request_deserializer or bytes)
        answer: Any = _stream if handler.response_streaming else _unary
        method: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary

        async def call(wire: bytes, context: Context) -> None:
            incoming = IncomingCall(
                method=details.method,
                headers=headers,
                address=address_of(str(context.peer())),
                timeout_s=context.time_remaining(),
                idempotency_key=headers.get(IDEMPOTENCY_KEY),
            )

            async def work(_: CallContext) -> None:
                await _send_id(context, incoming.request_id)
                await answer(method, parse(wire), context)

            async def refuse(error: MiiServeError) -> None:
                if isinstance(error, CallerTakesNothingError):
                    await end_unread(context, grpc.StatusCode.CANCELLED, str(error))
                    return
                with contextlib.suppress(RequestCancelledError):
                    await _send_id(context, incoming.request_id)
                await context.abort(*encode_error(error))

            await self._admission.handle(incoming, work, refuse)

        # One answer is a stream of one on the wire too, and only what a handler writes by itself can be given up.
        return grpc.unary_stream_rpc_method_handler(call, None, handler.response_serializer)


async def _send_id(context: Context, request_id: str) -> None:
    """Send the initial metadata, unless it has been sent."""
    try:
        await context.send_initial_metadata(((REQUEST_ID_KEY, request_id),))
    except grpc.aio.UsageError:
        pass  # it has been sent
    except grpc.aio.BaseError:
        raise RequestCancelledError("the caller has gone away") from None


async def _unary(method: Any, request: Any, context: Context) -> None:
    await write(context, await method(request, context))


async def _stream(method: Any, request: Any, context: Context) -> None:
    # Not a generator: a call cancelled in the middle of a write closes the messages here, and not when the collector comes.
    async with contextlib.aclosing(method(request, context)) as messages:
        async for message in messages:
            await write(context, message)
