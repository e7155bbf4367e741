"""Calls to the members of an etcd cluster: channels, rotation, a timeout for every try, and the user's token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from atserving import lifecycle
from atserving.v1 import etcd_pb2
from registry.etcd.counts import CallCounts
from registry.etcd.errors import EtcdError, EtcdRefused, EtcdUnavailable, TokenRefused, translate
from registry.etcd.tls import Tls

TRY_TIMEOUT_S = 2.0
"""The timeout of one try at one member, in seconds."""

_PROBE_S = 2.0

_CHANNEL_OPTIONS = [
    # etcd disconnects a client that pings more often than every 5 s, or that pings without a call in flight.
    ("grpc.keepalive_time_ms", 6_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    # The C core waits for this timeout, so keepalive_timeout_ms alone does not detect a dead peer in time.
    ("grpc.http2.ping_timeout_ms", 3_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 0),
    # One page of a snapshot may hold many values of etcd's maximum size (1.5 MiB).
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name, this is the timeout of one connection attempt; TLS and a busy member need time.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
]

Metadata = tuple[tuple[str, str], ...]
_Response = TypeVar("_Response", bound=Message)


@dataclass(frozen=True)
class User:
    """The credentials of an etcd user."""

    name: str
    password: str = field(repr=False)


@dataclass(frozen=True)
class Method(Generic[_Response]):
    """One method of etcd's API, by its full gRPC name."""

    path: str
    response: type[_Response]
    stream: bool = False
    """Whether the method is a bidirectional stream. A call on it exchanges one request for one response."""

    @property
    def name(self) -> str:
        """The last part of the full name."""
        return self.path.rpartition("/")[2]


AUTHENTICATE = Method("/etcdserverpb.Auth/Authenticate", etcd_pb2.AuthenticateResponse)


class _Member:
    """One endpoint and its channel, created on first use, and again once the certificates have changed.

    Calls hold the channel on which they began: a stream goes on over the old one.
    """

    def __init__(self, address: str, tls: Tls | None) -> None:
        self.address = address
        self._tls = tls
        self._channel: grpc.aio.Channel | None = None
        self._credentials: grpc.ChannelCredentials | None = None

    @property
    def channel(self) -> grpc.aio.Channel:
        if self._tls and (credentials := self._tls.credentials) is not self._credentials:
            self._credentials = credentials
            self._channel = grpc.aio.secure_channel(self.address, credentials, options=_CHANNEL_OPTIONS)
        elif self._channel is None:
            self._channel = grpc.aio.insecure_channel(self.address, options=_CHANNEL_OPTIONS)
        return self._channel

    async def call(
        self, method: Method[_Response], request: Message, metadata: Metadata, timeout_s: float
    ) -> _Response:
        """Send one request and return its response. Raises grpc.aio.AioRpcError."""
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
        """Return a response read from a stream. Raises EtcdUnavailable at the end of the stream: etcd has failed."""
        if not isinstance(read, method.response):
            raise EtcdUnavailable(f"{self.address}: ended the stream")
        return read

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close(None)


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


