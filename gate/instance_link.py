"""The gate's end of a link."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from google.protobuf.message import DecodeError

from atserving import link
from atserving.config import Instance
from atserving.tls import peer_names
from atserving.v1 import evaluator_pb2
from atserving.wire import Buffer
from gate.answers import TransportError


class InstanceLink(link.Link):
    """The gate's end of a link."""

    def __init__(
        self,
        instance: Instance,
        replied: Callable[[link.Reply], None],
        writable: Callable[[], None],
        away: Callable[[bool], None],
        quiet: Callable[[int], None],
        name: str | None = None,
    ) -> None:
        """``name`` is what the instance's certificate should have; None: there is no TLS."""
        super().__init__()
        self._name = name
        self.greeted: asyncio.Future[bool] = self._loop.create_future()
        """Done once the instance has named itself: whether its net is built in; a TransportError if it is another."""
        self.ended: asyncio.Future[str] = self._loop.create_future()
        """Why the link has ended."""
        self._hello = evaluator_pb2.Hello(
            app=instance.app, version=instance.version, instance=instance.id, digest=instance.digest
        )
        self._replied = replied
        self._writable = writable
        self._away = away
        self._quiet = quiet
        self._reason = "the instance ended the connection"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        if self._name is not None and self._name not in (names := peer_names(transport)):
            self._end(f"the certificate at its address is for {', '.join(names)[:200] or 'no name'}, not {self._name}")
            self.abort()
            return
        self.write([link.PREFACE, link.frame(link.HELLO, self._hello.SerializeToString())])

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._end(self._reason if error is None else (getattr(error, "strerror", None) or str(error)))

    def frame_received(self, kind: int, data: link.Buffer, start: int, end: int) -> None:
        if kind == link.REPLY and self.greeted.done():
            reply = link.read_reply(data, start, end)
            if self.sends_long:
                # An instance may refuse a call before it has arrived.
                self.drop(reply.id)
            self._replied(reply)
        elif kind == link.HELLO and not self.greeted.done():
            self._greet(data, start, end)
        elif kind == link.AWAY and self.greeted.done():
            self._away(link.read_away(data, start, end))
        elif kind != link.ALIVE:
            raise link.Malformed(f"a frame of kind {kind}")

    def quiet(self, intervals: int) -> None:
        if self.greeted.done():
            self._quiet(intervals)

    def _greet(self, data: link.Buffer, start: int, end: int) -> None:
        try:
            hello = evaluator_pb2.Hello.FromString(bytes(data[start:end]))
        except DecodeError:
            raise link.Malformed("the HELLO is malformed") from None
        if hello.refusal:
            self._end(hello.refusal)
            self.abort()
        elif link.named(hello) != link.named(self._hello):
            # Another instance may have got the address of one that has ended.
            self._end(f"instance {hello.instance!r} of app {hello.app!r} answers at its address")
            self.abort()
        else:
            self.greet()
            self.greeted.set_result(hello.built_in)

    def malformed(self, reason: str) -> None:
        self._end(f"the instance sent something malformed: {reason}")
        super().malformed(reason)

    def other_version(self, reason: str) -> None:
        self._end(reason)
        super().other_version(reason)

    def dead(self) -> None:
        self._end("the instance does not answer")
        super().dead()

    @property
    def is_open(self) -> bool:
        """Whether frames can leave."""
        return self.transport is not None and not self.transport.is_closing()

    def write(self, parts: Sequence[Buffer]) -> None:
        """Write frames now."""
        assert self.transport
        if parts:
            self.transport.writelines(parts)

    def pump_again(self) -> None:
        # It pumps too, after the short calls.
        self._writable()

    def _end(self, reason: str) -> None:
        if not self.greeted.done():
            self.greeted.set_exception(TransportError(reason, reached=False))
            # Its connection may have timed out.
            self.greeted.exception()
        if not self.ended.done():
            self.ended.set_result(reason)
