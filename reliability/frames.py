"""Raw HTTP/2 frames, for peers that do what no client library does."""

from __future__ import annotations

import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return an HTTP/2 frame (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def field(name: bytes, value: bytes) -> bytes:
    """Return a header field, neither packed nor indexed (RFC 7541, section 6.2.2)."""
    return b"\0" + _length(name) + name + _length(value) + value


def _length(text: bytes) -> bytes:
    """Return the length of a text, as an integer with a prefix of seven bits (RFC 7541, section 5.1)."""
    left = len(text) - 127
    if left < 0:
        return bytes([len(text)])
    encoded = bytearray([127])
    while left >= 128:
        encoded.append(left & 127 | 128)
        left >>= 7
    encoded.append(left)
    return bytes(encoded)


def http2_start() -> bytes:
    """Return what a client sends first."""
    return PREFACE + frame(SETTINGS, 0, 0)


def http2_headers(path: str, content_type: str, method: str = "POST") -> bytes:
    """Return a header block of a request."""
    fields = {
        ":method": method,
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "content-type": content_type,
        "te": "trailers",
    }
    return b"".join(field(name.encode(), value.encode()) for name, value in fields.items())
