"""Blobs that share memory in Caffe, where writing over one writes over the others.

Caffe's Split, Flatten and Reshape give their bottom's memory another name, and so do a Slice into one part, a Concat of
one blob and a Permute that moves nothing. An in-place layer on one of the names changes what the others' readers get,
those that run later; which is never what was meant, and ONNX has no such thing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from .errors import ConversionError
from .net_plan import BlobRef, NetLayer, NetPlan

_AT_THE_END = 2**62


def refuse_overwritten(plan: NetPlan, outputs: Sequence[BlobRef]) -> None:
    """Fails where a layer writes in place over a blob whose memory has another name that is read afterwards.

    Raises:
        ConversionError: with that layer's name and type, and both blobs.
    """
    last_read: dict[BlobRef, int] = {}
    for i, layer in enumerate(plan.layers):
        last_read.update((ref, i) for ref in layer.bottoms)
    last_read.update((ref, _AT_THE_END) for ref in outputs)
    memory: dict[BlobRef, int] = {}
    names: dict[int, list[BlobRef]] = defaultdict(list)
    for i, layer in enumerate(plan.layers):
        for top, source in zip(layer.tops, _sources(layer), strict=True):
            if source is None:
                place = len(memory)
            else:
                place = memory.setdefault(source, len(memory))
                names[place] = names[place] or [source]
                if _writes_in_place(layer, top, source):
                    _check(layer, source, names[place], last_read, i)
                    names[place].remove(source)
            memory[top] = place
            names[place].append(top)


def _sources(layer: NetLayer) -> list[BlobRef | None]:
    """For each top the bottom in whose memory it lies."""
    if _renames(layer) and layer.bottoms:
        return [layer.bottoms[0]] * len(layer.tops)
    pairs = [*zip(layer.tops, layer.bottoms, strict=False)]
    found: list[BlobRef | None] = [bottom if top.name == bottom.name else None for top, bottom in pairs]
    return found + [None] * (len(layer.tops) - len(found))


def _renames(layer: NetLayer) -> bool:
    match layer.spec.type:
        case "Split" | "Flatten" | "Reshape":
            return True
        case "Slice":
            return len(layer.tops) == 1
        case "Concat":
            return len(layer.bottoms) == 1
        case "Permute":
            order = list(layer.spec.param.permute_param.order)
            return order == [*range(len(order))]
    return False


def _writes_in_place(layer: NetLayer, top: BlobRef, bottom: BlobRef) -> bool:
    # A Dropout changes nothing at test time.
    return not _renames(layer) and layer.spec.type != "Dropout" and top.name == bottom.name


def _check(
    layer: NetLayer, written: BlobRef, names: Sequence[BlobRef], last_read: dict[BlobRef, int], now: int
) -> None:
    for other in names:
        if other != written and last_read.get(other, -1) > now:
            raise ConversionError(
                f"writes in place over {written.name!r}, whose memory in Caffe is also that of {other.name!r}, "
                "which is read afterwards; a top of another name says what is meant",
                layer=layer.spec.name,
                layer_type=layer.spec.type,
            )
