"""A net's graph as onnxruntime reads it, so that a process can run it without onnx, which makes and changes graphs."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from atserving.errors import StartError

if TYPE_CHECKING:
    import onnx

log = structlog.get_logger()

_MOST_REASON_BYTES = 8192


@dataclass(frozen=True)
class Graph:
    """A graph in the format of ONNX."""

    source: bytes | Path
    """The serialized model, or the file that holds it."""
    inputs: Mapping[str, Sequence[int]]
    """The sizes of each input, with the batch axis; 0 for a size that is not fixed."""

    @staticmethod
    def of(model: onnx.ModelProto) -> Graph:
        """Return the graph of a model."""
        return Graph(model.SerializeToString(), _inputs(model))


def made_apart(make: Callable[[], onnx.ModelProto], file: Path) -> Graph:
    """Return the graph of the model that ``make`` returns. It is made once, in a child process, and kept in ``file``.

    The memory that this takes goes with the child. Raises StartError as ``make`` does, and if the child fails.
    """
    sizes = file.with_suffix(".json")
    if not sizes.exists():
        try:
            _in_child(lambda: _write(make(), file, sizes))
        except StartError:
            # A child that is killed may leave a part.
            file.unlink(missing_ok=True)
            raise
    return Graph(file, json.loads(sizes.read_bytes()))


def _write(model: onnx.ModelProto, file: Path, sizes: Path) -> None:
    try:
        file.write_bytes(model.SerializeToString())
        # It comes last and at once: where it is, the graph is whole.
        unfinished = sizes.with_suffix(".part")
        unfinished.write_text(json.dumps(_inputs(model)))
        unfinished.rename(sizes)
    except OSError as error:
        raise StartError(f"can't write the converted net to the workspace: {error.strerror}") from error


def _inputs(model: onnx.ModelProto) -> dict[str, list[int]]:
    return {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.input}


def _in_child(work: Callable[[], None]) -> None:
    """Do some work in a forked child. Raises StartError if it raises one or fails in another way.

    Call it while the process has one thread, as a worker that loads its net: a child has no other threads, and would
    wait for ever for a lock that one of them held.
    """
    theirs, ours = os.pipe()
    child = os.fork()
    if not child:
        _work_and_exit(work, ours)
    os.close(ours)
    with os.fdopen(theirs, "rb") as said:
        # The text may be cut within a character.
        reason = said.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    if reason:
        raise StartError(reason)
    if status:
        code = os.waitstatus_to_exitcode(status)
        how = f"was killed by signal {-code}" if code < 0 else "failed, see the log"
        raise StartError(f"the process that converts the net {how}")


def _work_and_exit(work: Callable[[], None], says: int) -> None:
    # Finalizers of the parent's objects, such as sessions with threads, have no business here.
    gc.disable()
    status = 1
    try:
        work()
        status = 0
    except StartError as error:
        os.write(says, (str(error) or "the net can't be converted").encode()[:_MOST_REASON_BYTES])
    except BaseException:
        log.exception("conversion failed")
    finally:
        # Without cleaning up what is the parent's.
        os._exit(status)
