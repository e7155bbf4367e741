"""The plan of a net: how many engines run it, with how many threads each, and the largest batch.

An engine is a thread that runs batches.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Plan:
    """``engines`` batches run at a time, each with ``threads`` onnxruntime threads (0: onnxruntime decides)."""

    engines: int
    threads: int
    batch_size: int
    preparers: int = 0
    """Threads that only prepare requests."""
    lanes: bool = False
    """Whether engines prepare their own batches; preparers then help if that takes long."""
    reads: bool = False
    """Whether idle engines read the requests themselves, without a reader thread that wakes them."""
    wide: bool = False
    """Whether a lone request runs in a session of its own, with a thread for each CPU."""
    measured: dict[str, float] = field(default_factory=dict)
    """Measured CPU milliseconds per request with a small picture, by ``<engines>x<threads> batch <size>``; of a lone
    request the milliseconds until its result, by ``alone on <threads>``."""
