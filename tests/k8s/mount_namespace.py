"""Run a program in a mount namespace of its own, without root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from atserving.local.child import bound_to_parent

# Arguments: the hosts file, how many paths are writable, these paths, the command.
_SCRIPT = """
set -e
mount --bind "$1" /etc/hosts
count=$2
shift 2
while [ "$count" -gt 0 ]; do
    mount --bind "$1" "$1"
    shift
    count=$((count - 1))
done
mount -o remount,ro,bind /
exec "$@"
"""


def in_namespace(command: Sequence[str], hosts: Path, writable: Sequence[Path]) -> list[str]:
    """Return a command line that runs ``command`` with its own /etc/hosts and only some writable folders and files.

    The process ends with this process. Skips the test if mount namespaces are not permitted.
    """
    return [*_namespace(), str(hosts), str(len(writable)), *map(str, writable), *command]


@cache
def _namespace() -> list[str]:
    """Return the command that runs the script with further arguments."""
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    namespace = ["unshare", "--mount", *as_root]
    if shutil.which("unshare") is None or subprocess.run([*namespace, "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces, which keep a pod to its volumes, are not available")
    # Bound within the namespace: the kernel forgets the binding when unshare changes the user.
    return [*namespace, *bound_to_parent(["sh", "-c", _SCRIPT, "sh"])]
