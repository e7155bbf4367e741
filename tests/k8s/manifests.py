"""Render the mesh's manifests and check them against the schemas of Kubernetes and the rules in ``checks/``.

A document that is read twice is parsed twice, so a caller may change what it gets.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import kubernetes_validate.utils
import pytest
import yaml
from click.testing import CliRunner

from atserving.cli.k8s import k8s

from . import cert_manager, keda, prometheus_operator
from .checks import check
from .checks.model import Document, title

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"

VERSIONS = ("1.32", kubernetes_validate.latest_version())
"""The oldest Kubernetes that the manifests are for, and the newest whose schemas are known."""

# validate() would parse several megabytes of schemas for each document.
kubernetes_validate.utils.schema_contents = functools.cache(kubernetes_validate.utils.schema_contents)


def kustomizations() -> list[Path]:
    """Return the folders that are rendered by themselves: the base and the overlays."""
    found = [each.parent for part in ("base", "overlays") for each in sorted((K8S / part).rglob("kustomization.yaml"))]
    return [each for each in found if K8S / "components" not in each.parents]


def components() -> list[Path]:
    """Return the folders that are rendered as a part of others only."""
    return sorted(each.parent for each in (K8S / "components").rglob("kustomization.yaml"))


def uses(kustomization: Path, component: Path) -> bool:
    """Whether a kustomization has a component already."""
    used = yaml.safe_load((kustomization / "kustomization.yaml").read_text()).get("components", [])
    return component in [(kustomization / each).resolve() for each in used]


def read(text: str) -> list[Document]:
    """Return the documents of a YAML file."""
    # The parser in C is ten times as fast.
    return [each for each in yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) if each]


def kustomize(folder: Path) -> list[Document]:
    """Return what a kustomization renders. Skips the test where kubectl is not installed."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    return read(_rendered(folder))


def evaluator(*arguments: str) -> list[Document]:
    """Return what ``atserving k8s evaluator`` prints."""
    return read(_printed(("evaluator", *arguments)))


def certificate(role: str) -> list[Document]:
    """Return what ``atserving k8s certificate`` prints."""
    return read(_printed(("certificate", role)))


def with_components(base: Path, used: list[Path], more: list[Document], folder: Path) -> list[Document]:
    """Return what a base and more documents become with components. Writes a kustomization into ``folder``."""
    (folder / "more.yaml").write_text(yaml.safe_dump_all(more))
    below, *parts = (os.path.relpath(each, folder.resolve()) for each in (base, *used))
    kustomization = {"resources": [below, *(["more.yaml"] if more else [])], "components": parts}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return kustomize(folder)


def wrong(documents: list[Document], versions: tuple[str, ...] = VERSIONS) -> list[str]:
    """Return what is wrong with the documents of one mesh. The rules read only documents that fit the schemas."""
    return validate(documents, versions) or check(documents)


def validate(documents: list[Document], versions: tuple[str, ...] = VERSIONS) -> list[str]:
    """Return what the strict schemas of these versions refuse. A strict schema refuses unknown fields too."""
    return [
        f"{title(document)}: Kubernetes {version}: {message}"
        for version in versions
        for document in documents
        if (message := _refused(json.dumps(document), version))
    ]


@functools.cache
def _rendered(folder: Path) -> str:
    run = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    # kustomize warns of deprecated fields on standard error.
    assert not run.stderr, run.stderr
    return run.stdout


@functools.cache
def _printed(arguments: tuple[str, ...]) -> str:
    # In this process: a new one takes half a second to import all that the command needs.
    run = CliRunner().invoke(k8s, arguments)
    assert run.exit_code == 0, run.output
    return run.stdout


@functools.cache
def _refused(document: str, version: str) -> str | None:
    # Most documents are the same in all overlays.
    read = json.loads(document)
    match read.get("apiVersion"):
        case cert_manager.API:
            return cert_manager.refused(read)
        case keda.API:
            return keda.refused(read)
        case prometheus_operator.API:
            return prometheus_operator.refused(read)
    try:
        kubernetes_validate.validate(read, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(str(each) for each in error.absolute_path)}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError as error:
        return f"has no kind {error.kind} in {error.api_version}"
    return None
