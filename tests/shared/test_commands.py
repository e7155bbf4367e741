"""The command line: readable help, and one clear line with a status for what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
PROGRAMS = [
    [sys.executable, "-m", "gate"],
    [sys.executable, "-m", "registry"],
    [sys.executable, "-m", "evaluator"],
    [str(BIN / "atserving"), "up"],
    [str(BIN / "atserving"), "release", "publish"],
]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={"PATH": str(BIN), **environment}, timeout=60
    )


@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_help_is_there(program: list[str]) -> None:
    said = run(*program, "--help")
    assert said.returncode == 0
    assert "Usage:" in said.stdout
    assert "--help" in said.stdout
    assert not said.stderr


@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_a_mistyped_flag_is_one_line_and_status_2(program: list[str]) -> None:
    said = run(*program, "--regisrty", "x")
    assert said.returncode == 2
    assert len(said.stderr.splitlines()) == 1
    assert "--regisrty" in said.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "gate", "--wait", "0.2", "--registry", "127.0.0.1:1", "--listen", "127.0.0.1:0"],
        ["-m", "evaluator", "--app", "a", "--version", "v", "--wait", "0.2", "--registry", "127.0.0.1:1"],
    ],
    ids=["gate", "evaluator"],
)
def test_an_unreachable_registry_is_one_line_and_status_1(command: list[str]) -> None:
    said = run(sys.executable, *command)
    assert said.returncode == 1
    assert len(said.stderr.splitlines()) == 1
    assert "127.0.0.1:1" in said.stderr


def test_the_release_commands_say_that_no_registry_is_there() -> None:
    said = run(str(BIN / "atserving"), "release", "list", "--registry", "127.0.0.1:1,127.0.0.1:2")
    assert said.returncode == 1
    assert len(said.stderr.splitlines()) == 1
    assert "127.0.0.1:2" in said.stderr


@pytest.mark.parametrize("address", ["host", "host:port", "", "host:1,,:"])
def test_an_address_that_is_none_is_named(address: str) -> None:
    said = run(sys.executable, "-m", "gate", "--registry", address)
    assert said.returncode == 2
    assert "--registry" in said.stderr


def test_a_flag_may_be_a_variable() -> None:
    said = run(
        *(sys.executable, "-m", "gate", "--wait", "0.2", "--listen", "127.0.0.1:0"), ATSERVING_REGISTRY="127.0.0.1:7"
    )
    assert said.returncode == 1
    assert "127.0.0.1:7" in said.stderr
