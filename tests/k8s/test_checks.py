"""Each rule refuses something: each mistake in ``broken/`` is refused with its messages and no others."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonpatch
import pytest

from .checks import RULES
from .checks.model import Document, Manifests, Workload, selects, title
from .manifests import VERSIONS, read, wrong

FOLDER = Path(__file__).parent / "broken"
GOOD = read((FOLDER / "good.yaml").read_text())
(TLS,) = read((FOLDER / "good-tls.yaml").read_text())


def changed(documents: list[Document], change: dict[str, Any]) -> list[Document]:
    """Return what documents become if some are removed, patched (RFC 6902) or added."""
    by_title = {title(each): copy.deepcopy(each) for each in documents}
    for name in change.get("remove", []):
        del by_title[name]
    for name, patch in change.get("patch", {}).items():
        by_title[name] = jsonpatch.apply_patch(by_title[name], patch)
    return [*by_title.values(), *change.get("add", [])]


GOOD_WITH_TLS = changed(GOOD, TLS)


WITH_TLS = ("secured", "certified")
"""The files with mistakes in the good mesh with TLS."""


@dataclass(frozen=True)
class Mistake:
    """One document of a file in ``broken/``."""

    file: str
    change: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.file}: {self.change['mistake']}"

    @property
    def refused(self) -> list[str]:
        """The messages that the mistake leads to."""
        lines: list[str] = self.change["refused"].splitlines()
        return lines

    def mesh(self) -> list[Document]:
        """Return the good mesh, or that with TLS, with the mistake in it."""
        assert self.change.keys() <= {"mistake", "refused", "remove", "patch", "add"}
        return changed(GOOD_WITH_TLS if self.file in WITH_TLS else GOOD, self.change)


MISTAKES = [
    Mistake(path.stem, change)
    for path in sorted(FOLDER.glob("*.yaml"))
    if path.stem not in ("good", "good-tls")
    for change in read(path.read_text())
]


@pytest.mark.parametrize("evaluators", [True, False], ids=["with evaluators", "without"])
@pytest.mark.parametrize("good", [GOOD, GOOD_WITH_TLS], ids=["in plain text", "with TLS"])
def test_the_good_mesh_is_not_refused(good: list[Document], evaluators: bool) -> None:
    assert wrong([each for each in good if evaluators or title(each) != "Deployment/digits-v1"]) == []


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_a_mistake_is_refused_with_its_messages(mistake: Mistake) -> None:
    assert mistake.refused
    assert wrong(mistake.mesh(), VERSIONS[:1]) == mistake.refused


def test_each_rule_refuses_a_mistake_in_the_file_of_its_name() -> None:
    meshes: dict[str, list[Manifests]] = {}
    for each in MISTAKES:
        meshes.setdefault(each.file, []).append(Manifests(each.mesh()))
    files = {rule: meshes[rule.__module__.rpartition(".")[2]] for rule in RULES}
    assert [rule.__name__ for rule in RULES if not any(list(rule(mesh)) for mesh in files[rule])] == []


@pytest.mark.parametrize(
    ("operator", "values", "selected"),
    [
        ("In", ["a", "b"], [True, False, False]),
        ("NotIn", ["a"], [False, True, True]),
        ("Exists", None, [True, True, False]),
        ("DoesNotExist", None, [False, False, True]),
    ],
)
def test_selectors_select_by_expressions(operator: str, values: list[str] | None, selected: list[bool]) -> None:
    expression = {"key": "k", "operator": operator, **({"values": values} if values else {})}
    pods: list[dict[str, str]] = [{"k": "a"}, {"k": "c"}, {"other": "a"}]
    assert [selects({"matchExpressions": [expression]}, labels) for labels in pods] == selected


def test_flags_are_read_as_the_programs_read_them() -> None:
    def flag(*arguments: str, **environment: str) -> str | None:
        env = [{"name": name, "value": value} for name, value in environment.items()]
        container = {"name": "gate", "args": list(arguments), "env": env}
        spec = {"template": {"spec": {"containers": [container]}}}
        (found,) = Workload({"kind": "Deployment", "metadata": {"name": "gate"}, "spec": spec}).containers
        return found.flag("drain")

    assert flag("--drain", "4") == "4"
    assert flag("--drain=5", ATSERVING_DRAIN="6") == "5"
    assert flag("--drain-more=5", ATSERVING_DRAIN="6") == "6"
    assert flag() is None
