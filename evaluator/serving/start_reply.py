"""A worker's reply to START. A script may have written it itself, so it is read strictly, and shown in one line."""

from __future__ import annotations

import msgspec

from atserving import link
from evaluator.worker.plan import Plan
from evaluator.worker.progress import MAX_THREADS

_MOST_BATCH = 1 << 20
_MOST_MEASURED, _MOST_CHARS = 1000, 100
_MOST_ERROR_CHARS = 1024


class StartReply(msgspec.Struct, frozen=True):
    """The plan of a loaded net, or the error of one that did not load."""

    plan: Plan = Plan(1, 0, 1)
    longest_s: tuple[float, float] = (0.0, 0.0)
    """The longest preparation, and the longest inference."""
    gpu: str = ""
    """The UUID of its GPU; empty on a CPU."""
    error: str = ""


_DECODE = msgspec.json.Decoder(StartReply).decode


def read(payload: link.Buffer) -> StartReply:
    """Read a reply. Raises Malformed."""
    try:
        reply = _DECODE(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise link.Malformed("the start reply is malformed") from None
    plan = reply.plan
    if not (
        (1 <= plan.engines <= MAX_THREADS and 0 <= plan.preparers <= MAX_THREADS)
        and (1 <= plan.batch_size <= _MOST_BATCH and 0 <= plan.threads <= _MOST_BATCH)
        and (len(plan.measured) <= _MOST_MEASURED and all(len(name) <= _MOST_CHARS for name in plan.measured))
    ):
        raise link.Malformed("the start reply has an impossible plan")
    error = "".join(each if each.isprintable() else " " for each in reply.error[:_MOST_ERROR_CHARS])
    return msgspec.structs.replace(reply, error=error)
