"""Refuse nets in which an in-place layer overwrites a blob that shares memory with another blob.

In Caffe, the tops of Split, Flatten and Reshape share their bottom's memory. So do the tops of a Slice into one part, a
Concat of one blob and a Permute that moves nothing. An in-place layer on one of these blobs also changes the others for
every layer that reads them later. This is never intended, and ONNX cannot express it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from .errors import ConversionError
from .net_plan import BlobRef, NetLayer, NetPlan

_NET_END = 2**62


def refuse_overwritten(plan: NetPlan, outputs: Sequence[BlobRef]) -> None:
    """Check that no layer overwrites the memory of another blob that is read later.

    Args:
        outputs: the outputs of the model, which count as read at the end of the net.

    Raises:
        ConversionError: a layer does; the message names the layer and both blobs.
    """
    last_read: dict[BlobRef, int] = {}
    for i, layer in enumerate(plan.layers):
        last_read.update((ref, i) for ref in layer.bottoms)
    last_read.update((ref, _NET_END) for ref in outputs)
    buffer_of: dict[BlobRef, int] = {}
    blobs_in: dict[int, list[BlobRef]] = defaultdict(list)
    for i, layer in enumerate(plan.layers):
        for top, source in zip(layer.tops, _sources(layer), strict=True):
            if source is None:
                buffer = len(buffer_of)
            else:
                buffer = buffer_of.setdefault(source, len(buffer_of))
                blobs_in[buffer] = blobs_in[buffer] or [source]
                if _writes_in_place(layer, top, source):
                    _check(layer, source, blobs_in[buffer], last_read, i)
                    blobs_in[buffer].remove(source)
            buffer_of[top] = buffer
            blobs_in[buffer].append(top)


def _sources(layer: NetLayer) -> list[BlobRef | None]:
    """Return, for each top, the bottom whose memory it shares, or None."""
    if _shares_memory(layer) and layer.bottoms:
        return [layer.bottoms[0]] * len(layer.tops)
    pairs = [*zip(layer.tops, layer.bottoms, strict=False)]
    found: list[BlobRef | None] = [bottom if top.name == bottom.name else None for top, bottom in pairs]
    return found + [None] * (len(layer.tops) - len(found))


def _shares_memory(layer: NetLayer) -> bool:
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
    # Dropout does nothing at test time.
    return not _shares_memory(layer) and layer.spec.type != "Dropout" and top.name == bottom.name


def _check(
    layer: NetLayer, written: BlobRef, sharing: Sequence[BlobRef], last_read: dict[BlobRef, int], now: int
) -> None:
    for other in sharing:
        if other != written and last_read.get(other, -1) > now:
            raise ConversionError(
                f"overwrites {written.name!r} in place, but in Caffe {other.name!r} shares its memory and is read "
                "later; give the top another name",
                layer=layer.spec.name,
                layer_type=layer.spec.type,
            )
