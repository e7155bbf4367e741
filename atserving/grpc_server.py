"""gRPC over HTTP/2 on the server's side, by callbacks, with the standard health service and reflection.

It takes the place of ``grpc.aio.server``, which hands each request from its own thread to the event loop and back: that
costs ten times as much as the protocol. Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import cast

import structlog
from google.protobuf.descriptor import FileDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from grpc import StatusCode
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer

from atserving import http2
from atserving.grpc_call import Call, GrpcError, Unary, failure, parsed, refuse
from atserving.grpc_stream import MOST_UNSENT, Handler, Streaming, StreamingCall
from atserving.held import HeldBytes
from atserving.http2_stream import Headers, Receiver, Stream
from atserving.sockets import listening_socket
from atserving.tls import Tls
from atserving.tls_server import TlsServer, accept
from atserving.transport import LIVE, MAX_MESSAGE_BYTES

log = structlog.get_logger()

_CONTENT_TYPE = b"application/grpc"
# The services that every peer may call: grpc.health.v1.Health, grpc.reflection.v1alpha.ServerReflection.
_OPEN = ("/grpc.health.", "/grpc.reflection.")
_MOST_NAME_CHARS = 200
_SHORT_BYTES = 1 << 10
# The bound of a server that is given none.
_MOST_HELD_BYTES = 256 << 20
# What streaming calls may hold where there is a bound: they watch the health, and last as long as their callers like.
_MOST_STREAMING_BYTES = 16 << 20
# After so long a stopping server waits for calls only, no longer for connections and streams.
_PARTING_S = 1.0


class _Refused:
    """Receives what is left of a request that is answered already."""

    def received(self, data: bytes) -> None: ...

    def ended(self) -> None: ...

    def late(self) -> None: ...

    def gone(self) -> None: ...


def _refused(stream: Stream, status: StatusCode, message: str) -> _Refused:
    """Refuse a request before its body."""
    stream.start(200, failure(status, message), end=True)
    return _Refused()


class _Full(asyncio.Protocol):
    """Closes a connection that is one too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).abort()


class Server:
    """A gRPC server with the standard health service and reflection.

    The health of every service is NOT_SERVING until :meth:`set_serving`; ``LIVE`` is SERVING from the start. The server
    rejects a message larger than ``max_receive_bytes`` with RESOURCE_EXHAUSTED, and a compressed one with
    UNIMPLEMENTED. Reflection shows ``services`` and the files they need, and leaves out those in ``internal``.
    """

    def __init__(
        self,
        services: Sequence[ServiceDescriptor],
        max_receive_bytes: int = MAX_MESSAGE_BYTES,
        held: HeldBytes | None = None,
        *,
        internal: Sequence[ServiceDescriptor] = (),
        max_connections: int | None = None,
        peers: Iterable[str] | None = None,
    ) -> None:
        """``held`` bounds the bytes of all unary calls together; with it, streaming calls have a bound, too.

        Reflection does not show the ``internal`` services. ``peers`` are the names in the certificates of those who may
        call more than health and reflection; None: everybody may.
        """
        self._peers = None if peers is None else frozenset(peers)
        self._application = self._open if peers is None else self._open_known
        self._max_connections = max_connections
        self._most = max_receive_bytes
        self._held = held or HeldBytes(_MOST_HELD_BYTES)
        # A registry, which is given no bound, has a stream of each gate and evaluator.
        self._streaming_held = HeldBytes(_MOST_STREAMING_BYTES if held else sys.maxsize)
        self._unary: dict[str, Unary] = {}
        self._streaming: dict[str, Streaming] = {}
        self._connections: set[http2.Connection] = set()
        self.refused_connections = 0
        """How many connections were one too many."""
        self._server: asyncio.Server | TlsServer | None = None
        self._serving = self._stopping = False
        self._names = ["", *(service.full_name for service in (*services, *internal))]
        self._changed = asyncio.Event()
        health = health_pb2.DESCRIPTOR.services_by_name["Health"]
        self.unary(f"/{health.full_name}/Check", self._check)
        self.stream(f"/{health.full_name}/Watch", self._watch)
        shown = [*services, health, reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]]
        names = [service.full_name for service in shown]
        self._reflection = ReflectionServicer(names, pool=_pool([service.file for service in shown]))
        self.stream(f"/{reflection.SERVICE_NAME}/ServerReflectionInfo", self._reflect)

    def unary(self, path: str, handler: Callable[[Call], None], full: Callable[[Call], None] = refuse) -> None:
        """Let ``handler`` answer the calls of a path, ``/<service>/<method>``, at once or later.

        ``full`` refuses a call whose request or answer does not fit into what the server may hold.
        """
        self._unary[path] = Unary(handler, full)

    def stream(self, path: str, handler: Handler, most_unsent: int = MOST_UNSENT) -> None:
        """Let ``handler`` answer the streaming calls of a path, each in a task of its own."""
        self._streaming[path] = Streaming(handler, most_unsent)

    async def start(self, listen: str, *, insecure: bool = False, tls: Tls | None = None) -> int:
        """Listen on ``host:port`` (port 0: any free port) and return the port. Raises StartError.

        ``insecure``: without TLS, too, the address need not be a loopback one.
        """
        own = await listening_socket(listen, insecure=insecure or tls is not None)
        port = int(own.getsockname()[1])
        self._server = await accept(own, self.connect, tls)
        return port

    def connect(self) -> asyncio.Protocol:
        """Return the protocol of a new connection, for a listener of the caller's own."""
        if self._max_connections is not None and len(self._connections) >= self._max_connections:
            self.refused_connections += 1
            log.warning("connection refused", reason=f"this process has {self._max_connections} connections")
            return _Full()
        return http2.Connection(self._application, self._connections)

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    @property
    def is_serving(self) -> bool:
        """Whether the health service says that this server accepts calls."""
        return self._serving

    async def set_serving(self, serving: bool) -> None:
        """Report by the health service whether this server accepts calls."""
        self._serving = serving
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def stop(self, grace_s: float) -> None:
        """Accept no new calls, let the calls in flight finish within ``grace_s``, and cancel the rest."""
        if self._server:
            self._server.close()
        self._stopping = True
        await self.set_serving(False)
        for connection in list(self._connections):
            connection.drain()
        began_s = time.monotonic()
        parted = False
        while self._connections and time.monotonic() < began_s + grace_s:
            await asyncio.sleep(0.02)
            if not parted and time.monotonic() >= began_s + _PARTING_S:
                parted = True
                self._part()
        for connection in list(self._connections):
            connection.close()

    def _part(self) -> None:
        """End what is open but no call: streams that only listen, and connections whose peers do not close them."""
        for connection in list(self._connections):
            for receiver in connection.receivers():
                if isinstance(receiver, StreamingCall):
                    receiver.stop()
            if not connection.receivers():
                connection.close()

    def _open_known(self, stream: Stream) -> Receiver:
        """Open a call of a peer with a certificate."""
        assert self._peers is not None
        if self._peers.isdisjoint(stream.peer_names) and not stream.path.startswith(_OPEN):
            names = ", ".join(stream.peer_names)[:_MOST_NAME_CHARS] or "a peer without a name"
            return _refused(stream, StatusCode.PERMISSION_DENIED, f"{names} may only ask for the health here")
        return self._open(stream)

    def _open(self, stream: Stream) -> Receiver:
        if stream.method != "POST":
            stream.start(405, Headers([("allow", "POST")]), end=True)
            return _Refused()
        if not (stream.headers.get("content-type") or b"").startswith(_CONTENT_TYPE):
            stream.start(415, Headers([("accept", "application/grpc")]), end=True)
            return _Refused()
        if method := self._unary.get(stream.path):
            return Call(stream, method, self._most, self._held)
        if streaming := self._streaming.get(stream.path):
            try:
                return StreamingCall(stream, streaming, _SHORT_BYTES, self._streaming_held)
            except GrpcError as error:
                return _refused(stream, error.status, str(error))
        return _refused(stream, StatusCode.UNIMPLEMENTED, "unknown method")

    def _status(self, service: str) -> health_pb2.HealthCheckResponse:
        kinds = health_pb2.HealthCheckResponse
        if service == LIVE:
            return kinds(status=kinds.SERVING)
        if service not in self._names:
            raise GrpcError(StatusCode.NOT_FOUND, "unknown service")
        return kinds(status=kinds.SERVING if self._serving else kinds.NOT_SERVING)

    def _check(self, call: Call) -> None:
        try:
            service = parsed(health_pb2.HealthCheckRequest(), call.message).service
            call.finish(self._status(service).SerializeToString())
        except GrpcError as error:
            call.abort(error.status, str(error))

    async def _watch(self, messages: AsyncIterator[bytes], *_: object) -> AsyncIterator[bytes]:
        async for message in messages:
            service = parsed(health_pb2.HealthCheckRequest(), message).service
            last: bytes | None = None
            while True:
                changed = self._changed
                try:
                    status = self._status(service)
                except GrpcError:
                    status = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
                if (now := status.SerializeToString()) != last:
                    last = now
                    yield now
                if self._stopping:
                    return
                await changed.wait()

    async def _reflect(self, messages: AsyncIterator[bytes], *_: object) -> AsyncIterator[bytes]:
        async def requests() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
            async for message in messages:
                yield parsed(reflection_pb2.ServerReflectionRequest(), message)

        async for response in self._reflection.ServerReflectionInfo(requests(), None):
            yield response.SerializeToString()


def _pool(files: Iterable[FileDescriptor]) -> DescriptorPool:
    """Return a pool of the files and of those they need. The process's own pool has every file that it has loaded."""
    pool = DescriptorPool()
    added: set[str] = set()

    def add(file: FileDescriptor) -> None:
        if file.name not in added:
            added.add(file.name)
            for needed in file.dependencies:
                add(needed)
            pool.AddSerializedFile(file.serialized_pb)

    for file in files:
        add(file)
    return pool
