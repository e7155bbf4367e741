"""The instance's end of the links from gates (:mod:`atserving.link`)."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Protocol

from google.protobuf.message import DecodeError

from atserving import link
from atserving.config import Instance
from atserving.deadlines import Deadlines
from atserving.held import HeldBytes
from atserving.v1 import evaluator_pb2

# Resuming for each single reply would cost more than it brings.
_FEW_OPEN = link.MOST_OPEN * 3 // 4
# The instance takes no more calls of a gate that leaves so much unread: short replies, and all together.
_MOST_SHORT_BYTES, _MOST_UNSENT_BYTES = 16 << 20, 128 << 20


class Replier(Protocol):
    """Takes the reply to a call."""

    def hold(self, count: int) -> bool:
        """Count a large answer of so many bytes until it is sent; return False if there is no room for it."""

    def reply(self, reply: link.Reply) -> None:
        """Send the reply; its id is the call's."""


class Request(Protocol):
    """A call that an instance works on. It replies once, unless it was abandoned."""

    ended: bool

    def abandon(self) -> None:
        """End it without a reply, since its caller has left."""

    def expire(self) -> None:
        """End it with an error, since its deadline has passed."""


class Answerer(Protocol):
    """Answers calls."""

    def begin(self, call: link.Call, replier: Replier) -> Request:
        """Begin a call. It may already have its reply on return."""


class LinkServer:
    """Makes the instance's end of each link. It refuses gates until it serves."""

    def __init__(self, held: HeldBytes) -> None:
        self.held = held
        self.links: set[GateLink] = set()
        self.answerer: Answerer | None = None
        self.instance: Instance | None = None
        self._built_in = False
        self._is_away = False
        self._all_closed = asyncio.Event()
        self._all_closed.set()

    def serve(self, instance: Instance, answerer: Answerer, *, built_in: bool = False) -> None:
        """Take the calls of gates that look for this instance. ``built_in``: so is its net."""
        self.instance, self.answerer, self._built_in = instance, answerer, built_in

    def set_away(self, is_away: bool) -> None:
        """Tell all gates whether the instance is away, also those that connect later."""
        self._is_away = is_away
        for each in self.links:
            each.tell_away(is_away)

    def greeting(self, hello: evaluator_pb2.Hello) -> list[bytes]:
        """Return the frames for a gate that has found its instance."""
        hello.built_in = self._built_in
        frames = [link.frame(link.HELLO, hello.SerializeToString())]
        return [*frames, link.away_frame(True)] if self._is_away else frames

    def connect(self) -> GateLink:
        """Return the end of a new connection."""
        return GateLink(self)

    async def stop(self, grace_s: float) -> None:
        """Close all links after what waits to be sent; abort those that are still open after ``grace_s``."""
        for each in list(self.links):
            each.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._all_closed.wait()
        self.abort()

    def abort(self) -> None:
        """End all links at once."""
        for each in list(self.links):
            each.abort()

    def entered(self, each: GateLink) -> None:
        """Count an open link."""
        self.links.add(each)
        self._all_closed.clear()

    def left(self, each: GateLink) -> None:
        """Forget a link that has ended."""
        self.links.discard(each)
        if not self.links:
            self._all_closed.set()


