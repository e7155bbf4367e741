"""The way to the members of an etcd cluster: channels, rotation, a bound on every try, and the user's token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from atserving.v1 import etcd_pb2
from registry.etcd.errors import EtcdError, EtcdRefused, EtcdUnavailable, TokenRefused, translate

TRY_TIMEOUT_S = 2.0
"""The most one try at one member takes, in seconds; a frozen member costs no more."""

_PROBE_S = 2.0

_CHANNEL_OPTIONS = [
    # etcd cuts off clients that ping more often than every 5 s, or that ping without a call under way.
    ("grpc.keepalive_time_ms", 6_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    # keepalive_timeout_ms alone does not bound a dead peer.
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 0),
    # A page of a snapshot may hold many values of the size that etcd permits (1.5 MiB).
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # In spite of its name this bounds a connection attempt, which TLS and a busy member need time for.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
]

Metadata = tuple[tuple[str, str], ...]
_Response = TypeVar("_Response", bound=Message)


@dataclass(frozen=True)
class Tls:
    """What secures the connection, in PEM: the authority to trust (None: the system's) and our own certificate."""

    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class User:
    """Whom to authenticate as."""

    name: str
    password: str = field(repr=False)


@dataclass(frozen=True)
class Method(Generic[_Response]):
    """One method of etcd's API, by its name on the wire."""

    path: str
    response: type[_Response]
    stream: bool = False
    """Whether requests and responses are streams; as a call, one goes there and one comes back."""


AUTHENTICATE = Method("/etcdserverpb.Auth/Authenticate", etcd_pb2.AuthenticateResponse)


class _Member:
    """One endpoint and its channel, made when first needed."""

    def __init__(self, address: str, tls: Tls | None) -> None:
        self.address = address
        self._tls = tls
        self._channel: grpc.aio.Channel | None = None

    @property
    def channel(self) -> grpc.aio.Channel:
        if self._channel is None:
            if self._tls:
                credentials = grpc.ssl_channel_credentials(self._tls.ca, self._tls.key, self._tls.cert)
                self._channel = grpc.aio.secure_channel(self.address, credentials, options=_CHANNEL_OPTIONS)
            else:
                self._channel = grpc.aio.insecure_channel(self.address, options=_CHANNEL_OPTIONS)
        return self._channel

    async def call(
        self, method: Method[_Response], request: Message, metadata: Metadata, timeout_s: float
    ) -> _Response:
        """One request, one response. Raises grpc.aio.AioRpcError."""
        if not method.stream:
            unary: grpc.aio.UnaryUnaryMultiCallable[Message, _Response] = self.channel.unary_unary(
                method.path, request_serializer=_serialize, response_deserializer=method.response.FromString
            )
            return await unary(request, metadata=metadata, timeout=timeout_s)
        call = self.open(method, metadata, timeout_s)
        try:
            await call.write(request)
            return self.received(method, await call.read())
        finally:
            call.cancel()

    def open(
        self, method: Method[_Response], metadata: Metadata, timeout_s: float | None
    ) -> grpc.aio.StreamStreamCall[Message, _Response]:
        stream: grpc.aio.StreamStreamMultiCallable[Message, _Response] = self.channel.stream_stream(
            method.path, request_serializer=_serialize, response_deserializer=method.response.FromString
        )
        return stream(None, metadata=metadata, timeout=timeout_s)

    def received(self, method: Method[_Response], read: object) -> _Response:
        """What was read from a stream; etcd ends none by itself. Raises EtcdUnavailable where it did."""
        if not isinstance(read, method.response):
            raise EtcdUnavailable(f"{self.address}: ended the stream")
        return read

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close(None)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


class Connection:
    """Calls methods of etcd's API on whichever member answers.

    Reads are tried at every member. A write is tried once: whether one that failed took effect, its caller must read.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        tls: Tls | None = None,
        user: User | None = None,
        try_timeout_s: float = TRY_TIMEOUT_S,
    ) -> None:
        self._members = [_Member(address, tls) for address in endpoints]
        self._turn = 0
        self._timeout_s = try_timeout_s
        self._user = user
        self._token: str | None = None
        self._authenticating = asyncio.Lock()

    async def close(self) -> None:
        for member in self._members:
            await member.close()

    async def read(self, method: Method[_Response], request: Message) -> _Response:
        """Calls what may be repeated, at every member in turn. Raises EtcdUnavailable, EtcdRefused."""
        first = self._turn
        failures: dict[str, None] = {}
        # With one member too a second try: the first may only have found that the old connection is broken.
        for turn in range(first, first + max(2, len(self._members))):
            index = turn % len(self._members)
            member = self._members[index]
            try:
                response = await self._try(member, method, request)
            except EtcdUnavailable as error:
                failures[str(error)] = None
                self._leave(member)
            else:
                self._turn = index
                return response
        raise EtcdUnavailable("; ".join(failures))

    async def write(self, method: Method[_Response], request: Message) -> _Response:
        """Calls once, at the member that last answered. Raises EtcdUnavailable (outcome unknown), EtcdRefused."""
        member = self._members[self._turn]
        try:
            return await self._try(member, method, request)
        except EtcdUnavailable:
            self._leave(member)
            raise

    async def follow(
        self, method: Method[_Response], request: Message, probe: tuple[Method[Any], Message]
    ) -> AsyncGenerator[_Response, None]:
        """The responses of a stream opened by one request, for ever. Raises EtcdUnavailable, EtcdRefused.

        While the stream is silent its member is asked ``probe`` now and then: a frozen one is left soon.
        """
        member = self._members[self._turn]
        try:
            call = member.open(method, await self._metadata(member), None)
            try:
                await call.write(request)
                while True:
                    yield await self._next(member, method, call, probe)
            except grpc.aio.AioRpcError as error:
                raise self._failure(member, error) from None
            finally:
                call.cancel()
        except EtcdUnavailable:
            self._leave(member)
            raise

    async def _next(
        self,
        member: _Member,
        method: Method[_Response],
        call: grpc.aio.StreamStreamCall[Message, _Response],
        probe: tuple[Method[Any], Message],
    ) -> _Response:
        reading = asyncio.ensure_future(call.read())
        try:
            while not (await asyncio.wait({reading}, timeout=_PROBE_S))[0]:
                await self._try(member, *probe)
        finally:
            if not reading.done():
                reading.cancel()
                await asyncio.wait({reading})
        return member.received(method, reading.result())

    async def _try(self, member: _Member, method: Method[_Response], request: Message) -> _Response:
        try:
            return await self._call(member, method, request)
        except TokenRefused:
            if not self._user:
                raise
        # Refused for its token, so nothing was written; the failure has already forgotten the token.
        return await self._call(member, method, request)

    async def _call(self, member: _Member, method: Method[_Response], request: Message) -> _Response:
        metadata = await self._metadata(member)
        try:
            return await member.call(method, request, metadata, self._timeout_s)
        except grpc.aio.AioRpcError as error:
            raise self._failure(member, error) from None

    def _failure(self, member: _Member, error: grpc.aio.AioRpcError) -> EtcdError:
        failure = translate(member.address, error)
        if isinstance(failure, TokenRefused):
            self.forget_token()
        return failure

    def _leave(self, member: _Member) -> None:
        # Of several calls that failed at one member, only the first moves on.
        if self._members[self._turn] is member:
            self._turn = (self._turn + 1) % len(self._members)

    def forget_token(self) -> None:
        """The token was refused: authenticate before the next call."""
        self._token = None

    async def _metadata(self, member: _Member) -> Metadata:
        # With hasleader a member that lost its quorum says so, where otherwise a watch on it is silent.
        leader = ("hasleader", "true")
        if not self._user:
            return (leader,)
        async with self._authenticating:
            if self._token is None:
                self._token = await self._authenticate(member, self._user)
        return (leader, ("token", self._token)) if self._token else (leader,)

    async def _authenticate(self, member: _Member, user: User) -> str:
        request = etcd_pb2.AuthenticateRequest(name=user.name, password=user.password)
        try:
            return (await member.call(AUTHENTICATE, request, (), self._timeout_s)).token
        except grpc.aio.AioRpcError as error:
            failure = translate(member.address, error)
            # Then no token is needed; should authentication be enabled later, calls without one are refused.
            if isinstance(failure, EtcdRefused) and "authentication is not enabled" in str(failure):
                return ""
            raise failure from None
