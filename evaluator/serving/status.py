"""The status of an instance: its state, why it failed, how its net runs."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import orjson
import structlog

from evaluator.sandbox.decision import Sandbox
from evaluator.worker.plan import Plan

log = structlog.get_logger()


class State(StrEnum):
    """The states of an instance, in order."""

    LOADING = "loading"
    SERVING = "serving"
    LEAVING = "leaving"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass
class Status:
    """The status, and the file that keeps it after the process has ended."""

    app: str
    version: str
    file: Path | None = None
    state: State = State.LOADING
    reason: str = ""
    """The reason of a failure, in one line."""
    address: str = ""
    device: str = ""
    plan: Plan | None = None
    sandbox: Sandbox | None = None
    outdated: bool = False
    """Whether the release has other content now than the instance has loaded."""
    changed_s: float = field(default_factory=time.time)

    def set(self, state: State, reason: str = "", **known: Any) -> None:
        """Enter ``state``, and set the fields in ``known``."""
        self.state, self.reason, self.changed_s = state, reason, time.time()
        for name, value in known.items():
            setattr(self, name, value)
        self.write()

    def write(self) -> None:
        """Write the status to the file, if there is one, in place: Kubernetes mounts a termination log as one file."""
        if self.file:
            try:
                self.file.write_bytes(self.to_json())
            except OSError as error:
                log.warning("status write failed", reason=error.strerror)

    def page(self, _: str) -> tuple[bytes, str]:
        """Return the JSON and its content type."""
        return self.to_json(), "application/json"

    def to_json(self) -> bytes:
        """Return one JSON object; ``since`` is the time of the last change of state, in RFC 3339."""
        return orjson.dumps(
            {
                "app": self.app,
                "version": self.version,
                "state": self.state,
                "reason": self.reason,
                "since": datetime.fromtimestamp(self.changed_s, UTC).isoformat(timespec="milliseconds"),
                "address": self.address,
                "device": self.device,
                "outdated": self.outdated,
                "plan": asdict(self.plan) if self.plan else None,
                "sandbox": _sandbox(self.sandbox) if self.sandbox else None,
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )


def _sandbox(sandbox: Sandbox) -> dict[str, Any]:
    return {
        "mode": sandbox.mode,
        "network": sandbox.network,
        "holds": sandbox.holds,
        "missing": sandbox.missing,
    }
