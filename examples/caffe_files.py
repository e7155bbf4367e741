"""Writing the files of a Caffe release: prototxt, caffemodel, mean and the tar around them.

The binary ones are protobuf messages with a handful of fields, encoded here by hand, which needs no generated code:
https://protobuf.dev/programming-guides/encoding/ for the wire, Caffe's caffe.proto for the field numbers.
"""

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

MTIME = 1541764800  # 2018-11-09T12:00:00Z; any fixed time makes the tar reproducible


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _int_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _bytes_field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _blob(array: Array) -> bytes:
    """A BlobProto: data = 5 (packed floats), shape = 7 (a BlobShape, dim = 1, packed)."""
    shape = _bytes_field(1, b"".join(_varint(size) for size in array.shape))
    return _bytes_field(5, array.astype("<f4").tobytes()) + _bytes_field(7, shape)


def caffemodel(name: str, layers: Sequence[tuple[str, str, Sequence[Array]]]) -> bytes:
    """A NetParameter: name = 1, layer = 100. Each layer is its name (1), its type (2) and its blobs (7)."""
    net = _bytes_field(1, name.encode())
    for layer, kind, blobs in layers:
        message = _bytes_field(1, layer.encode()) + _bytes_field(2, kind.encode())
        message += b"".join(_bytes_field(7, _blob(blob)) for blob in blobs)
        net += _bytes_field(100, message)
    return net


def binaryproto(mean: Array) -> bytes:
    """A mean image (3, height, width), BGR, as a BlobProto whose fields 1..4 are num, channels, height, width."""
    dims = b"".join(_int_field(number, size) for number, size in enumerate((1, *mean.shape), start=1))
    return dims + _bytes_field(5, mean.astype("<f4").tobytes())


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    """Write an uncompressed tar whose bytes depend on nothing but its members."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(members):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(members[name]), MTIME, 0o644
            tar.addfile(info, io.BytesIO(members[name]))