class Connection:
    """Calls methods of etcd's API at the members of one cluster.

    A read is tried at every member. A write is tried once: after a failure the caller must read to learn its outcome.
    """

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        tls: Tls | None = None,
        user: User | None = None,
        try_timeout_s: float = TRY_TIMEOUT_S,
    ) -> None:
        self.counts = CallCounts()
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
        """Try an idempotent call at every member in turn. Raises EtcdUnavailable, EtcdRefused."""
        first = self._turn
        failures: dict[str, None] = {}
        # Try a single member twice: the first try may only detect that the old connection is broken.
        for turn in range(first, first + max(2, len(self._members))):
            index = turn % len(self._members)
            member = self._members[index]
            try:
                response = await self._try(member, method, request)
            except EtcdUnavailable as error:
                failures[str(error)] = None
                self._rotate_from(member)
            else:
                self._turn = index
                return response
        raise EtcdUnavailable("; ".join(failures))

    async def write(self, method: Method[_Response], request: Message) -> _Response:
        """Try a call once, at the member that last answered. Raises EtcdUnavailable (outcome unknown), EtcdRefused."""
        member = self._members[self._turn]
        try:
            return await self._try(member, method, request)
        except EtcdUnavailable:
            self._rotate_from(member)
            raise

    async def follow(
        self,
        method: Method[_Response],
        request: Message,
        probe: tuple[Method[Any], Message],
        probed: Callable[[Any], None],
    ) -> AsyncGenerator[_Response, None]:
        """Open a stream with one request and yield its responses. Raises EtcdUnavailable, EtcdRefused.

        While the stream is silent, ``probe`` is sent to its member every few seconds to detect a frozen one;
        ``probed`` takes the responses.
        """
        member = self._members[self._turn]
        try:
            call = member.open(method, await self._metadata(member), None)
            try:
                await call.write(request)
                while True:
                    yield await self._next(member, method, call, probe, probed)
            except grpc.aio.AioRpcError as error:
                raise self._failure(member, error) from None
            finally:
                call.cancel()
        except EtcdUnavailable:
            self._rotate_from(member)
            raise

    @asynccontextmanager
    async def stream(self, method: Method[_Response]) -> AsyncIterator[grpc.aio.StreamStreamCall[Any, _Response]]:
        """Open a stream at the member that last answered. Raises EtcdUnavailable, EtcdRefused, also from the block."""
        member = self._members[self._turn]
        try:
            call = member.open(method, await self._metadata(member), None)
            try:
                yield call
            except grpc.aio.AioRpcError as error:
                raise self._failure(member, error) from None
            finally:
                call.cancel()
        except EtcdUnavailable:
            self._rotate_from(member)
            raise

    async def _next(
        self,
        member: _Member,
        method: Method[_Response],
        call: grpc.aio.StreamStreamCall[Message, _Response],
        probe: tuple[Method[Any], Message],
        probed: Callable[[Any], None],
    ) -> _Response:
        reading = asyncio.ensure_future(call.read())
        try:
            while not (await asyncio.wait({reading}, timeout=_PROBE_S))[0]:
                probed(await self._try(member, *probe))
        finally:
            if not reading.done():
                await lifecycle.end([reading])
        return member.received(method, reading.result())

    async def _try(self, member: _Member, method: Method[_Response], request: Message) -> _Response:
        try:
            return await self._call(member, method, request)
        except TokenRefused:
            if not self._user:
                raise
        # The member refused the token, so it wrote nothing. _failure has forgotten the token; try with a new one.
        return await self._call(member, method, request)

    async def _call(self, member: _Member, method: Method[_Response], request: Message) -> _Response:
        metadata = await self._metadata(member)
        with self.counts.counted(method.name):
            try:
                return await member.call(method, request, metadata, self._timeout_s)
            except grpc.aio.AioRpcError as error:
                raise self._failure(member, error) from None

    def _failure(self, member: _Member, error: grpc.aio.AioRpcError) -> EtcdError:
        failure = translate(member.address, error)
        if isinstance(failure, TokenRefused):
            self.forget_token()
        return failure

    def _rotate_from(self, member: _Member) -> None:
        # If several calls fail at one member, only the first of them moves to the next member.
        if self._members[self._turn] is member and len(self._members) > 1:
            self.counts.switches += 1
            self._turn = (self._turn + 1) % len(self._members)

    def forget_token(self) -> None:
        """Forget a refused token; the next call authenticates again."""
        self._token = None

    async def _metadata(self, member: _Member) -> Metadata:
        # With hasleader a member without quorum fails the call; without it, a watch on such a member stays silent.
        leader = ("hasleader", "true")
        if not self._user:
            return (leader,)
        async with self._authenticating:
            if self._token is None:
                self._token = await self._authenticate(member, self._user)
        return (leader, ("token", self._token)) if self._token else (leader,)

    async def _authenticate(self, member: _Member, user: User) -> str:
        request = etcd_pb2.AuthenticateRequest(name=user.name, password=user.password)
        with self.counts.counted(AUTHENTICATE.name):
            try:
                return (await member.call(AUTHENTICATE, request, (), self._timeout_s)).token
            except grpc.aio.AioRpcError as error:
                failure = translate(member.address, error)
                # No token is needed. If an operator enables authentication later, etcd refuses calls without a token.
                if isinstance(failure, EtcdRefused) and "authentication is not enabled" in str(failure):
                    return ""
                raise failure from None
