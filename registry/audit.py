"""The audit log: one line for each call of the API for operators that writes, or that was refused."""

from __future__ import annotations

import asyncio
import atexit
import os
import stat
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from google.protobuf.message import Message

from atserving import telemetry
from atserving.admin.v1 import admin_pb2
from atserving.errors import PermissionDenied, StartError, Unauthenticated
from atserving.log_writer import LogWriter
from atserving.rpc import Context
from registry.admin.history import OPERATORS_APP
from registry.operators.known import READS, app_of

_REFUSALS = (Unauthenticated.status, PermissionDenied.status)
# In one second, for those who are known and for all others each. A flood must not fill the disk.
_MOST_FAILURES = 20
_SECOND_S = 1.0
_MOST_REASON_CHARS, _MOST_NAME_CHARS = 500, 200
_REMIND_S = 60.0


class Audit:
    """Writes the lines to the log, whatever its level, and to a file of their own if there is one."""

    def __init__(self, path: Path | None = None) -> None:
        """Raises StartError if the file can't be written."""
        self._file: LogWriter | None = None
        if path:
            file = AuditFile(path)
            self._file = LogWriter(file.write, self._dropped, file.failed)
            atexit.register(self._file.flush)
        self._failures: Counter[bool] = Counter()
        self._left_out = 0
        self._turning: asyncio.TimerHandle | None = None

    def ended(self, method: str, request: Message | None, context: Context, status: int, reason: str) -> None:
        """Take a call that has ended."""
        if method.startswith(READS) and status not in _REFUSALS:
            return
        notes = context.notes
        # A call that fails may have written all the same: its deadline passed, or its caller left, just after that.
        if status >= 400 and "keys" not in notes and not self._has_room(known="operator" in notes):
            return
        fields: dict[str, object] = {
            "method": method,
            "app": _about(request),
            "code": status,
            "reason": reason[:_MOST_REASON_CHARS],
            "operator": notes.get("operator", ""),
            "known_by": notes.get("known_by", ""),
            "address": context.peer_address,
        }
        if "role" in notes:
            fields["role"] = notes["role"]
        if not fields["operator"] and (actor := getattr(request, "actor", "")):
            fields["actor"] = actor[:_MOST_NAME_CHARS]
        if forwarded := context.header("x-forwarded-for"):
            # The last address is from Envoy; those before it are the caller's word.
            fields["forwarded_for"] = forwarded[-_MOST_NAME_CHARS:]
        for name in ("validate_only", "force"):
            if getattr(request, name, False):
                fields[name] = True
        if message := getattr(request, "message", ""):
            fields["message"] = message[:_MOST_REASON_CHARS]
        fields |= {name: notes[name] for name in ("revision_before", "revision", "keys") if name in notes}
        self._write("admin call", fields)

    def _has_room(self, *, known: bool) -> bool:
        if not self._turning:
            self._turning = asyncio.get_running_loop().call_later(_SECOND_S, self.turn)
        self._failures[known] += 1
        if self._failures[known] <= _MOST_FAILURES:
            return True
        self._left_out += 1
        return False

    def turn(self) -> None:
        """Begin a new second, and tell how many failed calls have no line."""
        if self._turning:
            self._turning.cancel()
            self._turning = None
        self._failures.clear()
        if self._left_out:
            left_out, self._left_out = self._left_out, 0
            self._write("admin calls left out", {"count": left_out})

    def _write(self, event: str, fields: dict[str, object]) -> None:
        line = telemetry.write_always(event, fields)
        if self._file:
            self._file.write(line)

    @staticmethod
    def _dropped(count: int) -> bytes:
        return telemetry.write_always("audit lines dropped", {"count": count}, "error")


class AuditFile:
    """A file that only its owner reads, and that lines are appended to.

    It is opened again once its name means another file, as after a rotation.
    """

    def __init__(self, path: Path) -> None:
        """Raises StartError."""
        self._path = path
        self._whole = True
        self._failing = False
        self._told_s = float("-inf")
        try:
            self._descriptor = self._opened()
        except OSError as error:
            raise StartError(f"can't write {path} of --audit-log: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise StartError(f"{path} of --audit-log is no regular file")
        self._end_line()

    def write(self, data: memoryview) -> int:
        """Append lines, and return how many bytes were written. Raises OSError."""
        # A line stays in one file.
        if self._whole and self._moved():
            descriptor = self._opened()
            os.close(self._descriptor)
            self._descriptor = descriptor
        count = os.write(self._descriptor, data)
        self._whole = count == 0 or data[count - 1] == ord("\n")
        if self._failing:
            self._failing = False
            self._told_s = float("-inf")
            telemetry.write_always("audit log back", {"path": str(self._path)})
        return count

    def failed(self, error: OSError) -> None:
        """Tell of a failure, at once and every minute."""
        self._failing = True
        if time.monotonic() - self._told_s >= _REMIND_S:
            self._told_s = time.monotonic()
            fields = {"path": str(self._path), "reason": str(error.strerror)}
            telemetry.write_always("audit log failed", fields, "error")

    def _end_line(self) -> None:
        """End the last line, if a process was killed amid it: the next one would be part of it."""
        with suppress(OSError), self._path.open("rb") as file:
            if size := file.seek(0, os.SEEK_END):
                file.seek(size - 1)
                if file.read() != b"\n":
                    os.write(self._descriptor, b"\n")

    def _opened(self) -> int:
        # Not blocking: a pipe without a reader would stop the start.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        return os.open(self._path, flags, 0o600)

    def _moved(self) -> bool:
        ours = os.fstat(self._descriptor)
        try:
            named = os.stat(self._path)
        except FileNotFoundError:
            return True
        return (ours.st_dev, ours.st_ino) != (named.st_dev, named.st_ino)


def _about(request: Message | None) -> str:
    """Return the app that a call is about."""
    if isinstance(request, admin_pb2.PutOperatorRequest | admin_pb2.DeleteOperatorRequest):
        return OPERATORS_APP
    return app_of(request)[:_MOST_NAME_CHARS] if request else ""
