"""The manifests of the base, of every overlay and component, and of evaluators pass the schemas and the rules."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from . import rendered
from .checks import RULES
from .checks.model import Document, title
from .manifests import (
    K8S,
    VERSIONS,
    components,
    evaluator,
    kustomizations,
    kustomize,
    read,
    uses,
    with_component,
    wrong,
)

Passes = Callable[[list[Document]], None]


@pytest.fixture(scope="module")
def counts(record_testsuite_property: Callable[[str, object], None]) -> Iterator[Counter[str]]:
    """What was checked, for --junitxml and -s."""
    counts: Counter[str] = Counter()
    yield counts
    for name, count in counts.items():
        record_testsuite_property(name, count)
        print(f"\n{name}: {count}")


@pytest.fixture
def passes(counts: Counter[str]) -> Passes:
    """Checks the documents of one mesh, and counts them, and how often one was read by a rule or a schema."""

    def passes(documents: list[Document]) -> None:
        assert documents
        messages = wrong(documents)
        assert not messages, "\n".join(messages)
        counts["kubernetes.meshes"] += 1
        counts["kubernetes.documents"] += len(documents)
        counts["kubernetes.checks"] += len(documents) * (len(RULES) + len(VERSIONS))

    return passes


def _name(folder: Path) -> str:
    return str(folder.relative_to(K8S))


@pytest.mark.parametrize("folder", kustomizations(), ids=_name)
def test_what_is_rendered_passes(folder: Path, passes: Passes) -> None:
    passes(kustomize(folder))


@pytest.mark.parametrize("folder", kustomizations(), ids=_name)
@pytest.mark.parametrize(
    "arguments",
    ["", "--replicas 3", "--replicas 1", "--gpu", "--qiniu digits-keys", "--cpu 500m --memory 3Gi"],
    ids=lambda arguments: arguments or "plain",
)
def test_an_evaluator_passes_beside_it(folder: Path, arguments: str, passes: Passes) -> None:
    passes(kustomize(folder) + evaluator("faces", "v1", *arguments.split()))


def test_two_versions_pass_side_by_side(passes: Passes) -> None:
    evaluators = [each for version in ("v1", "201811091530", "V_2.1-rc") for each in evaluator("digits", version)]
    assert len({title(each) for each in evaluators if each["kind"] == "Deployment"}) == 3
    passes(kustomize(K8S / "base") + evaluators)


@pytest.mark.parametrize(
    ("folder", "component"),
    [(folder, each) for folder in kustomizations() for each in components() if not uses(folder, each)],
    ids=_name,
)
@pytest.mark.parametrize("evaluators", [False, True], ids=["alone", "with-an-evaluator"])
def test_a_component_passes(folder: Path, component: Path, evaluators: bool, tmp_path: Path, passes: Passes) -> None:
    passes(with_component(folder, component, evaluator("faces", "v1") if evaluators else [], tmp_path))


def test_nothing_is_left_out() -> None:
    """Each kustomization in the folder is one that these tests render."""
    found = {each.parent for each in K8S.rglob("kustomization.yaml")}
    assert K8S / "base" in found
    assert found == {*kustomizations(), *components()}


@pytest.mark.parametrize("name", rendered.COMMANDS)
def test_what_the_docs_keep_is_what_is_rendered(name: str) -> None:
    if not shutil.which(rendered.COMMANDS[name][0]):
        pytest.skip("kubectl is not installed")
    # As documents: versions of kubectl write the same ones in other words.
    assert read((rendered.FOLDER / name).read_text()) == read(rendered.render(name)), "run `make k8s-render`"


def test_the_evaluator_of_the_demo_is_what_is_printed() -> None:
    file = K8S / "overlays" / "demo" / "digits-v1.yaml"
    command, documents = file.read_text().split("\n", 1)
    assert read(documents) == evaluator(*command.removeprefix("# atserving k8s evaluator ").split())
