"""The checks of the manifests can fail: each file in broken/ is refused for what is wrong in it, and for that alone."""

from __future__ import annotations

import copy
from decimal import Decimal
from pathlib import Path
from typing import Any

import jsonpatch
import pytest
import yaml

from .checks import RULES
from .checks.model import Document, Manifests, Workload, quantity, selects, title
from .manifests import VERSIONS, read, validate, wrong

FOLDER = Path(__file__).parent / "broken"
GOOD = read((FOLDER / "good.yaml").read_text())
BROKEN = sorted(set(FOLDER.glob("*.yaml")) - {FOLDER / "good.yaml"})


def broken(path: Path) -> list[Document]:
    """The good mesh with what a file says: what it removes, JSON patches (RFC 6902) by document, and what it adds."""
    change: dict[str, Any] = yaml.safe_load(path.read_text())
    assert change.keys() <= {"remove", "patch", "add"}
    documents = {title(each): copy.deepcopy(each) for each in GOOD}
    for name in change.get("remove", []):
        del documents[name]
    for name, patch in change.get("patch", {}).items():
        documents[name] = jsonpatch.apply_patch(documents[name], patch)
    return [*documents.values(), *change.get("add", [])]


def refused(path: Path) -> list[str]:
    """The messages that a file's comments expect."""
    mark = "# refused: "
    return [line.removeprefix(mark) for line in path.read_text().splitlines() if line.startswith(mark)]


@pytest.mark.parametrize("evaluators", [True, False], ids=["with-evaluators", "without"])
def test_a_good_mesh_is_not_refused(evaluators: bool) -> None:
    documents = [each for each in GOOD if evaluators or title(each) != "Deployment/digits-v1"]
    assert wrong(documents) == []


@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.stem)
def test_a_broken_mesh_is_refused_for_that(path: Path) -> None:
    documents = broken(path)
    assert refused(path), f"{path.name} expects nothing"
    assert wrong(documents, VERSIONS[:1]) == refused(path)


def test_each_rule_refuses_something() -> None:
    meshes = [Manifests(documents) for path in BROKEN if not validate(documents := broken(path), VERSIONS[:1])]
    assert [rule.__name__ for rule in RULES if not any(list(rule(mesh)) for mesh in meshes)] == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("100m", "0.1"),
        ("2", "2"),
        (1, "1"),
        (0.5, "0.5"),
        (".5", "0.5"),
        ("1Ki", "1024"),
        ("1.5Gi", "1610612736"),
        ("4G", "4000000000"),
        ("3e2", "300"),
        ("2E", "2000000000000000000"),
        ("-7u", "-0.000007"),
    ],
)
def test_quantities_are_those_of_kubernetes(text: str | float, value: str) -> None:
    assert quantity(text) == Decimal(value)


@pytest.mark.parametrize("text", ["", "1 Gi", "Gi", "1gi", "1mi", "1e", "1e3Gi", "0x1"])
def test_what_is_no_quantity_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="no quantity"):
        quantity(text)


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
