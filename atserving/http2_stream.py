"""One request of an HTTP/2 connection, as the application sees it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Protocol

from httpunk import HeaderMap

if TYPE_CHECKING:
    from atserving.http2 import Connection

Headers = HeaderMap
"""The headers of a message: names in lower case, values as bytes."""

NO_HEADERS = Headers()
"""The headers of a request that has ended: it may wait in a circle of references for a garbage collection."""

INTERNAL_ERROR, CANCEL, ENHANCE_YOUR_CALM = 2, 8, 11
"""Reasons for a reset (RFC 9113, section 7)."""


class Receiver(Protocol):
    """What the application does with one request. Its methods must not wait."""

    def received(self, data: bytes) -> None:
        """Take the next part of the body."""

    def ended(self) -> None:
        """Answer: the request is complete."""

    def late(self) -> None:
        """Take note that the request is still incomplete, for long."""

    def gone(self) -> None:
        """Stop: the peer has reset the request, or the connection has ended."""


class Stream:
    """One request, and the way to answer it. Sending never waits: the stream keeps what the peer can't take yet."""

    __slots__ = (
        "_connection",
        "_held",
        "_offset",
        "_outbox",
        "headers",
        "id",
        "method",
        "on_sent",
        "path",
        "paused",
        "receiver",
        "turns",
    )

    headers: Headers
    method: str
    path: str
    receiver: Receiver

    def __init__(self, connection: Connection) -> None:
        self.id = 0
        self.paused = False
        """Whether the peer should send no more than its window, until :meth:`resume`."""
        self.on_sent: Callable[[], None] | None = None
        """Called when the peer's window has taken all that was sent."""
        self.turns = 0
        """How often the connection has found the request incomplete."""
        self._connection = connection
        self._outbox: list[tuple[bytes | Headers, bool]] = []
        self._offset = 0
        self._held = 0

    @property
    def peer_names(self) -> tuple[str, ...]:
        """The URIs in the verified certificate of the connection's peer; none without TLS."""
        return self._connection.peer_names

    @property
    def peer_address(self) -> str:
        """The address of the connection's peer; empty if it is not known."""
        return self._connection.peer_address

    def respond(self, status: int, headers: Headers, body: bytes, trailers: Headers | None = None) -> None:
        """Send a whole response."""
        self.start(status, headers)
        self._outbox.append((body, trailers is None))
        if trailers is not None:
            self._outbox.append((trailers, True))
        self.pump()

    def proceed(self) -> None:
        """Send ``100 Continue``, at once: whatever happens now, the request has arrived here."""
        self._connection.send_continue(self)

    def start(self, status: int, headers: Headers, *, end: bool = False) -> None:
        """Send the status and the headers; with ``end`` they are the whole response."""
        self._connection.send_head(self, status, headers, end)

    def send(self, data: bytes) -> None:
        """Send a part of the body."""
        self._outbox.append((data, False))
        if len(self._outbox) == 1:
            self.pump()

    def end(self, trailers: Headers) -> None:
        """End the response with trailers."""
        self._outbox.append((trailers, True))
        if len(self._outbox) == 1:
            self.pump()

    def reset(self, reason: int = INTERNAL_ERROR) -> None:
        """Break the request off."""
        self._outbox.clear()
        self._connection.reset(self, reason)

    def resume(self) -> None:
        """Let the peer send more."""
        self.paused = False
        held, self._held = self._held, 0
        if held:
            self._connection.release(self, held)

    def hold(self, count: int) -> None:
        self._held += count

    @property
    def unsent(self) -> int:
        """How many parts the peer's window does not take yet."""
        return len(self._outbox)

    @property
    def is_stuck(self) -> bool:
        """Whether the connection has more to send than its peer reads."""
        return self._connection.is_stuck

    def when_sent(self, callback: Callable[[], None]) -> None:
        """Call back when all that was sent has left this process, or its connection has ended."""
        if self._outbox:
            self.on_sent = partial(self._connection.when_written, callback)
        else:
            self._connection.when_written(callback)

    def pump(self) -> None:
        """Send what the peer's window takes."""
        outbox = self._outbox
        while outbox:
            data, end = outbox[0]
            if isinstance(data, bytes):
                sent = self._connection.send_data(self, data, self._offset, end)
                if sent >= 0:
                    self._offset += sent
                    if not sent:
                        return
                    continue
                self._offset = 0
            else:
                self._connection.send_trailers(self, data)
            # The connection clears the outbox of a request that has ended.
            if outbox:
                del outbox[0]
        if self.on_sent:
            self.on_sent()

    def drop(self) -> None:
        self._outbox.clear()
        self.headers = NO_HEADERS
