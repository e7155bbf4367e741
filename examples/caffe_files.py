"""Write the files of a Caffe release: caffemodel, mean, and the tar around them.

The binary files are protobuf messages with a handful of fields. This module encodes them by hand, without generated
code. Wire format: https://protobuf.dev/programming-guides/encoding/. Field numbers: Caffe's caffe.proto.
"""

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

MTIME = 1541764800  # 2018-11-09T12:00:00Z; any fixed time makes the tar reproducible


def varint(value: int) -> bytes:
    """Return an unsigned integer of the wire format, seven bits in a byte, the least significant first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _int_field(number: int, value: int) -> bytes:
    return varint(number << 3) + varint(value)


def delimited(number: int, value: bytes) -> bytes:
    """Return a length-delimited field: a string, packed numbers or an embedded message."""
    return varint(number << 3 | 2) + varint(len(value)) + value


def _blob(array: Array) -> bytes:
    """Return a BlobProto: data = 5 (packed floats), shape = 7 (a BlobShape, dim = 1, packed)."""
    shape = delimited(1, b"".join(varint(size) for size in array.shape))
    return delimited(5, array.astype("<f4").tobytes()) + delimited(7, shape)


def caffemodel(name: str, layers: Sequence[tuple[str, str, Sequence[Array]]]) -> bytes:
    """Return a NetParameter: name = 1, layer = 100. A layer has a name (1), a type (2) and blobs (7)."""
    fields = [delimited(1, name.encode())]
    for layer, kind, blobs in layers:
        message = delimited(1, layer.encode()) + delimited(2, kind.encode())
        fields.append(delimited(100, message + b"".join(delimited(7, _blob(blob)) for blob in blobs)))
    return b"".join(fields)


def binaryproto(mean: Array) -> bytes:
    """Encode a mean image (3, height, width), BGR, as a BlobProto; fields 1..4 are num, channels, height, width."""
    dims = b"".join(_int_field(number, size) for number, size in enumerate((1, *mean.shape), start=1))
    return dims + delimited(5, mean.astype("<f4").tobytes())


def write_tar(path: Path, members: Mapping[str, bytes]) -> None:
    """Write an uncompressed tar whose bytes depend only on its members."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(members):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.mode = len(members[name]), MTIME, 0o644
            tar.addfile(info, io.BytesIO(members[name]))
