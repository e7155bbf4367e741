"""The command line: readable help, and one clear line with an exit status for every error."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
ATSERVING = str(BIN / "atserving")
PROGRAMS = [
    [sys.executable, "-m", "gate"],
    [sys.executable, "-m", "registry"],
    [sys.executable, "-m", "evaluator"],
    [ATSERVING, "up"],
    [ATSERVING, "release", "put"],
    [ATSERVING, "worker", "set"],
]
COMMANDS = [
    *("access", "app", "config", "context", "convert", "demo", "doctor", "eval", "instance", "k8s", "key", "login"),
    *("logout", "logs", "operator", "ps", "release", "top", "up", "worker"),
]
OF_OPERATORS = {
    *("access", "app", "config", "context", "doctor", "instance", "key", "login", "logout", "logs", "operator", "ps"),
    *("release", "top", "worker"),
}
# Runs `atserving` as if only the packages of docker/core.txt were installed.
WITHOUT_EXTRAS = """
import re, sys
from importlib import metadata

def normalized(names):
    return {re.sub(r"[-_.]+", "-", name).lower() for name in names}

core = normalized(re.findall(r"^([\\w.-]+)==", open("docker/core.txt").read(), re.MULTILINE)) | {"atserving"}
missing = {module for module, packages in metadata.packages_distributions().items() if not normalized(packages) & core}

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Finder())
from atserving.cli.main import main
main()
"""


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": str(BIN), "PYTHONPATH": str(ROOT), **environment},
        timeout=60,
    )


@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_help_goes_to_standard_output(program: list[str]) -> None:
    ended = run(*program, "--help")
    assert ended.returncode == 0
    assert "Usage:" in ended.stdout
    assert "--help" in ended.stdout
    assert not ended.stderr


@pytest.mark.parametrize("program", PROGRAMS, ids=" ".join)
def test_a_mistyped_flag_is_one_line_and_status_2(program: list[str]) -> None:
    ended = run(*program, "--regisrty", "x")
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert "--regisrty" in ended.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "gate", "--wait", "0.2", "--registry", "127.0.0.1:1", "--listen", "127.0.0.1:0"],
        ["-m", "evaluator", "--app", "a", "--version", "v", "--wait", "0.2", "--registry", "127.0.0.1:1"],
    ],
    ids=["gate", "evaluator"],
)
def test_an_unreachable_registry_is_one_line_and_status_1(command: list[str]) -> None:
    ended = run(sys.executable, *command)
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert "127.0.0.1:1" in ended.stderr


def test_a_release_command_names_the_registry_that_it_can_not_reach() -> None:
    ended = run(ATSERVING, "release", "list", "--server", "127.0.0.1:1,127.0.0.1:2")
    assert ended.returncode == 7
    assert len(ended.stderr.splitlines()) == 1
    assert "127.0.0.1:2" in ended.stderr


@pytest.mark.parametrize("address", ["host", "host:port", "", "host:1,,:"])
def test_a_malformed_address_is_refused_with_its_flag(address: str) -> None:
    ended = run(sys.executable, "-m", "gate", "--registry", address)
    assert ended.returncode == 2
    assert "--registry" in ended.stderr


# Variables


def test_a_flag_may_be_a_variable() -> None:
    command = [sys.executable, "-m", "gate", "--wait", "0.2", "--listen", "127.0.0.1:0"]
    ended = run(*command, ATSERVING_REGISTRY="127.0.0.1:7")
    assert ended.returncode == 1
    assert "127.0.0.1:7" in ended.stderr


@pytest.mark.parametrize(
    "command",
    [["list"], ["promote", "digits", "v1"], ["put", "digits", "v1", "file:///x.tar"]],
    ids=lambda command: command[0],
)
@pytest.mark.parametrize("variable", ["ATSERVING_SERVER", "ATSERVING_REGISTRY"])
def test_a_subcommands_flag_may_be_a_variable(command: list[str], variable: str) -> None:
    ended = run(ATSERVING, "release", *command, **{variable: "127.0.0.1:7"})
    assert ended.returncode == 7
    assert "server 127.0.0.1:7: " in ended.stderr


def test_a_services_variable_is_no_flag_of_a_command() -> None:
    ended = run(ATSERVING, "release", "promote", "digits", "v1", "--server", "127.0.0.1:7", ATSERVING_WAIT="0.5")
    assert ended.returncode == 7


def test_the_variable_of_one_subcommand_wins() -> None:
    ended = run(
        ATSERVING,
        "release",
        "list",
        ATSERVING_REGISTRY="127.0.0.1:7",
        ATSERVING_RELEASE_LIST_REGISTRY="127.0.0.1:9",
    )
    assert "server 127.0.0.1:9: " in ended.stderr


def test_the_flag_wins_over_its_variable() -> None:
    ended = run(ATSERVING, "release", "list", "--registry", "127.0.0.1:9", ATSERVING_REGISTRY="127.0.0.1:7")
    assert "server 127.0.0.1:9: " in ended.stderr


@pytest.mark.parametrize("variable", ["ATSERVING_ALLOW_NETWORK", "ATSERVING_ALLOW_NETWORKS"])
def test_a_variable_has_the_name_of_its_flag(variable: str) -> None:
    command = [sys.executable, "-m", "evaluator", "--app", "a", "--version", "v", "--registry", "127.0.0.1:1"]
    ended = run(*command, **{variable: "no-network"})
    assert ended.returncode == 2
    assert "'no-network' does not appear to be an IPv4 or IPv6 network" in ended.stderr


def test_the_version_of_a_release_is_no_flag_of_atserving() -> None:
    """An evaluator's pod may set ATSERVING_VERSION."""
    ended = run(ATSERVING, "--help", ATSERVING_VERSION="v1")
    assert (ended.returncode, ended.stderr) == (0, "")


