"""Serves the typed methods of a service: their requests, errors and deadlines, over gRPC, and over REST by Envoy.

Envoy transcodes a REST call to gRPC, and passes on a response that is none: so the errors of such a call are JSON.
"""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import orjson
import structlog
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2

from atserving.errors import DeadlineExceeded, Internal, InvalidArgument, ServingError, Unauthenticated
from atserving.grpc_call import Call, GrpcError, deadline_of
from atserving.grpc_server import Server
from atserving.grpc_status import grpc_status
from atserving.grpc_stream import HttpError
from atserving.http2_stream import Headers
from atserving.rest_paths import ORIGINAL_PATH, RestPaths

log = structlog.get_logger()

REST_HEADER = "x-atserving-rest"
"""Envoy sets it on the calls that it transcodes, and removes it from all others."""

_JSON = ("content-type", "application/json")
# Clients of gRPC take 8 KiB of headers.
_MOST_FIELDS, _MOST_CHARS = 10, 120
# Of a stream, this many messages wait for their reader.
_MOST_UNSENT = 1
# Before a stream sends a message, its caller is checked again, if that was so long ago: rights end.
_AUTHORIZED_S = 1.0


@dataclass(frozen=True)
class Context:
    """What is known of a call beside its request."""

    headers: Headers
    deadline: float | None = None
    """The caller's deadline in seconds of time.monotonic()."""
    caller: str = ""
    """The name of the caller, if it is proven."""
    peer_names: tuple[str, ...] = ()
    """The URIs in the SAN of the peer's verified certificate; none without TLS."""
    peer_address: str = ""
    """The address of the peer."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Notes on the call for its end, by who authorizes it and by the servicer."""

    def header(self, name: str) -> str | None:
        """Return a header, or None if it is missing or no ASCII."""
        value = self.headers.get(name)
        return value.decode() if value is not None and value.isascii() else None


Translate = Callable[[Exception], ServingError | None]
"""Returns what an exception means to a caller; None: it is unexpected."""


Authorize = Callable[[str, Message, Context], str]
"""Returns who makes a call of a method, empty if nobody knows. Raises ServingErrors for what they may not do."""


Observe = Callable[[str, int, float | None], None]
"""Takes each call that has ended: the method, the HTTP status, and its seconds; None: it was a stream.

499: its caller has left.
"""

Audit = Callable[[str, Message | None, Context, int, str], None]
"""Takes each call that has ended: the method, request (None: malformed), context, HTTP status, reason of a failure."""

_LEFT = 499


def serve(
    server: Server,
    service: ServiceDescriptor,
    servicer: object,
    translate: Translate = lambda _: None,
    authorize: Authorize | None = None,
    observe: Observe = lambda *_: None,
    audit: Audit = lambda *_: None,
) -> None:
    """Answer the calls of a service by a servicer, which has a method in snake case for each of the service's.

    A method takes the request and a :class:`Context`. It returns the response, or yields several for a stream, and
    raises ServingErrors.
    """
    for method in service.methods:
        answer = getattr(servicer, re.sub(r"(?<!^)(?=[A-Z])", "_", method.name).lower())
        path = f"/{service.full_name}/{method.name}"
        one = _Method(path, method, answer, translate, authorize, observe, audit)
        if method.server_streaming:
            server.stream(path, one.stream, _MOST_UNSENT)
        else:
            server.unary(path, one.call)


