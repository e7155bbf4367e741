"""The only exception that this package raises for bad input."""

from __future__ import annotations

# A name can be as long as its file, but a message has to stay readable.
_MAX_TEXT = 200


class ConversionError(Exception):
    """A Caffe net cannot be read, or cannot be converted exactly.

    The message names the file or the layer with its type, then gives the reason. Long texts are cut in the middle. A
    path is reduced to the file's name.

    Attributes:
        reason: the problem, without file or layer.
        layer: the layer's name, or None if the problem concerns no single layer.
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
        prefix = ""
        if file is not None:
            prefix += f"{file}: "
        if layer is not None:
            prefix += f"layer {layer!r}"
            prefix += f" ({layer_type}): " if layer_type else ": "
        super().__init__(prefix + reason)


def _cut(text: str) -> str:
    half = _MAX_TEXT // 2
    return text if len(text) <= _MAX_TEXT else f"{text[:half]}…{text[-half:]}"
