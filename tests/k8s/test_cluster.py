"""The playbook on a real cluster, the one that KUBECONFIG names: `make k8s-test`.

The images have to be where its nodes find them: by their own names, or below IMAGE_PREFIX, with the tag IMAGE_TAG.
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
from tests.k8s.manifests import K8S, components, evaluator, kustomizations, kustomize, with_component, wrong

BIN = Path(sys.executable).parent
SEVEN = (examples.FOLDER / "digits" / "images" / "7.png").read_bytes()
IMAGES = ("gate", "registry", "evaluator")
RELEASE = "file:///releases/digits-v1.tar"

on_a_cluster = pytest.mark.skipif(not os.environ.get("KUBECONFIG"), reason="KUBECONFIG names no cluster")


def write_mesh(folder: Path, namespace: str) -> None:
    """A kustomization of the demo overlay, in a namespace, with the images from where they are."""
    prefix, tag = os.environ.get("IMAGE_PREFIX") or "atserving", os.environ.get("IMAGE_TAG")
    moved = {"newTag": tag} if tag else {}
    kustomization = {
        "namespace": namespace,
        "resources": [os.path.relpath(K8S / "overlays" / "demo", folder.resolve())],
        "images": [{"name": f"atserving/{each}", "newName": f"{prefix}/{each}", **moved} for each in IMAGES],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))


def test_what_is_applied_there_passes_the_checks_here(tmp_path: Path) -> None:
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
    """A namespace of the test's own, which takes all that is in it along in the end."""
    name = f"atserving-test-{secrets.token_hex(3)}"
    done("create", "namespace", name)
    yield name
    done("delete", "namespace", name, "--wait=true", "--timeout=300s")


@contextmanager
def forwarded(namespace: str, target: str, port: int) -> Iterator[str]:
    """A loopback address that leads to a port of a Service's pod."""
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
def test_everything_is_taken_by_the_server(namespace: str, tmp_path: Path) -> None:
    rendered = [kustomize(each) for each in kustomizations()]
    for number, each in enumerate(components()):
        folder = tmp_path / str(number)
        folder.mkdir()
        rendered.append(with_component(K8S / "base", each, evaluator("digits", "v1"), folder))
    rendered += [evaluator("digits", "v1"), evaluator("digits", "v1", "--gpu")]
    for documents in rendered:
        # One that is dry makes no namespace that the rest could be in.
        inside = [each for each in documents if each["kind"] != "Namespace"]
        for each in inside:
            each["metadata"]["namespace"] = namespace
        done("apply", "--server-side", "--dry-run=server", "-f", "-", given=yaml.safe_dump_all(inside))


@on_a_cluster
@pytest.mark.timeout(1800)
def test_a_version_is_rolled_out_watched_and_undone(namespace: str, tmp_path: Path) -> None:
    write_mesh(tmp_path, namespace)
    done("apply", "-k", str(tmp_path))
    for workload in ("statefulset/etcd", "deployment/registry", "deployment/gate", "deployment/envoy"):
        done("-n", namespace, "rollout", "status", workload, "--timeout=300s")
    with forwarded(namespace, "service/registry", 50054) as registry:
        publish = ["release", "publish", "digits", "v1", RELEASE, "--phase", "production", "--registry", registry]
        subprocess.run([BIN / "atserving", *publish], check=True)
    status = ("-n", namespace, "rollout", "status", "deployment/digits-v1")
    done(*status, "--timeout=300s")
    assert_served(namespace)

    done("-n", namespace, "set", "image", "deployment/digits-v1", "evaluator=atserving/evaluator:0.0.0-none")
    assert kubectl(*status, "--timeout=60s").returncode != 0, "a rollout of an image that is not there has ended"
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
