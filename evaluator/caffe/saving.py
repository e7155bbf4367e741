"""Writes a model to a file, piece by piece: serialized as a whole its weights would be in memory twice more."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import onnx
from google.protobuf.message import Message

from . import wire

_Message = TypeVar("_Message", bound=Message)
_GRAPH = onnx.ModelProto.DESCRIPTOR.fields_by_name["graph"].number
_INITIALIZER = onnx.GraphProto.DESCRIPTOR.fields_by_name["initializer"].number


def write(model: onnx.ModelProto, path: Path) -> None:
    """Writes the model to `path` all at once: whatever happens, the file is the old one or the new one.

    Raises:
        OSError: it cannot be written.
    """
    check_target(path)
    try:
        _write(model, Path(os.path.realpath(path)))
    except OSError as error:
        # The user knows nothing of the temporary file.
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_target(path: Path) -> None:
    """Raises OSError where something is at `path` that no file may replace: a folder, a device, a FIFO."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; -o names a file", str(path))
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "is there and is no file that could be replaced", str(path))


def _write(model: onnx.ModelProto, target: Path) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
    try:
        with open(handle, "wb") as file:
            # mkstemp lets nobody else read; the file shall have the rights of any other new file.
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            file.writelines(_pieces(model))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def size(model: onnx.ModelProto) -> int:
    """The bytes of the model's file."""
    return sum(map(len, _pieces(model)))


def _pieces(model: onnx.ModelProto) -> Iterator[bytes]:
    """The serialized model; a weight a piece. A message's fields may come in any order."""
    rest = _without(model.graph, "initializer").SerializeToString(deterministic=True)
    lengths = [tensor.ByteSize() for tensor in model.graph.initializer]
    heads = [wire.length_field(_INITIALIZER, length) for length in lengths]
    yield _without(model, "graph").SerializeToString(deterministic=True)
    yield wire.length_field(_GRAPH, len(rest) + sum(map(len, heads)) + sum(lengths))
    yield rest
    for head, tensor in zip(heads, model.graph.initializer, strict=True):
        yield head
        yield tensor.SerializeToString(deterministic=True)


def _without(message: _Message, name: str) -> _Message:
    """A copy of the message but for one field."""
    copy = type(message)()
    for field, value in message.ListFields():
        if field.name == name:
            continue
        if field.is_repeated:
            getattr(copy, field.name).MergeFrom(value)
        elif field.message_type is not None:
            getattr(copy, field.name).CopyFrom(value)
        else:
            setattr(copy, field.name, value)
    return copy


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
