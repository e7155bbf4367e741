"""The mesh's manifests, as kustomize renders them and the command line prints them, and what schemas say of them."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from .checks import check
from .checks.model import Document, title

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"

# The oldest and the newest Kubernetes that the manifests are for; the newest is the newest whose schema is known.
VERSIONS = ("1.32", kubernetes_validate.latest_version())


def kustomizations() -> list[Path]:
    """The folders that are rendered by themselves: the base and the overlays."""
    found = [each.parent for part in ("base", "overlays") for each in sorted((K8S / part).rglob("kustomization.yaml"))]
    return [each for each in found if K8S / "components" not in each.parents]


def uses(kustomization: Path, component: Path) -> bool:
    """Whether a kustomization has a component already."""
    used = yaml.safe_load((kustomization / "kustomization.yaml").read_text()).get("components", [])
    return component in [(kustomization / each).resolve() for each in used]


def components() -> list[Path]:
    """The folders that are rendered as a part of others only."""
    return sorted(each.parent for each in (K8S / "components").rglob("kustomization.yaml"))


def read(text: str) -> list[Document]:
    return [each for each in yaml.safe_load_all(text) if each]


def kustomize(folder: Path) -> list[Document]:
    """What a kustomization renders; skips the test where there is no kubectl."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    run = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    # kustomize says on standard error what it will soon no longer take.
    assert not run.stderr, run.stderr
    return read(run.stdout)


def with_component(base: Path, component: Path, more: list[Document], folder: Path) -> list[Document]:
    """What a base and more documents become with a component, by a kustomization that is written into a folder."""
    (folder / "more.yaml").write_text(yaml.safe_dump_all(more))
    below, used = (os.path.relpath(each, folder.resolve()) for each in (base, component))
    kustomization = {"resources": [below, *(["more.yaml"] if more else [])], "components": [used]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return kustomize(folder)


def evaluator(*arguments: str) -> list[Document]:
    """What ``atserving k8s evaluator`` prints."""
    command = [Path(sys.executable).parent / "atserving", "k8s", "evaluator", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return read(run.stdout)


def wrong(documents: list[Document], versions: tuple[str, ...] = VERSIONS) -> list[str]:
    """What is wrong with the documents of one mesh; the rules read what fits the schemas only."""
    return validate(documents, versions) or check(documents)


def validate(documents: list[Document], versions: tuple[str, ...] = VERSIONS) -> list[str]:
    """What the schemas of versions of Kubernetes refuse, unknown fields and kinds of others included."""
    return [
        f"{title(document)}: Kubernetes {version}: {message}"
        for version in versions
        for document in documents
        if (message := _refused(json.dumps(document), version))
    ]


@functools.cache
def _refused(document: str, version: str) -> str | None:
    # Most documents are the same in all overlays, and the schema is read anew each time.
    try:
        kubernetes_validate.validate(json.loads(document), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(str(each) for each in error.absolute_path)}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError as error:
        return f"has no kind {error.kind} in {error.api_version}"
    return None
