"""The base, every overlay, every component and printed evaluators fit the schemas and follow the rules."""

from __future__ import annotations

from pathlib import Path

import pytest

from .checks.model import Document, title
from .manifests import (
    K8S,
    components,
    evaluator,
    kustomizations,
    kustomize,
    read,
    uses,
    with_component,
    wrong,
)

EVALUATORS = ("", "--replicas 3", "--replicas 1", "--gpu", "--qiniu digits-keys", "--cpu 500m --memory 3Gi")
"""Flags of evaluators that are checked beside each kustomization."""


def assert_passes(documents: list[Document]) -> None:
    """Check the documents of one mesh."""
    messages = wrong(documents)
    assert not messages, "\n".join(messages)


def _name(folder: Path) -> str:
    return str(folder.relative_to(K8S))


@pytest.mark.parametrize("folder", kustomizations(), ids=_name)
def test_a_kustomization_passes(folder: Path) -> None:
    documents = kustomize(folder)
    assert documents
    assert_passes(documents)


@pytest.mark.parametrize("folder", kustomizations(), ids=_name)
@pytest.mark.parametrize("flags", EVALUATORS, ids=lambda flags: flags or "plain")
def test_an_evaluator_passes_beside_it(folder: Path, flags: str) -> None:
    assert_passes(kustomize(folder) + evaluator("faces", "v1", *flags.split()))


def test_versions_pass_side_by_side() -> None:
    evaluators = [each for version in ("v1", "201811091530", "V_2.1-rc") for each in evaluator("digits", version)]
    assert len({title(each) for each in evaluators if each["kind"] == "Deployment"}) == 3
    assert_passes(kustomize(K8S / "base") + evaluators)


@pytest.mark.parametrize(
    ("folder", "component"),
    [(folder, each) for folder in kustomizations() for each in components() if not uses(folder, each)],
    ids=_name,
)
def test_a_component_passes_with_and_without_an_evaluator(folder: Path, component: Path, tmp_path: Path) -> None:
    more = evaluator("faces", "v1")
    documents = with_component(folder, component, more, tmp_path)
    assert_passes(documents)
    titles = [title(each) for each in more]
    without = [each for each in documents if title(each) not in titles]
    assert len(without) == len(documents) - len(more)
    assert_passes(without)


@pytest.mark.parametrize("component", components(), ids=_name)
def test_a_component_renders_before_there_are_evaluators(component: Path, tmp_path: Path) -> None:
    assert_passes(with_component(K8S / "base", component, [], tmp_path))


def test_no_kustomization_is_left_out() -> None:
    found = {each.parent for each in K8S.rglob("kustomization.yaml")}
    assert K8S / "base" in found
    assert found == {*kustomizations(), *components()}


def test_the_evaluator_of_the_demo_is_what_the_command_prints() -> None:
    file = K8S / "overlays" / "demo" / "digits-v1.yaml"
    command, documents = file.read_text().split("\n", 1)
    assert read(documents) == evaluator(*command.removeprefix("# atserving k8s evaluator ").split())