# Without extras


def test_help_lists_all_commands_without_extras() -> None:
    ended = run(sys.executable, "-c", WITHOUT_EXTRAS, "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    helps = dict(line.split(maxsplit=1) for line in ended.stdout.partition("Commands:\n")[2].splitlines())
    assert list(helps) == COMMANDS
    assert helps["release"] == "Publish, promote, split and delete releases."
    assert {name for name, text in helps.items() if not text.startswith("Not installed")} == OF_OPERATORS
    assert {text for name, text in helps.items() if name not in OF_OPERATORS} == {
        "Not installed: pip install '.[local]' in a checkout."
    }


@pytest.mark.parametrize("arguments", [["convert", "--help"], ["convert", "a.prototxt", "a.caffemodel", "-o", "x"]])
def test_a_command_without_its_packages_is_one_line_and_status_1(arguments: list[str]) -> None:
    ended = run(sys.executable, "-c", WITHOUT_EXTRAS, *arguments)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "atserving: convert needs the package numpy: pip install '.[local]' in a checkout\n"


def test_a_command_whose_library_fails_leaves_the_others() -> None:
    broken = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tabulate":
            raise OSError("libz.so.1: cannot open\\nshared object file")

sys.meta_path.insert(0, Finder())
from atserving.cli.main import main
main()
"""
    listed = run(sys.executable, "-c", broken, "--help")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert re.search(r"^  release +It can't be used here\.$", listed.stdout, re.MULTILINE)
    assert re.search(r"^  k8s +(?!It can't)", listed.stdout, re.MULTILINE)
    ended = run(sys.executable, "-c", broken, "release", "list")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        "atserving: release can't be used here: OSError: libz.so.1: cannot open shared object file\n"
    )


def test_the_evaluator_without_its_packages_is_one_line_and_status_1() -> None:
    code = WITHOUT_EXTRAS.replace("from atserving.cli.main import main", "from evaluator.__main__ import main")
    ended = run(sys.executable, "-c", code, "--help")
    assert ended.returncode == 1
    assert ended.stderr.endswith(" is not installed: pip install '.[cpu]' in a checkout, or '.[gpu]' for a GPU\n")
    assert len(ended.stderr.splitlines()) == 1
