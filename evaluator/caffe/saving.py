"""Write a model to a file piece by piece: serializing it at once would need two more copies of the weights."""

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
    """Write the model to `path` atomically: after a failure the old file is unchanged.

    Raises:
        OSError: the file cannot be written.
    """
    check_target(path)
    try:
        _write(model, Path(os.path.realpath(path)))
    except OSError as error:
        # Name the user's path, not the temporary file.
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_target(path: Path) -> None:
    """Check that `path` is free or a regular file.

    Raises:
        OSError: `path` is a folder, a device or a FIFO.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder; -o needs the name of a file", str(path))
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "exists and is not a regular file", str(path))


def _write(model: onnx.ModelProto, target: Path) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
    try:
        with open(handle, "wb") as file:
            # mkstemp creates the file with mode 0600; give it the mode of any other new file.
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            file.writelines(_pieces(model))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def size(model: onnx.ModelProto) -> int:
    """Return the size of the model's file in bytes."""
    return sum(map(len, _pieces(model)))


def _pieces(model: onnx.ModelProto) -> Iterator[bytes]:
    """Yield the serialized model, each weight as a piece of its own.

    The weights come last. Readers accept this: a protocol buffer's fields can be in any order.
    """
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
    """Return a copy of the message without the field `name`."""
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
