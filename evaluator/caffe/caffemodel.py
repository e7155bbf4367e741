"""Read the weights of a caffemodel: a list of blobs for each layer name.

A caffemodel also contains the structure of the training net. That structure can differ from the deploy net's, so only
the blobs are read. Field numbers come from `caffe.proto`.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import wire
from .caffe_pb2 import BlobProto, BlobShape, LayerParameter, NetParameter, V1LayerParameter
from .errors import ConversionError

FloatArray = NDArray[np.float32]

# The size limit of a protocol buffer, and an ONNX file is one.
MAX_BYTES = 2**31 - 1
# Real layers have at most a dozen blobs, and writers store each blob in one piece.
_MAX_BLOBS, _MAX_PIECES = 1000, 10_000


@dataclass(frozen=True)
class StoredBlob:
    """One weight as stored.

    Attributes:
        dims: the stored shape; its product is the size of `data`.
        data: flat float32; a view of the file's bytes if the file stores packed little-endian float32.
    """

    dims: tuple[int, ...]
    data: FloatArray


Weights = dict[str, list[StoredBlob]]


def read_bytes(path: Path, limit: int) -> bytes:
    """Return the bytes of a file.

    Raises:
        ConversionError: the file cannot be read, is not a regular file, or has more than `limit` bytes.
    """
    name = path.name or str(path)
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConversionError("cannot be read: not a regular file", file=name)
            if status.st_size > limit:
                raise ConversionError(f"has {status.st_size} bytes, more than the limit of {limit}", file=name)
            data = file.read(status.st_size + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        raise ConversionError(f"cannot be read: {reason}", file=name) from error
    if len(data) > status.st_size:
        raise ConversionError("cannot be read: the file grew during the read", file=name)
    return data


def _open_at_once(path: str, flags: int) -> int:
    """Open without blocking: opening a FIFO would wait for a writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def parse_weights(data: bytes, file: str) -> Weights:
    """Return the blobs of every layer that has any, for new and old (V1) layers.

    Args:
        data: a serialized NetParameter.
        file: the file name for error messages.

    Raises:
        ConversionError: the data is not a caffemodel, a blob's dimensions do not match its data, or two layers with
            one name have weights.
    """
    scanner = wire.Scanner(data)
    weights: Weights = {}
    try:
        for field in scanner.fields(0, len(data)):
            if field.wire_type != wire.LENGTH:
                continue
            if field.number == NetParameter.LAYER_FIELD_NUMBER:
                numbers = LayerParameter.NAME_FIELD_NUMBER, LayerParameter.BLOBS_FIELD_NUMBER
            elif field.number == NetParameter.LAYERS_FIELD_NUMBER:
                numbers = V1LayerParameter.NAME_FIELD_NUMBER, V1LayerParameter.BLOBS_FIELD_NUMBER
            else:
                continue
            name, blobs = _layer(scanner, field, *numbers)
            if blobs and name in weights:
                raise ConversionError("two layers with this name have weights", layer=name, file=file)
            if blobs:
                weights[name] = blobs
    except wire.WireError as error:
        raise ConversionError(f"is not a caffemodel: {error}", file=file) from error
    return weights


def read_blob(path: Path | str) -> FloatArray:
    """Read a file that contains a single BlobProto, such as `mean.binaryproto`.

    Returns:
        float32 in the stored shape; for a mean file usually (1, 3, H, W) with BGR planes.

    Raises:
        ConversionError: the file cannot be read, is not a BlobProto, contains no data, or has dimensions that do not
            match its data.
    """
    path = Path(path)
    data = read_bytes(path, MAX_BYTES)
    try:
        blob = _blob(wire.Scanner(data), 0, len(data))
    except wire.WireError as error:
        raise ConversionError(f"is not a BlobProto: {error}", file=path.name) from error
    if blob.data.size == 0:
        raise ConversionError("contains no data", file=path.name)
    return blob.data.reshape(blob.dims)


