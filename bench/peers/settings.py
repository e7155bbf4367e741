"""How the peers run each net: the fastest settings on two cores with 32 callers, of those that ``TRIED`` has.

``python -m bench.peers.tune`` tries them again. docs/benchmarks.md has what it found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass

MOSEC, FASTAPI, FASTAPI_PROCESSES = "mosec", "fastapi", "fastapi_processes"
"""FastAPI is measured as one process with threads, and as several."""

_VARIABLE = "BENCH_SETTINGS"


@dataclass(frozen=True)
class Settings:
    """The settings of a peer."""

    processes: int = 1
    """mosec's ``num``, uvicorn's ``--workers``."""
    threads: int = 1
    """onnxruntime's threads in each process."""
    batch: int = 1
    """mosec's ``max_batch_size``."""
    wait_ms: int = 1
    """mosec's ``max_wait_time``, 1 at least."""
    requests: int = 40
    """How many requests each process of FastAPI runs at a time, in threads."""

    def environment(self) -> dict[str, str]:
        """Return the environment that tells a server's processes of it."""
        return {_VARIABLE: json.dumps(asdict(self))}

    @staticmethod
    def from_environment() -> Settings:
        return Settings(**json.loads(os.environ[_VARIABLE]))


BEST: Mapping[tuple[str, str], Settings] = {
    (MOSEC, "tiny"): Settings(processes=2, batch=8, wait_ms=2),
    (MOSEC, "mobilenet"): Settings(processes=2, batch=4),
    (FASTAPI, "tiny"): Settings(requests=2),
    (FASTAPI, "mobilenet"): Settings(requests=2),
    (FASTAPI_PROCESSES, "tiny"): Settings(processes=3, requests=2),
    (FASTAPI_PROCESSES, "mobilenet"): Settings(processes=2, requests=1),
}
"""By peer and net."""

TRIED: Mapping[str, tuple[Settings, ...]] = {
    MOSEC: (
        *(Settings(processes, 1, batch) for processes in (1, 2, 3) for batch in (1, 4, 8, 16)),
        *(Settings(2, 1, batch, wait_ms) for batch in (8, 16) for wait_ms in (2, 5)),
        *(Settings(processes, 2, batch) for processes, batch in ((1, 8), (1, 16), (2, 8))),
    ),
    FASTAPI: tuple(Settings(1, threads, requests=requests) for threads in (1, 2) for requests in (1, 2, 4, 40)),
    FASTAPI_PROCESSES: tuple(
        Settings(processes, requests=requests) for processes in (2, 3) for requests in (1, 2, 4, 40)
    ),
}
