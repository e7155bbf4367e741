"""Raw HTTP/2 frames, for peers that do what no client library does."""

from reliability.frames import DATA, GOAWAY, HEADERS, PING, PREFACE, RST_STREAM, SETTINGS, WINDOW_UPDATE, field, frame

__all__ = [
    "DATA",
    "GOAWAY",
    "HEADERS",
    "PING",
    "PREFACE",
    "RST_STREAM",
    "SETTINGS",
    "WINDOW_UPDATE",
    "field",
    "frame",
]
