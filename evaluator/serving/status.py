"""What an instance says of itself: where it is in its life, why it failed, how its net runs."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import orjson
import structlog

from evaluator.worker.plan import Plan

log = structlog.get_logger()


class State(StrEnum):
    """Where an instance is in its life, in this order."""

    LOADING = "loading"
    SERVING = "serving"
    LEAVING = "leaving"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass
class Status:
    """The instance's own account, and the file it is kept in, which outlives the process."""

    app: str
    version: str
    file: Path | None = None
    state: State = State.LOADING
    reason: str = ""
    """Why it failed, in one line."""
    address: str = ""
    device: str = ""
    plan: Plan | None = None
    changed_s: float = field(default_factory=time.time)

    def set(self, state: State, reason: str = "", **known: Any) -> None:
        """Goes on to ``state``, with what is known from now on."""
        self.state, self.reason, self.changed_s = state, reason, time.time()
        for name, value in known.items():
            setattr(self, name, value)
        self.write()

    def write(self) -> None:
        """Leaves the status in the file, if there is one: in place, as Kubernetes mounts a termination log."""
        if self.file:
            try:
                self.file.write_bytes(self.to_json())
            except OSError as error:
                log.warning("the status can't be written", reason=error.strerror)

    def to_json(self) -> bytes:
        """One object; ``since`` is when the state was reached, in RFC 3339."""
        return orjson.dumps(
            {
                "app": self.app,
                "version": self.version,
                "state": self.state,
                "reason": self.reason,
                "since": datetime.fromtimestamp(self.changed_s, UTC).isoformat(timespec="milliseconds"),
                "address": self.address,
                "device": self.device,
                "plan": asdict(self.plan) if self.plan else None,
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )
