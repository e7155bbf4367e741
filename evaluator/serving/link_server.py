"""The instance's end of the links from gates (:mod:`atserving.link`)."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from typing import Protocol

import structlog
from google.protobuf.message import DecodeError

from atserving import link
from atserving.config import Instance
from atserving.deadlines import Deadlines
from atserving.held import HeldBytes
from atserving.v1 import evaluator_pb2

log = structlog.get_logger()

# Resuming for each single reply would cost more than it brings.
_SETTLE_S = 0.02
_FEW_OPEN = link.MOST_OPEN * 3 // 4
# The instance takes no more calls of a gate that leaves so much unread: short replies, and all together.
_MOST_SHORT_BYTES, _MOST_UNSENT_BYTES = 16 << 20, 128 << 20
# The transport writes so much in one go, and keeps all of it until the last byte has left.
_TOGETHER_BYTES = 5 << 20


class Replier(Protocol):
    """Takes the reply to a call."""

    def hold(self, count: int) -> bool:
        """Count a large answer of so many bytes, which :meth:`reply` gets; return False if there is no room for it."""

    def reply(self, reply: link.Reply, held: int = 0) -> None:
        """Send the reply; its id is the call's. ``held`` bytes are counted for it, until it has left."""


class Request(Protocol):
    """A call that an instance works on. It replies once, unless it was abandoned."""

    ended: bool

    def abandon(self) -> None:
        """End it without a reply, since its caller has left."""

    def expire(self) -> None:
        """End it with an error, since its deadline has passed."""


class Answerer(Protocol):
    """Answers calls."""

    def admit(self, id_: int, length: int, replier: Replier) -> bool:
        """Count a long call that begins to arrive, and return True; otherwise send its refusal."""

    def begin(self, call: link.Call, replier: Replier, held: int | None = None) -> Request:
        """Begin a call. It may already have its reply on return.

        ``held`` bytes are counted for it, and given back at its end; None: it counts them itself.
        """


class LinkServer:
    """Makes the instance's end of each link. It refuses gates until it serves."""

    def __init__(self, held: HeldBytes) -> None:
        self.held = held
        held.reclaim = self._give_left
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

    async def settled(self) -> None:
        """Return once no call is arriving, and no answer is leaving, on any link."""
        while True:
            if not any(each.is_amid for each in self.links):
                return
            await asyncio.sleep(_SETTLE_S)

    def abort(self) -> None:
        """End all links at once."""
        for each in list(self.links):
            each.abort()

    def _give_left(self) -> None:
        for each in self.links:
            each.give_left()

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
        self.reader.admit, self.reader.take_long = self._admit, self._take_long
        # The bytes that are counted for the long calls that arrive, and for the long answers that leave.
        self._arriving: dict[int, int] = {}
        self._leaving_long: dict[int, int] = {}
        # Of answers that were written: the byte after which each has left, and the bytes that are counted for it. The
        # bytes that were written are counted while there are any.
        self._leaving: deque[tuple[int, int]] = deque()
        self._written = 0

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
        leaving = (held for _, held in self._leaving)
        self._server.held.give(sum(self._arriving.values()) + sum(self._leaving_long.values()) + sum(leaving))
        self._arriving.clear()
        self._leaving_long.clear()
        self._leaving.clear()

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
                self._server.held.give(self._arriving.pop(id_, 0))
                self._leave(self._leaving_long.pop(id_, 0))
                request = self._requests.pop(id_, None)
                if request:
                    request.abandon()
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

    def _admit(self, id_: int, length: int) -> bool:
        """Count a long call before it arrives, or refuse it: its gate then sends no more of it."""
        assert self._answerer
        if id_ in self._requests or id_ in self._leaving_long:
            raise link.Malformed("two calls have one id")
        if length < link.LONG_BYTES:
            raise link.Malformed(f"a long frame of {length} bytes")
        if not self._answerer.admit(id_, length, self):
            return False
        self._arriving[id_] = length
        return True

    def _take_long(self, id_: int, kind: int, data: link.Buffer) -> None:
        if kind != link.CALL:
            raise link.Malformed(f"a long frame of kind {kind}")
        call = link.read_call(data, 0, len(data))
        if call.id != id_:
            raise link.Malformed("a long call has the id of another")
        assert self._answerer
        self._begin(call, self._answerer, self._arriving.pop(id_))

    def _begin(self, call: link.Call, answerer: Answerer, held: int | None = None) -> None:
        if call.id in self._requests or call.id in self._arriving or call.id in self._leaving_long:
            raise link.Malformed("two calls have one id")
        request = answerer.begin(call, self, held)
        if request.ended:
            return
        self._requests[call.id] = request
        if call.timeout_us:
            self._deadlines.add(time.monotonic() + call.timeout_us / 1e6, call.id)
        if len(self._requests) >= link.MOST_OPEN:
            self.pause()

    @property
    def is_amid(self) -> bool:
        """Whether a call has arrived in part, or an answer has left in part."""
        return bool(self._arriving) or self.unsent_bytes > 0

    def hold(self, count: int) -> bool:
        return self._server.held.take(count, large=True)

    def reply(self, reply: link.Reply, held: int = 0) -> None:
        self._requests.pop(reply.id, None)
        response = reply.response
        head = link.reply_head(*reply[:-1], len(response))
        if len(response) >= link.LONG_BYTES:
            self._leaving_long[reply.id] = held
            self.send_long(reply.id, head, response)
        else:
            self.send(head, response)
            if held or not self.writable:
                self._count(held, len(response))
        if not self.writable and self._leaves_unread():
            self.pause()
        elif self.paused:
            self._resume()

    def _count(self, held: int, length: int) -> None:
        """Count a short answer until it has left: a large one, or one to a gate that reads too little."""
        if not held:
            if not self._server.held.take(length, large=False):
                log.warning("link broken", reason="the gate leaves too much unread")
                self.abort()
                return
            held = length
        self.flush()
        self._leave(held)

    def _leave(self, held: int) -> None:
        """Stop counting an answer once it has left. Its last part was written, and nothing after it."""
        if not held:
            return
        assert self.transport
        if not self._leaving:
            self._written = self.transport.get_write_buffer_size()
        self._leaving.append((self._written + _TOGETHER_BYTES, held))
        self.give_left()

    def give_left(self) -> None:
        """Stop counting the answers that have left."""
        if not self._leaving:
            return
        assert self.transport
        unsent = self.transport.get_write_buffer_size()
        while self._leaving and (not unsent or self._leaving[0][0] <= self._written - unsent):
            self._server.held.give(self._leaving.popleft()[1])

    def piece_written(self, id_: int, count: int, left: int) -> None:
        if self._leaving:
            self._written += count
            self.give_left()
        if not left:
            self._leave(self._leaving_long.pop(id_, 0))

    def flush(self) -> None:
        if self._leaving:
            self.give_left()
            self._written += sum(map(len, self._out))
        super().flush()

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
        self.give_left()
        super().resume_writing()
        if self.paused:
            self._resume()
