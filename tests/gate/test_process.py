"""A gate that cannot know callers as it is told says so at its start, and what to do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--caller-keys", "good.json"], "--caller-keys needs --edge-key"),
        (["--caller-keys", "none.json", "--edge-key", "edge.key"], "can't read none.json for --caller-keys"),
        (["--caller-keys", "wrong.json", "--edge-key", "edge.key"], "wrong.json of --caller-keys: "),
        (["--edge-key", "none.key"], "can't read none.key for --edge-key"),
    ],
)
def test_wrong_files_of_callers_end_the_start(tmp_path: Path, flags: list[str], reason: str) -> None:
    (tmp_path / "good.json").write_text('{"keys": []}')
    (tmp_path / "wrong.json").write_text('{"keys": [{"secret_key": "never-shown-to-anybody"}]}')
    (tmp_path / "edge.key").write_text("k" * 32)
    command = [sys.executable, "-m", "gate", "--listen", "127.0.0.1:0", *flags]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 1
    assert reason in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert "never-shown" not in run.stdout + run.stderr