class _Method:
    """One method of a service."""

    def __init__(
        self,
        path: str,
        method: MethodDescriptor,
        answer: Callable[..., Any],
        translate: Translate,
        authorize: Authorize | None,
        observe: Observe,
        audit: Audit,
    ) -> None:
        self._path = path
        self._name = method.name
        self._authorize = authorize
        self._request = GetMessageClass(method.input_type)
        self._rest = RestPaths(method)
        self._answer = answer
        self._translate = translate
        self._observe = observe
        self._audit = audit

    def call(self, call: Call) -> None:
        """Answer a unary call, in a task."""
        began_s = time.monotonic()
        context = Context(call.headers, peer_names=call.peer_names, peer_address=call.peer_address)
        request: Message | None = None
        try:
            context = replace(context, deadline=call.deadline())
            request = self._read(call.message, call.headers)
            context = self._authorized(request, context)
        except GrpcError as error:
            call.abort(error.status, str(error))
            self._end(request, context, InvalidArgument.status, str(error), began_s)
            return
        except ServingError as error:
            _abort(call, call.headers, error)
            self._end(request, context, error.status, error.message, began_s)
            return
        task = asyncio.get_running_loop().create_task(self._within(self._answer(request, context), context))
        # Its caller has left.
        call.on_gone = partial(_cancel, task)
        task.add_done_callback(partial(self._finish, call, request, context, began_s))

    @staticmethod
    async def _within(work: Awaitable[Message], context: Context) -> Message:
        if context.deadline is None:
            return await work
        try:
            async with asyncio.timeout(context.deadline - time.monotonic()):
                return await work
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed") from None

    def _finish(
        self, call: Call, request: Message, context: Context, began_s: float, task: asyncio.Task[Message]
    ) -> None:
        headers = call.headers
        status, reason = 200, ""
        if task.cancelled():
            status, reason = _LEFT, "the caller has gone"
        elif failure := task.exception():
            error = self._error(failure, headers)
            status, reason = error.status, error.message
            _abort(call, headers, error)
        else:
            call.finish(task.result().SerializeToString())
        self._end(request, context, status, reason, began_s)

    def _end(self, request: Message | None, context: Context, status: int, reason: str, began_s: float) -> None:
        self._observe(self._name, status, time.monotonic() - began_s)
        self._audit(self._name, request, context, status, reason)

    async def stream(
        self, messages: AsyncIterator[bytes], headers: Headers, peer_names: tuple[str, ...], peer_address: str
    ) -> AsyncIterator[bytes]:
        """Yield the messages that answer the one message of a call."""
        status, reason = _LEFT, ""
        request: Message | None = None
        context = Context(headers, peer_names=peer_names, peer_address=peer_address)
        try:
            context = replace(context, deadline=deadline_of(headers))
            async for message in messages:
                request = self._read(message, headers)
                context = self._authorized(request, context)
                again_s = time.monotonic() + _AUTHORIZED_S
                async with aclosing(self._answer(request, context)) as responses:
                    async for response in responses:
                        if self._authorize and time.monotonic() >= again_s:
                            self._authorized(request, context)
                            again_s = time.monotonic() + _AUTHORIZED_S
                        yield response.SerializeToString()
                break
            status = 200
        except GrpcError:
            status = InvalidArgument.status
            raise
        except Exception as failure:
            error = self._error(failure, headers)
            status, reason = error.status, error.message
            raise _stream_error(error, headers) from None
        finally:
            self._observe(self._name, status, None)
            self._audit(self._name, request, context, status, reason)

    def _read(self, message: Any, headers: Headers) -> Message:
        try:
            request = self._request.FromString(message)
        except DecodeError:
            raise InvalidArgument("the message is malformed") from None
        if REST_HEADER in headers and (path := Context(headers).header(ORIGINAL_PATH)):
            self._rest.check(path, request)
        return request

    def _authorized(self, request: Message, context: Context) -> Context:
        if self._authorize is None:
            return context
        return replace(context, caller=self._authorize(self._name, request, context))

    def _error(self, error: BaseException, headers: Headers) -> ServingError:
        if isinstance(error, ServingError):
            return error
        if isinstance(error, Exception) and (known := self._translate(error)):
            return known
        reqid = Context(headers).header("x-reqid") or Context(headers).header("x-request-id")
        log.error("call failed", path=self._path, reqid=reqid, exc_info=error)
        return Internal("the server failed on this call")


def _cancel(task: asyncio.Task[Message]) -> None:
    task.cancel()


def _abort(call: Call, headers: Headers, error: ServingError) -> None:
    if REST_HEADER in headers:
        call.respond(error.status, _http_headers(error), _body(error))
    else:
        call.abort(grpc_status(error), error.message, _details(error))


def _stream_error(error: ServingError, headers: Headers) -> GrpcError:
    if REST_HEADER in headers:
        body = _body(error)
        sent = Headers([*_http_headers(error), ("content-length", str(len(body)))])
        return HttpError(grpc_status(error), error.message, error.status, sent, body)
    return GrpcError(grpc_status(error), error.message, _details(error))


def _http_headers(error: ServingError) -> list[tuple[str, str]]:
    headers = [_JSON]
    if error.status == Unauthenticated.status:
        headers.append(("www-authenticate", "Bearer"))
    if error.retry_after_s is not None:
        headers.append(("retry-after", str(max(1, -int(-error.retry_after_s // 1)))))
    return headers


def _body(error: ServingError) -> bytes:
    body: dict[str, object] = {"code": error.code, "message": error.message}
    if error.fields:
        body["fields"] = [{"field": field, "reason": reason} for field, reason in error.fields.items()]
    return orjson.dumps(body)


def _details(error: ServingError) -> list[tuple[str, str]]:
    """Return the trailing metadata that names the fields of the request that are wrong."""
    if not error.fields:
        return []
    number: int = grpc_status(error).value[0]
    status = status_pb2.Status(code=number, message=error.message[:_MOST_CHARS])
    violations = [
        error_details_pb2.BadRequest.FieldViolation(field=field[:_MOST_CHARS], description=reason[:_MOST_CHARS])
        for field, reason in list(error.fields.items())[:_MOST_FIELDS]
    ]
    status.details.add().Pack(error_details_pb2.BadRequest(field_violations=violations))
    return [("grpc-status-details-bin", base64.b64encode(status.SerializeToString()).decode().rstrip("="))]
