"""Run processes at the memory limits of their pods, where this machine lets a program make cgroups (version 1)."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import yaml

from atserving.errors import StartError
from atserving.local.examples import ROOT

_CONTROLLER = Path("/sys/fs/cgroup/memory")
_KINDS = ("envoy", "gate")
_UNITS = {"Mi": 1 << 20, "Gi": 1 << 30}


def limits() -> Mapping[str, int]:
    """Return the memory limit of Envoy's and of a gate's pod in bytes, as the manifests have them."""
    return {kind: _limit(ROOT / "k8s" / "base" / f"{kind}.yaml") for kind in _KINDS}


def _limit(path: Path) -> int:
    for document in yaml.safe_load_all(path.read_text()):
        if document["kind"] == "Deployment":
            text = document["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
            if found := re.fullmatch(r"(\d+)(Mi|Gi)", text):
                return int(found[1]) * _UNITS[found[2]]
    raise StartError(f"{path} has no memory limit in Mi or Gi")


class Pods:
    """A cgroup for each process. A context manager: leaving removes the cgroups, whose processes have ended by then."""

    def __init__(self) -> None:
        self._limits = limits()
        self._folder = _CONTROLLER / f"atserving-{os.getpid()}"
        self._made: list[Path] = []

    def __enter__(self) -> Pods:
        try:
            self._make(self._folder)
        except OSError as error:
            raise StartError(f"{_CONTROLLER} is no controller of cgroups v1 that you may write: {error}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for folder in reversed(self._made):
            # A process that was killed may still be on its way out. An empty cgroup that is left behind costs nothing.
            with suppress(OSError):
                folder.rmdir()

    def command(self, name: str, kind: str, command: Sequence[str]) -> list[str]:
        """Return a command line that runs ``command`` at the limit of its kind, if it has one."""
        if kind not in self._limits:
            return list(command)
        folder = self._folder / name
        self._make(folder)
        (folder / "memory.limit_in_bytes").write_text(str(self._limits[kind]))
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(folder / "cgroup.procs"), *command]

    def _make(self, folder: Path) -> None:
        folder.mkdir()
        self._made.append(folder)
