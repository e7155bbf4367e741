"""Named meshes: which one a command means, and what a wrong file says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from atserving.local.examples import ROOT

ATSERVING = str(Path(sys.executable).parent / "atserving")


class User:
    """A user with a home of their own."""

    def __init__(self, home: Path) -> None:
        self.file = home / ".config" / "atserving" / "config.json"
        self._home = home

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        variables = {"HOME": str(self._home), "PYTHONPATH": str(ROOT), **environment}
        return subprocess.run([ATSERVING, *arguments], capture_output=True, text=True, check=False, env=variables)

    def __call__(self, *arguments: str) -> str:
        ended = self.run(*arguments)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def means(self, *arguments: str, **environment: str) -> str:
        """Return the server that a command asks; nobody is there."""
        ended = self.run("release", "list", *arguments, **environment)
        assert ended.returncode == 7, ended.stderr
        return ended.stderr.split()[2].rstrip(":")


@pytest.fixture
def user(tmp_path: Path) -> User:
    return User(tmp_path)


def test_a_context_names_a_mesh(user: User) -> None:
    assert user("context", "set", "here", "--server", "127.0.0.1:3") == "here is set\n"
    user("context", "set", "there", "--server", "127.0.0.1:4", "--edge", "http://127.0.0.1:5/")
    assert user("context", "show") == "here\n"
    assert [line.split() for line in user("context", "list").splitlines()[1:]] == [
        ["*", "here", "127.0.0.1:3"],
        ["there", "127.0.0.1:4", "http://127.0.0.1:5"],
    ]
    assert user.file.stat().st_mode & 0o077 == 0
    assert user.means() == "127.0.0.1:3"
    assert user.means("--context", "there") == "127.0.0.1:4"
    assert user.means(ATSERVING_CONTEXT="there") == "127.0.0.1:4"
    assert user.means(ATSERVING_SERVER="127.0.0.1:6") == "127.0.0.1:6"
    assert user.means("--context", "there", ATSERVING_SERVER="127.0.0.1:6") == "127.0.0.1:4"
    assert user.means("--context", "there", "--server", "127.0.0.1:7") == "127.0.0.1:7"
    user("context", "use", "there")
    assert user.means() == "127.0.0.1:4"
    asked = user.run("eval", "app", str(ROOT / "examples/digits/images/7.png"))
    assert (asked.returncode, "127.0.0.1:5" in asked.stderr) == (7, True)
    user("context", "set", "there", "--server", "127.0.0.1:8")
    assert json.loads(user.file.read_text())["contexts"]["there"]["edge"] == "http://127.0.0.1:5"
    user("context", "delete", "there")
    assert (user("context", "show"), user.means()) == ("\n", "127.0.0.1:50053")


def test_a_context_that_is_not_there_is_one_line(user: User) -> None:
    for command in (["context", "use", "none"], ["context", "delete", "none"], ["ps", "--context", "none"]):
        ended = user.run(*command, ATSERVING_SERVER="127.0.0.1:6")
        assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
        assert "there is no context 'none' in " in ended.stderr
        assert ended.stderr.endswith("it has: none\n")


@pytest.mark.parametrize("text", ["{", "[]", '{"contexts": {"a": {"sever": "h:1"}}}', '{"contexts": 3}', "\xff"])
def test_a_wrong_file_is_one_line(user: User, text: str) -> None:
    user.file.parent.mkdir(parents=True)
    user.file.write_text(text, "latin-1")
    ended = user.run("release", "list")
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert f"{user.file} is wrong: " in ended.stderr
    words = {"_ATSERVING_COMPLETE": "bash_complete", "COMP_WORDS": "atserving release show a", "COMP_CWORD": "3"}
    completed = user.run(**words)
    assert (completed.returncode, completed.stdout.strip(), completed.stderr) == (0, "", "")
    # Who names a server needs no file.
    assert user.means("--server", "127.0.0.1:9") == "127.0.0.1:9"


def test_the_file_may_be_anywhere(user: User, tmp_path: Path) -> None:
    named = {"ATSERVING_CONFIG": str(tmp_path / "own" / "file")}
    assert user.run("context", "set", "a", "--server", "127.0.0.1:3", **named).returncode == 0
    assert (user.means(**named), user.means()) == ("127.0.0.1:3", "127.0.0.1:50053")
    moved = {"XDG_CONFIG_HOME": str(tmp_path / "settings")}
    assert user.run("context", "set", "b", **moved).returncode == 0
    assert (tmp_path / "settings" / "atserving" / "config.json").exists()
    for name in ("", "a/b", "-x"):
        assert user.run("context", "set", "--", name).returncode == 2