def _layer(
    scanner: wire.Scanner, layer: wire.Field, name_number: int, blobs_number: int
) -> tuple[str, list[StoredBlob]]:
    name, blobs = "", []
    for field in scanner.fields(layer.start, layer.stop):
        if field.wire_type != wire.LENGTH:
            continue
        if field.number == name_number:
            name = scanner.data[field.start : field.stop].decode("utf-8", "replace")
        elif field.number == blobs_number:
            blobs.append((field.start, field.stop))
            if len(blobs) > _MAX_BLOBS:
                raise wire.WireError(f"layer {name!r} has more than {_MAX_BLOBS} blobs")
    try:
        return name, [_blob(scanner, start, stop) for start, stop in blobs]
    except wire.WireError as error:
        raise wire.WireError(f"layer {name!r}: {error}") from error


_LEGACY_DIMS = (
    BlobProto.NUM_FIELD_NUMBER,
    BlobProto.CHANNELS_FIELD_NUMBER,
    BlobProto.HEIGHT_FIELD_NUMBER,
    BlobProto.WIDTH_FIELD_NUMBER,
)


def _blob(scanner: wire.Scanner, start: int, stop: int) -> StoredBlob:
    legacy: dict[int, int] = {}
    dims: tuple[int, ...] | None = None
    parts: list[NDArray[np.float32] | NDArray[np.float64]] = []
    position = start
    while position < stop:
        field = scanner.field(position, stop)
        position = field.stop
        if field.number in _LEGACY_DIMS and field.wire_type == wire.VARINT:
            legacy[field.number] = wire.signed(field.value)
        elif field.number == BlobProto.SHAPE_FIELD_NUMBER and field.wire_type == wire.LENGTH:
            dims = _shape(scanner, field)
        elif field.number in (BlobProto.DATA_FIELD_NUMBER, BlobProto.DOUBLE_DATA_FIELD_NUMBER):
            part, position = _numbers(scanner, field, stop)
            parts.append(part)
            if len(parts) > _MAX_PIECES:
                raise wire.WireError(f"a blob has more than {_MAX_PIECES} pieces")
    values = parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.float32), *parts])
    if dims is None:
        dims = tuple(legacy.get(number, 0) for number in _LEGACY_DIMS) if legacy else (values.size,)
    return StoredBlob(_fitting(dims, values.size), values.astype(np.float32, copy=False))


def _shape(scanner: wire.Scanner, shape: wire.Field) -> tuple[int, ...]:
    dims: list[int] = []
    for field in scanner.fields(shape.start, shape.stop):
        if field.number != BlobShape.DIM_FIELD_NUMBER:
            continue
        if field.wire_type == wire.LENGTH:
            dims += scanner.varints(field.start, field.stop)
        elif field.wire_type == wire.VARINT:
            dims.append(wire.signed(field.value))
    return tuple(dims)


def _numbers(
    scanner: wire.Scanner, field: wire.Field, stop: int
) -> tuple[NDArray[np.float32] | NDArray[np.float64], int]:
    is_float = field.number == BlobProto.DATA_FIELD_NUMBER
    size = 4 if is_float else 8
    if field.wire_type == wire.LENGTH:
        length = field.stop - field.start
        if length % size:
            raise wire.WireError(f"byte {field.start}: {length} bytes of data are not a multiple of {size}")
        raw, position = np.frombuffer(scanner.data, np.uint8, length, field.start), field.stop
    elif field.wire_type == (wire.FIXED32 if is_float else wire.FIXED64):
        raw, position = scanner.run(field, stop)
    else:
        raise wire.WireError(f"byte {field.start}: data has the wire type {field.wire_type}")
    flat = np.ascontiguousarray(raw).reshape(-1)
    return (flat.view("<f4") if is_float else flat.view("<f8")), position


def _fitting(dims: tuple[int, ...], size: int) -> tuple[int, ...]:
    count = 1
    for dim in dims:
        count *= dim
        # Checked at every step: a product of many large dimensions would be slow to compute.
        if dim < 0 or count > MAX_BYTES:
            raise wire.WireError(f"a blob has the dimensions {list(dims)[:8]}")
    if count != size:
        raise wire.WireError(f"a blob with the dimensions {list(dims)[:8]} has {size} numbers")
    return dims
