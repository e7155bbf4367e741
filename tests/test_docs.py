"""The documents point at existing things: links and anchors resolve, named files exist, every flag is documented."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from atserving.cli.main import atserving
from evaluator.__main__ import check_release
from evaluator.__main__ import main as evaluator
from gate.__main__ import main as gate
from registry.__main__ import main as registry

ROOT = Path(__file__).resolve().parents[1]
NOT_OURS = {".venv", "build", "dist", "demo", "run"}
PAGES = sorted(
    path.relative_to(ROOT)
    for path in ROOT.rglob("*.md")
    if not any(part in NOT_OURS or part.startswith(".") for part in path.relative_to(ROOT).parts)
    and not path.name.endswith(".template.md")
)

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FOLDERS = "atserving|gate|evaluator|registry|proto|envoy|k8s|docker|examples|bench|reliability|monitoring|docs|tests"
# A file in a folder of ours, such as `gate/router.py`, or a folder with its slash, such as `evaluator/serving/`.
NAMED = re.compile(rf"(?<![\w./@-])((?:{FOLDERS})/(?:[\w*.-]+/)*(?:[\w*-]+\.[a-z0-9]+(?:\.[a-z0-9]+)*)?)(?![\w<$/])")

pages = pytest.mark.parametrize("page", PAGES, ids=str)


def without_code(text: str) -> str:
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return CODE.sub("", re.sub(r"^(?: {4}|\t).*$", "", text, flags=re.MULTILINE))


@cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.+?) *$", without_fences(page.read_text()), re.MULTILINE):
        text = LINK.sub(lambda link: link[0][1:].partition("]")[0], heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        found[anchor] = found.get(anchor, -1) + 1
    return {f"{anchor}-{number}" if number else anchor for anchor, most in found.items() for number in range(most + 1)}


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def broken_links(page: Path) -> Iterator[str]:
    for link in LINK.findall(without_code((ROOT / page).read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page.parent / path).resolve() if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link


@pages
def test_every_relative_link_and_anchor_resolves(page: Path) -> None:
    assert not list(broken_links(page))


@pages
def test_every_file_named_in_a_page_exists(page: Path) -> None:
    named = set(NAMED.findall((ROOT / page).read_text()))
    assert not [name for name in sorted(named) if not list(ROOT.glob(name))]


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if f"]({page.name})" not in index]
    assert missing == ["README.md"]


def flags(command: click.Command) -> Iterator[str]:
    """The flags of a command and of its subcommands, in their long form."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            subcommand = command.get_command(context, name)
            assert subcommand is not None
            yield from flags(subcommand)
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            yield max(parameter.opts, key=len)


@pytest.mark.parametrize("command", [gate, registry, evaluator, check_release, atserving], ids=lambda each: each.name)
def test_every_flag_is_documented(command: click.Command) -> None:
    page = (ROOT / "docs" / "flags.md").read_text()
    assert not [flag for flag in flags(command) if not re.search(rf"`{flag}[ `]", page) and flag != "--version"]


LEVELS = {"info": "info", "warning": "warning", "error": "error", "exception": "error", "debug": "debug"}


def logged() -> Iterator[tuple[str, str, str]]:
    """Yield each event that the code logs under a literal name: its name, level and place."""
    for folder in ("atserving", "gate", "registry", "evaluator"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and node.func.attr in LEVELS
                    and ast.unparse(node.func.value) in ("log", "self._log", "log_event")
                    and node.args
                    and isinstance(node.args[0], ast.Constant)
                ):
                    yield str(node.args[0].value), LEVELS[node.func.attr], f"{path.relative_to(ROOT)}:{node.lineno}"


def documented() -> set[tuple[str, str]]:
    """Return the events of docs/logs.md with their levels."""
    rows = re.findall(r"^\| (`[^|]+`) \| (\w+) \|", (ROOT / "docs" / "logs.md").read_text(), re.MULTILINE)
    return {(event, level) for names, level in rows for event in CODE.findall(names)}


def test_every_log_event_is_documented() -> None:
    known = documented()
    assert not [f"{place}: {event} ({level})" for event, level, place in logged() if (event, level) not in known]


def test_every_documented_log_event_is_in_the_code() -> None:
    code = "".join(
        path.read_text()
        for folder in ("atserving", "gate", "registry", "evaluator")
        for path in (ROOT / folder).rglob("*.py")
    )
    assert not [event for event, _ in sorted(documented()) if f'"{event}"' not in code]
