"""What a worker may do: the front writes it, and the worker reads it before it imports anything large."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    """What one worker may do, in a form that JSON can hold. Paths that do not exist are left out."""

    folder: str | None = None
    """Where it works, and the home of what it uses."""
    landlock: int = 0
    """The version of Landlock to use; 0: none."""
    seccomp: bool = False
    reads: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    families: tuple[int, ...] = ()
    """The families of the sockets that it may make."""
    file_bytes: int = 0
    """0: no limit."""
    open_files: int = 0