class GateLink(link.Link):
    """The instance's end of one link. If the gate leaves, it abandons all its calls."""

    def __init__(self, server: LinkServer) -> None:
        super().__init__()
        self._server = server
        self._answerer: Answerer | None = None
        self._requests: dict[int, Request] = {}
        self._deadlines = Deadlines(self._requests, self._expire)
        # Of large answers.
        self._unsent_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._server.entered(self)
        self.send(link.PREFACE)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._server.left(self)
        self._deadlines.close()
        for request in list(self._requests.values()):
            request.abandon()
        self._requests.clear()
        self._give()

    def frame_received(self, kind: int, data: link.Buffer, start: int, end: int) -> None:
        if self._answerer is None:
            if kind != link.HELLO:
                raise link.Malformed("the gate did not begin with a HELLO")
            self._greet(data, start, end)
        elif kind == link.CALL:
            self._begin(link.read_call(data, start, end), self._answerer)
        elif kind == link.CANCEL:
            for id_ in link.read_ids(data, start, end):
                self.drop(id_)
                request = self._requests.pop(id_, None)
                if request:
                    request.abandon()
            self._give_sent()
        elif kind != link.ALIVE:
            raise link.Malformed(f"a frame of kind {kind}")

    def _greet(self, data: link.Buffer, start: int, end: int) -> None:
        try:
            wanted = evaluator_pb2.Hello.FromString(bytes(data[start:end]))
        except DecodeError:
            raise link.Malformed("the HELLO is malformed") from None
        own = self._server.instance
        if own is None:
            self._refuse(evaluator_pb2.Hello(refusal="the net is still being loaded"))
            return
        hello = evaluator_pb2.Hello(app=own.app, version=own.version, instance=own.id)
        if wanted.digest:
            hello.digest = own.digest
        if link.named(hello) != link.named(wanted):
            other = wanted.instance != own.id
            hello.refusal = f"this is instance {own.id!r} of app {own.app!r}" + (
                f", not {wanted.instance!r}" if other else f" {own.version!r}, with other content than wanted"
            )
            self._refuse(hello)
            return
        self._answerer = self._server.answerer
        self.greet()
        self.send(*self._server.greeting(hello))

    def tell_away(self, is_away: bool) -> None:
        """Tell the gate whether the instance is away."""
        if self._answerer:
            self.send(link.away_frame(is_away))

    def _refuse(self, hello: evaluator_pb2.Hello) -> None:
        self.send(link.frame(link.HELLO, hello.SerializeToString()))
        self.close()

    def _begin(self, call: link.Call, answerer: Answerer) -> None:
        if call.id in self._requests:
            raise link.Malformed("two calls have one id")
        request = answerer.begin(call, self)
        if request.ended:
            return
        self._requests[call.id] = request
        if call.timeout_us:
            self._deadlines.add(time.monotonic() + call.timeout_us / 1e6, call.id)
        if len(self._requests) >= link.MOST_OPEN:
            self.pause()

    def hold(self, count: int) -> bool:
        held = self._server.held.take(count, large=True)
        self._unsent_bytes += count if held else 0
        return held

    def _give_sent(self) -> None:
        """Stop counting answers once they are sent."""
        if self._unsent_bytes and self.writable and not self.sends_long:
            self._give()

    def _give(self) -> None:
        self._server.held.give(self._unsent_bytes)
        self._unsent_bytes = 0

    def flush(self) -> None:
        super().flush()
        self._give_sent()

    def pump(self) -> None:
        super().pump()
        self._give_sent()

    def reply(self, reply: link.Reply) -> None:
        self._requests.pop(reply.id, None)
        response = reply.response
        head = link.reply_head(*reply[:-1], len(response))
        if len(response) < link.LONG_BYTES:
            self.send(head, response)
        else:
            self.send_long(reply.id, head, response)
        if not self.writable and self._leaves_unread():
            self.pause()
        elif self.paused:
            self._resume()

    def _leaves_unread(self) -> bool:
        assert self.transport
        if self.transport.get_write_buffer_size() > _MOST_SHORT_BYTES:
            return True
        return self.unsent_bytes > _MOST_UNSENT_BYTES

    def _resume(self) -> None:
        if len(self._requests) <= _FEW_OPEN and (self.writable or not self._leaves_unread()):
            self.resume()

    def _expire(self, id_: int) -> None:
        self._requests[id_].expire()

    @property
    def is_busy(self) -> bool:
        # The gate takes a call that it has begun to send for one that this end knows of.
        return bool(self._requests) or self.reader.is_amid

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.paused:
            self._resume()
