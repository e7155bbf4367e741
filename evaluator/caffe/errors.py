"""The one error of this package."""

from __future__ import annotations

# A name may be as long as its file; a message is one line to read.
_MAX_TEXT = 200


class ConversionError(Exception):
    """A Caffe net cannot be read, or cannot be converted exactly.

    The message names the file, or the layer with its type, and the reason, of long ones the beginning and the end; it
    never shows more of a path than the file's name.

    Attributes:
        reason: what is wrong, without its place.
        layer: the layer's name, or None where no layer is to blame.
        layer_type: the layer's Caffe type, or None.
        file: the file's name without its folder, or None.
    """

    def __init__(
        self,
        reason: str,
        *,
        layer: str | None = None,
        layer_type: str | None = None,
        file: str | None = None,
    ) -> None:
        self.reason = reason = _cut(reason)
        self.layer = layer = None if layer is None else _cut(layer)
        self.layer_type = layer_type = None if layer_type is None else _cut(layer_type)
        self.file = file
        place = ""
        if file is not None:
            place += f"{file}: "
        if layer is not None:
            place += f"layer {layer!r}"
            place += f" ({layer_type}): " if layer_type else ": "
        super().__init__(place + reason)


def _cut(text: str) -> str:
    half = _MAX_TEXT // 2
    return text if len(text) <= _MAX_TEXT else f"{text[:half]}…{text[-half:]}"
