"""The playbook on a real cluster: `make k8s-test` runs it on the cluster that KUBECONFIG names.

The cluster's nodes must be able to pull the images, by their own names or below IMAGE_PREFIX, with the tag IMAGE_TAG.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest
import yaml

from atserving.local import examples
from tests.k8s import cert_manager
from tests.k8s.manifests import (
    K8S,
    components,
    evaluator,
    kustomizations,
    kustomize,
    with_components,
    wrong,
)

BIN = Path(sys.executable).parent
SEVEN = (examples.FOLDER / "digits" / "images" / "7.png").read_bytes()
IMAGES = ("gate", "registry", "evaluator")
RELEASE = "file:///releases/digits-v1.tar"

on_a_cluster = pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="KUBECONFIG names no cluster")


def write_mesh(folder: Path, namespace: str) -> None:
    """Write a kustomization of the demo overlay, in a namespace, with the images from where the nodes pull them."""
    prefix, tag = os.environ.get("IMAGE_PREFIX") or "atserving", os.environ.get("IMAGE_TAG")
    moved = {"newTag": tag} if tag else {}
    kustomization = {
        "namespace": namespace,
        "resources": [os.path.relpath(K8S / "overlays" / "demo", folder.resolve())],
        "images": [{"name": f"atserving/{each}", "newName": f"{prefix}/{each}", **moved} for each in IMAGES],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))


def test_the_mesh_of_the_playbook_passes_the_checks(tmp_path: Path) -> None:
    write_mesh(tmp_path, "atserving-try")
    assert wrong(kustomize(tmp_path)) == []


def kubectl(*arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["kubectl", *arguments], input=given, capture_output=True, text=True, check=False)


def done(*arguments: str, given: str | None = None) -> str:
    run = kubectl(*arguments, given=given)
    assert run.returncode == 0, f"kubectl {' '.join(arguments)}: {run.stderr}"
    return run.stdout


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    """A namespace of the test's own. Deleting it deletes everything in it."""
    name = f"atserving-test-{secrets.token_hex(3)}"
    done("create", "namespace", name)
    yield name
    done("delete", "namespace", name, "--wait=true", "--timeout=300s")


@contextmanager
def forwarded(namespace: str, target: str, port: int) -> Iterator[str]:
    """Forward a loopback address to a port of a Service's pod, and yield the address."""
    command = ["kubectl", "-n", namespace, "port-forward", target, f":{port}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            said = process.stdout.readline()
            assert said.startswith("Forwarding from 127.0.0.1:"), f"{target} can't be reached"
            yield said.split()[2]
        finally:
            process.terminate()


@on_a_cluster
@pytest.mark.timeout(300)
def test_the_api_server_accepts_everything(namespace: str, tmp_path: Path) -> None:
    rendered = [kustomize(each) for each in kustomizations()]
    for number, component in enumerate(components()):
        folder = tmp_path / str(number)
        folder.mkdir()
        rendered.append(with_components(K8S / "base", [component], evaluator("digits", "v1"), folder))
    rendered += [evaluator("digits", "v1"), evaluator("digits", "v1", "--gpu")]
    for documents in rendered:
        # A dry run makes no namespace for the other objects, and cert-manager may not be installed.
        inside = [each for each in documents if each["kind"] != "Namespace" and each["apiVersion"] != cert_manager.API]
        for each in inside:
            each["metadata"]["namespace"] = namespace
        done("apply", "--server-side", "--dry-run=server", "-f", "-", given=yaml.safe_dump_all(inside))


@on_a_cluster
@pytest.mark.timeout(1800)
def test_a_version_is_rolled_out_and_undone(namespace: str, tmp_path: Path) -> None:
    write_mesh(tmp_path, namespace)
    done("apply", "-k", str(tmp_path))
    for workload in ("statefulset/etcd", "deployment/registry", "deployment/gate", "deployment/envoy"):
        done("-n", namespace, "rollout", "status", workload, "--timeout=300s")
    with forwarded(namespace, "service/registry", 50054) as registry:
        publish = [
            "release",
            "put",
            "--no-check",
            "digits",
            "v1",
            RELEASE,
            "--phase",
            "production",
            "--registry",
            registry,
        ]
        subprocess.run([BIN / "atserving", *publish], check=True)
    status = ("-n", namespace, "rollout", "status", "deployment/digits-v1")
    done(*status, "--timeout=300s")
    assert_served(namespace)

    done("-n", namespace, "set", "image", "deployment/digits-v1", "evaluator=atserving/evaluator:0.0.0-none")
    assert kubectl(*status, "--timeout=60s").returncode != 0, "the rollout of a missing image finished"
    assert_served(namespace)
    done("-n", namespace, "rollout", "undo", "deployment/digits-v1")
    done(*status, "--timeout=300s")
    assert_served(namespace)


def assert_served(namespace: str) -> None:
    with forwarded(namespace, "service/envoy", 80) as edge:
        headers = {"content-type": "application/octet-stream"}
        request = urllib.request.Request(f"http://{edge}/v1/eval/digits", data=SEVEN, headers=headers)
        # Raises for every status but 200.
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = orjson.loads(response.read())
    assert answer["result"]["confidences"][0]["class"] == "seven"
