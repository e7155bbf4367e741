"""Images of the largest size, in every format, for tests of short memory."""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import Image

_SIDE = 4999


def _saved(form: str, mode: str = "RGB", **options: object) -> Callable[[], bytes]:
    def save() -> bytes:
        buffer = io.BytesIO()
        Image.new(mode, (_SIDE, _SIDE)).save(buffer, form, **options)
        return buffer.getvalue()

    return save


IMAGES: dict[str, Callable[[], bytes]] = {
    "JPEG": _saved("JPEG"),
    "progressive JPEG": _saved("JPEG", progressive=True),
    "PNG": _saved("PNG"),
    "WebP": _saved("WEBP"),
    "lossless WebP": _saved("WEBP", lossless=True),
    "GIF": _saved("GIF", "P"),
    "BMP": _saved("BMP", "1"),
}
