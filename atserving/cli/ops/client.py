"""Calls of the operators' API, over the first registry that answers."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from atserving import transport
from atserving.admin.v1.admin_pb2_grpc import AdminServiceStub
from atserving.cli import contexts
from atserving.cli.tables import printable
from atserving.errors import StartError
from atserving.tls import REGISTRY, Tls

_CALL_TIMEOUT_S = 10.0
_CONNECT_TIMEOUT_S = 3.0
_PAGE_SIZE = 1000

NOT_FOUND, REFUSED, INVALID, UNAVAILABLE, FORBIDDEN = 3, 5, 6, 7, 9
"""Exit statuses, by which a script tells failures apart."""

_Status = grpc.StatusCode
_EXIT_STATUSES = {
    _Status.NOT_FOUND: NOT_FOUND,
    _Status.ALREADY_EXISTS: 4,
    _Status.ABORTED: 4,
    _Status.FAILED_PRECONDITION: REFUSED,
    _Status.INVALID_ARGUMENT: INVALID,
    _Status.UNAUTHENTICATED: FORBIDDEN,
    _Status.PERMISSION_DENIED: FORBIDDEN,
    _Status.UNAVAILABLE: UNAVAILABLE,
    _Status.DEADLINE_EXCEEDED: UNAVAILABLE,
}

Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response", bound=Message)
# grpc's classes are generic only in their stubs.
Method: TypeAlias = "Callable[[AdminServiceStub], grpc.UnaryUnaryMultiCallable[Request, Response]]"
StreamMethod: TypeAlias = "Callable[[AdminServiceStub], grpc.UnaryStreamMultiCallable[Request, Response]]"


class CommandError(StartError):
    """A command failed; ``exit_status`` tells a script how."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


class Servers:
    """Registries, asked in turn. All methods raise CommandError."""

    def __init__(self, addresses: list[str], timeout_s: float = _CALL_TIMEOUT_S, token: str | None = None) -> None:
        """A server has ``timeout_s`` for the connection and a call. Without a token, that of the context is shown."""
        self.addresses = addresses
        self._timeout_s = timeout_s
        token = contexts.token() if token is None else token
        files = contexts.tls()
        self._tls = Tls(files) if files else None
        self._metadata = (("authorization", f"Bearer {token}"),) if token else None

    def read(self, method: Method[Request, Response], request: Request) -> Response:
        """Call the servers until one answers."""
        return self._call(method, request, repeat=True)

    def write(self, method: Method[Request, Response], request: Request) -> Response:
        """Call the first server that can be connected to. A failed call may have had effect, so it is not repeated."""
        return self._call(method, request, repeat=False)

    def _call(self, method: Method[Request, Response], request: Request, *, repeat: bool) -> Response:
        failure = _NO_ADDRESS
        for address in self.addresses:
            with self._channel(address) as channel:
                until_s = time.monotonic() + self._timeout_s
                if not _connects(channel, min(_CONNECT_TIMEOUT_S, self._timeout_s)):
                    failure = self._unconnected(address)
                    continue
                try:
                    return method(AdminServiceStub(channel))(
                        request, timeout=until_s - time.monotonic(), metadata=self._metadata
                    )
                except grpc.RpcError as error:
                    failure = _failure(address, error)
                    if failure.exit_status != UNAVAILABLE or not repeat:
                        break
        raise failure

    def stream(self, method: StreamMethod[Request, Response], request: Request) -> Iterator[Response]:
        """Yield the responses of the first server that sends one, until it ends the stream."""
        failure = _NO_ADDRESS
        for address in self.addresses:
            with self._channel(address) as channel:
                if not _connects(channel, _CONNECT_TIMEOUT_S):
                    failure = self._unconnected(address)
                    continue
                begun = False
                try:
                    for response in method(AdminServiceStub(channel))(request, metadata=self._metadata):
                        begun = True
                        yield response
                    return
                except grpc.RpcError as error:
                    failure = _failure(address, error)
                if begun or failure.exit_status != UNAVAILABLE:
                    break
        raise failure

    def _channel(self, address: str) -> grpc.Channel:
        if self._tls is None:
            return grpc.insecure_channel(address, options=transport.CHANNEL_OPTIONS)
        options = [*transport.CHANNEL_OPTIONS, *self._tls.options(REGISTRY)]
        return grpc.secure_channel(address, self._tls.credentials, options=options)

    def _unconnected(self, address: str) -> CommandError:
        if self._tls:
            how = f" over TLS with the certificate of {self._tls.files.dns_name(REGISTRY)}"
        else:
            how = " in plain text: is it running? One with TLS takes --tls-cert, --tls-key and --tls-ca"
        return CommandError(f"server {address}: there is no connection to it{how}", UNAVAILABLE)


_NO_ADDRESS = CommandError("no server is named", UNAVAILABLE)


def _connects(channel: grpc.Channel, timeout_s: float) -> bool:
    """Wait until a channel is connected, or has failed to."""
    states: queue.SimpleQueue[grpc.ChannelConnectivity] = queue.SimpleQueue()
    tell = states.put
    until_s = time.monotonic() + timeout_s
    channel.subscribe(tell, try_to_connect=True)
    try:
        while (left_s := until_s - time.monotonic()) > 0:
            state = states.get(timeout=left_s)
            if state is grpc.ChannelConnectivity.READY:
                return True
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                return False
    except queue.Empty:
        pass
    finally:
        channel.unsubscribe(tell)
    return False


def _failure(address: str, error: grpc.RpcError) -> CommandError:
    """Return the error of a call, with the fields that it finds wrong."""
    call = cast(grpc.Call, error)
    message = printable(call.details() or call.code().name)
    reasons = [f"{field}: {reason}" for field, reason in _wrong_fields(call) if field not in message]
    return CommandError(
        f"server {address}: {'; '.join([message, *map(printable, reasons)])}", _EXIT_STATUSES.get(call.code(), 1)
    )


def _wrong_fields(call: grpc.Call) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    status, request = status_pb2.Status(), error_details_pb2.BadRequest()
    for name, value in call.trailing_metadata() or ():
        if name == "grpc-status-details-bin":
            try:
                status.ParseFromString(value if isinstance(value, bytes) else value.encode())
                for each in status.details:
                    if each.Unpack(request):
                        found += [(one.field, one.description) for one in request.field_violations]
            except DecodeError:
                continue
    return found


def pages(servers: Servers, method: Method[Any, Response], request: Any) -> Iterator[Response]:
    """Yield all pages of a list. Raises CommandError."""
    request.page_size = _PAGE_SIZE
    while True:
        page: Any = servers.read(method, request)
        yield page
        if not page.next_page_token:
            return
        request.page_token = page.next_page_token
