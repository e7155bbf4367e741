"""The protocol between front and worker: frames of protobuf or JSON over a socket.

The worker may run a release's script, so the front only parses its frames and never unpickles. Calls and replies are
the messages between gates and instances (``evaluator.proto``); start and settings are JSON.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import cast

from atserving.v1 import evaluator_pb2

HEAD = struct.Struct("<BI")
"""The head of each frame: its kind, and its length in bytes."""

MAX_BYTES_BACK = 128 << 20
"""The longest frame that the front accepts from a worker, which splits larger groups of replies."""

_LENGTH = struct.Struct("<I")


class Kind(IntEnum):
    """The kind of a frame."""

    START = 1
    """To the worker: JSON with the net's ``cfg``, the plan and the delay. Back: JSON with the plan, or the error."""
    SETTINGS = 2
    """To the worker: JSON with the settings that may change at run time."""
    CALLS = 3
    """To the worker: calls, encoded by :func:`calls`."""
    CANCELLED = 4
    """To the worker: JSON, the ids of calls whose callers have left."""
    REPLIES = 5
    """From the worker: an ExchangeResponse. Each call gets one reply, also a cancelled one."""


def send(connection: socket.socket, kind: Kind, payload: bytes) -> None:
    """Send one frame. Raises OSError if the other end has closed."""
    head = HEAD.pack(kind, len(payload))
    if len(payload) < 1 << 16:
        connection.sendall(head + payload)
    else:
        connection.sendall(head)
        connection.sendall(payload)


def receive(connection: socket.socket) -> tuple[int, bytes]:
    """Receive one frame. Raises OSError, and EOFError if the other end has closed."""
    kind, length = HEAD.unpack(_exactly(connection, HEAD.size))
    return kind, _exactly(connection, length)


def calls(serialized: Sequence[bytes]) -> list[bytes]:
    """Return the payload of a frame of calls in parts: each call after its length, without a copy."""
    return [part for each in serialized for part in (_LENGTH.pack(len(each)), each)]


def read_calls(payload: bytes) -> Iterator[evaluator_pb2.Call]:
    """Decode the calls of a frame."""
    view, start = memoryview(payload), 0
    while start < len(view):
        (length,) = _LENGTH.unpack_from(view, start)
        start += _LENGTH.size
        yield evaluator_pb2.Call.FromString(cast(bytes, view[start : start + length]))
        start += length


def _exactly(connection: socket.socket, length: int) -> bytes:
    # One system call without a copy, unless a signal interrupts it.
    data = connection.recv(length, socket.MSG_WAITALL) if length else b""
    while len(data) < length:
        more = connection.recv(length - len(data), socket.MSG_WAITALL)
        if not more:
            raise EOFError
        data += more
    return data
