"""The base, every overlay, every component and printed evaluators fit the schemas and follow the rules."""

from __future__ import annotations

from pathlib import Path

import pytest

from .checks.model import Document, title
from .manifests import (
    K8S,
    certificate,
    components,
    evaluator,
    kustomizations,
    kustomize,
    read,
    uses,
    with_components,
    wrong,
)

EVALUATORS = (
    "",
    "--replicas 3",
    "--replicas 1",
    "--gpu",
    "--qiniu digits-keys",
    "--cpu 500m --memory 3Gi",
    "--autoscaler keda",
    "--autoscaler keda --replicas 0",
)
"""Flags of evaluators that are checked beside each kustomization."""
BASE, DEMO = K8S / "base", K8S / "overlays" / "demo"
TLS, CERT_MANAGER = K8S / "components" / "tls", K8S / "components" / "cert-manager"
TRACING = K8S / "components" / "tracing"


def assert_passes(documents: list[Document]) -> None:
    """Check the documents of one mesh."""
    messages = wrong(documents)
    assert not messages, "\n".join(messages)


def evaluator_for(folder: Path, *used: Path, flags: str = "") -> list[Document]:
    """Return an evaluator beside a kustomization with these components."""
    wanted = {"--tls": TLS, "--tracing": TRACING}
    more = [flag for flag, component in wanted.items() if component in used or uses(folder, component)]
    return evaluator("faces", "v1", *flags.split(), *more)


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
    assert_passes(kustomize(folder) + evaluator_for(folder, flags=flags))


def test_versions_pass_side_by_side() -> None:
    evaluators = [each for version in ("v1", "201811091530", "V_2.1-rc") for each in evaluator("digits", version)]
    assert len({title(each) for each in evaluators if each["kind"] == "Deployment"}) == 3
    assert_passes(kustomize(K8S / "base") + evaluators)


@pytest.mark.parametrize(
    ("folder", "component"),
    # The demo's own evaluator is printed without TLS.
    [
        (folder, each)
        for folder in kustomizations()
        for each in components()
        if not uses(folder, each) and (folder, each) != (DEMO, TLS)
    ],
    ids=_name,
)
def test_a_component_passes_with_and_without_an_evaluator(folder: Path, component: Path, tmp_path: Path) -> None:
    more = evaluator_for(folder, component)
    if component == CERT_MANAGER:
        more += certificate("evaluator/faces")
    documents = with_components(folder, [component], more, tmp_path)
    assert_passes(documents)
    titles = [title(each) for each in more]
    without = [each for each in documents if title(each) not in titles]
    assert len(without) == len(documents) - len(more)
    assert_passes(without)


@pytest.mark.parametrize("component", components(), ids=_name)
def test_a_component_renders_before_there_are_evaluators(component: Path, tmp_path: Path) -> None:
    assert_passes(with_components(BASE, [component], [], tmp_path))


def test_all_components_pass_together(tmp_path: Path) -> None:
    versions = [each for version in ("v1", "v2") for each in evaluator("faces", version, "--tls", "--tracing")]
    more = [*versions, *certificate("evaluator/faces")]
    assert_passes(with_components(BASE, components(), [*more, *certificate("operator/ada")], tmp_path))


def test_an_evaluator_printed_without_tls_is_refused_in_a_mesh_with_it(tmp_path: Path) -> None:
    messages = wrong(with_components(BASE, [TLS], evaluator("faces", "v1"), tmp_path))
    assert "Deployment/faces-v1: container 'evaluator' has --insecure, in a mesh with TLS" in messages
    assert "Deployment/faces-v1: container 'evaluator' has no --tls-cert, in a mesh with TLS" in messages


def test_no_kustomization_is_left_out() -> None:
    found = {each.parent for each in K8S.rglob("kustomization.yaml")}
    assert K8S / "base" in found
    assert found == {*kustomizations(), *components()}


def test_the_evaluator_of_the_demo_is_what_the_command_prints() -> None:
    file = K8S / "overlays" / "demo" / "digits-v1.yaml"
    command, documents = file.read_text().split("\n", 1)
    assert read(documents) == evaluator(*command.removeprefix("# atserving k8s evaluator ").split())
