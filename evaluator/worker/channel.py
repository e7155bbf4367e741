"""What goes between the evaluator and its worker over a socket: frames of protobuf or JSON.

The worker may be a release's script: what comes from it is only ever parsed, never unpickled. Calls and replies are the
messages that gates and evaluators exchange (`evaluator.proto`); how a worker starts and is set is JSON.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import cast

from atserving.v1 import evaluator_pb2

HEAD = struct.Struct("<BI")
"""Before each frame: its kind, and its length in bytes."""

MAX_BYTES_BACK = 128 << 20
"""The longest frame that is taken from a worker: replies are sent before they come to so much together."""

_LENGTH = struct.Struct("<I")


class Kind(IntEnum):
    """What a frame holds."""

    START = 1
    """To the worker: JSON, the `cfg` of the net and what else it needs to start. Back: how it went."""
    SETTINGS = 2
    """To the worker: JSON, what may change while it runs."""
    CALLS = 3
    """To the worker: Calls, see :func:`calls`."""
    CANCELLED = 4
    """To the worker: ids of calls, as JSON, that nobody waits for any more."""
    REPLIES = 5
    """From the worker: an ExchangeResponse. Each call gets one reply, be it cancelled."""


def send(channel: socket.socket, kind: Kind, payload: bytes) -> None:
    """Raises OSError where the other end has gone."""
    head = HEAD.pack(kind, len(payload))
    if len(payload) < 1 << 16:
        channel.sendall(head + payload)
    else:
        channel.sendall(head)
        channel.sendall(payload)


def receive(channel: socket.socket) -> tuple[int, bytes]:
    """One frame. Raises OSError, and EOFError where the other end has closed."""
    kind, length = HEAD.unpack(_exactly(channel, HEAD.size))
    return kind, _exactly(channel, length)


def calls(serialized: Sequence[bytes]) -> list[bytes]:
    """The payload of a frame of calls, in parts, which may be large and are not copied: each after its length."""
    return [part for each in serialized for part in (_LENGTH.pack(len(each)), each)]


def read_calls(payload: bytes) -> Iterator[evaluator_pb2.Call]:
    """The calls of a frame."""
    view, start = memoryview(payload), 0
    while start < len(view):
        (length,) = _LENGTH.unpack_from(view, start)
        start += _LENGTH.size
        yield evaluator_pb2.Call.FromString(cast(bytes, view[start : start + length]))
        start += length


def _exactly(channel: socket.socket, length: int) -> bytes:
    # One call and no copy, but where a signal cuts it short.
    data = channel.recv(length, socket.MSG_WAITALL) if length else b""
    while len(data) < length:
        more = channel.recv(length - len(data), socket.MSG_WAITALL)
        if not more:
            raise EOFError
        data += more
    return data
