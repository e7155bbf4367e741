"""How a net runs on the hardware there is: how many engines, with how many threads each, and how large a batch may be.

An engine is a thread that runs batches.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Plan:
    """``engines`` batches run at a time, each with ``threads`` threads of onnxruntime (0: as onnxruntime likes)."""

    engines: int
    threads: int
    batch_size: int
    preparers: int = 0
    """Threads that only prepare requests."""
    lanes: bool = False
    """Whether engines prepare what they run; preparers then help where that takes long."""
    measured: dict[str, float] = field(default_factory=dict)
    """Milliseconds of CPU a request (of a small picture) by ``<engines>x<threads> batch <size>``; empty: none were."""
