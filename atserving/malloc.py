"""Settings of the C library's allocator."""

from __future__ import annotations

import ctypes
from contextlib import suppress

# mallopt(3)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 64 << 20
_LARGEST_BYTES = 32 << 20


def keep_freed() -> None:
    """Let freed memory wait for its next use, up to 64 MiB, also that of large bodies.

    The C library would give a body of 1 MB back to the system and take it anew for the next, a page at a time: that
    costs more than to copy it. Another C library may lack the settings, and is left as it is.
    """
    with suppress(AttributeError, OSError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
