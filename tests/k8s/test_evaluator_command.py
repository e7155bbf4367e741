"""`atserving k8s` prints the manifests of a version, and Certificates, or refuses its arguments with one line."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml

from atserving.cli import main
from atserving.cli.k8s import secret_of
from tests.k8s.manifests import read, validate

BIN = Path(sys.executable).parent
LABELS = ("atserving/app", "atserving/version")
COMMAND = ("atserving", "k8s", "evaluator")
CERTIFICATE = ("atserving", "k8s", "certificate")
# Versions that some parser of YAML takes for a number, a truth or nothing.
VERSIONS = ("7104e36", "1e3", "0o17", "1.e5", "12e5", "y", "null", "0x1f", "1_000", "on", "201811091530")


def run(*arguments: str, command: tuple[str, ...] = COMMAND) -> subprocess.CompletedProcess[str]:
    """Run the command in this process. A new process takes half a second to import all that it needs."""
    output, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.setattr(sys, "argv", [*command, *arguments])
        with pytest.raises(SystemExit) as stopped:
            main.main()
    return subprocess.CompletedProcess(arguments, int(stopped.value.code or 0), output.getvalue(), errors.getvalue())


def printed(*arguments: str) -> dict[str, Any]:
    """Return the printed manifests by kind."""
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    return {each["kind"]: each for each in read(done.stdout)}


def container(manifests: dict[str, Any]) -> Any:
    (only,) = manifests["Deployment"]["spec"]["template"]["spec"]["containers"]
    return only


def test_a_version_has_a_deployment_a_budget_and_an_autoscaler_of_one_name() -> None:
    manifests = printed("digits", "201811091530", "--replicas", "3", "--namespace", "nets")
    assert set(manifests) == {"Deployment", "PodDisruptionBudget", "HorizontalPodAutoscaler"}
    for each in manifests.values():
        assert (each["metadata"]["name"], each["metadata"]["namespace"]) == ("digits-201811091530", "nets")
        assert [each["metadata"]["labels"][label] for label in LABELS] == ["digits", "201811091530"]
        assert each["metadata"]["labels"]["app.kubernetes.io/component"] == "evaluator"
    assert manifests["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == "digits-201811091530"
    assert manifests["HorizontalPodAutoscaler"]["spec"]["minReplicas"] == 3
    assert manifests["HorizontalPodAutoscaler"]["spec"]["maxReplicas"] == 12
    assert {"--app=digits", "--version=201811091530"} <= set(container(manifests)["args"])
    assert "replicas" not in manifests["Deployment"]["spec"], "the autoscaler sets them"
    metrics = {each["type"]: each for each in manifests["HorizontalPodAutoscaler"]["spec"]["metrics"]}
    assert metrics["Pods"]["pods"]["metric"]["name"] == "atserving_evaluator_load"
    assert metrics["Resource"]["resource"]["name"] == "cpu"


def test_flags_set_image_resources_replicas_and_keys() -> None:
    manifests = printed(
        *("digits", "v1", "--image", "registry.example/nets/evaluator:1.2", "--cpu", "500m", "--memory", "3Gi"),
        *("--qiniu", "digits-keys", "--max-replicas", "2"),
    )
    made = container(manifests)
    assert made["image"] == "registry.example/nets/evaluator:1.2"
    assert made["resources"] == {kind: {"cpu": "500m", "memory": "3Gi"} for kind in ("requests", "limits")}
    assert "--qiniu=/etc/qiniu/qiniu.json" in made["args"]
    pod = manifests["Deployment"]["spec"]["template"]["spec"]
    assert {"name": "qiniu", "secret": {"secretName": "digits-keys"}} in pod["volumes"]
    assert manifests["HorizontalPodAutoscaler"]["spec"]["maxReplicas"] == 2


def triggers(manifests: dict[str, Any]) -> dict[str, Any]:
    return {each.get("name", each["type"]): each for each in manifests["ScaledObject"]["spec"]["triggers"]}


def test_keda_scales_in_place_of_the_adapter() -> None:
    manifests = printed("Digits", "v.1", "--autoscaler", "keda", "--replicas", "3", "--namespace", "nets")
    assert set(manifests) == {"Deployment", "PodDisruptionBudget", "ScaledObject"}
    scaler, name = manifests["ScaledObject"], manifests["Deployment"]["metadata"]["name"]
    assert (scaler["metadata"]["name"], scaler["metadata"]["namespace"]) == (name, "nets")
    assert scaler["metadata"]["labels"] == manifests["PodDisruptionBudget"]["metadata"]["labels"]
    assert scaler["spec"]["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
    assert (scaler["spec"]["minReplicaCount"], scaler["spec"]["maxReplicaCount"]) == (3, 12)
    made = triggers(manifests)
    assert made.keys() == {"load", "cpu"}
    # Names of the mesh, not of Kubernetes.
    assert 'namespace="nets",app="Digits",version="v.1"' in made["load"]["metadata"]["query"]
    assert made["load"]["metadata"]["ignoreNullValues"] == "false", "a lost Prometheus would stop instances"
    assert made["load"]["metadata"]["serverAddress"] == "http://prometheus.monitoring:9090"
    assert validate([scaler]) == []


def test_keda_scales_to_zero_by_demand() -> None:
    manifests = printed("digits", "v1", "--autoscaler=keda", "--replicas=0", "--prometheus=https://p.example/api")
    spec = manifests["ScaledObject"]["spec"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (0, 1)
    made = triggers(manifests)
    assert made.keys() == {"load", "cpu", "demand"}
    assert made["load"]["metadata"]["ignoreNullValues"] == "true", "no instance is no failure"
    assert {each["metadata"].get("serverAddress") for each in made.values()} == {None, "https://p.example/api"}
    assert "replicas" not in manifests["Deployment"]["spec"]


def test_both_autoscalers_behave_alike() -> None:
    keda = printed("digits", "v1", "--autoscaler", "keda")["ScaledObject"]["spec"]
    other = printed("digits", "v1")["HorizontalPodAutoscaler"]["spec"]
    assert keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"] == other["behavior"]


def test_a_gpu_sets_image_resources_and_toleration() -> None:
    manifests = printed("digits", "v1", "--gpu", "--memory", "6Gi")
    made = container(manifests)
    assert made["image"].startswith("atserving/evaluator-gpu:")
    for kind in ("requests", "limits"):
        assert made["resources"][kind]["nvidia.com/gpu"] == "1"
        assert made["resources"][kind]["memory"] == "6Gi"
    (toleration,) = manifests["Deployment"]["spec"]["template"]["spec"]["tolerations"]
    assert toleration["key"] == "nvidia.com/gpu"
    for image in ("own/gpu:7", f"own/gpu:7@sha256:{'0' * 64}"):
        assert container(printed("digits", "v1", "--gpu", "--image", image))["image"] == image


def test_tls_takes_the_place_of_consent_to_plain_text() -> None:
    manifests = printed("digits", "v1", "--tls", "--qiniu", "digits-keys")
    values = {each["name"]: each.get("value") for each in container(manifests)["env"]}
    assert {name: value for name, value in values.items() if name.startswith("ATSERVING_")} == {
        "ATSERVING_TLS_CERT": "/etc/mesh-tls/tls.crt",
        "ATSERVING_TLS_KEY": "/etc/mesh-tls/tls.key",
        "ATSERVING_TLS_CA": "/etc/mesh-tls/ca.crt",
    }
    template = manifests["Deployment"]["spec"]["template"]
    assert {"name": "mesh-tls", "secret": {"secretName": "evaluator-digits-tls"}} in template["spec"]["volumes"]
    annotations = template["metadata"]["annotations"]
    assert annotations["atserving/secrets-from-outside"] == "digits-keys"
    assert annotations["atserving/secrets-from-outside.tls"] == "evaluator-digits-tls"


@pytest.mark.parametrize("app", ["digits", "Digits", "a.b", "a_b", "x" * 63])
def test_a_certificate_is_for_the_evaluators_of_one_app_alone(app: str) -> None:
    (certificate,) = read(run(f"evaluator/{app}", "--namespace", "nets", command=CERTIFICATE).stdout)
    volumes = printed(app, "v1", "--tls")["Deployment"]["spec"]["template"]["spec"]["volumes"]
    (secret,) = [each["secret"]["secretName"] for each in volumes if "secret" in each]
    assert certificate["spec"]["secretName"] == secret
    assert certificate["spec"]["uris"] == [f"spiffe://atserving/evaluator/{app}"]
    assert certificate["spec"]["dnsNames"] == ["evaluator.atserving"]
    assert certificate["metadata"]["namespace"] == "nets"
    assert validate([certificate]) == []


def test_apps_of_similar_names_have_secrets_of_their_own() -> None:
    apps = ["a-b", "a.b", "a_b", "A-b", "a-b-tls", "a"]
    assert len({secret_of(f"evaluator/{app}") for app in apps}) == len(apps)


@pytest.mark.parametrize(
    "role", ["gate", "registry", "evaluator", "evaluator/", "evaluator/a b", "evaluator/a/b", "x/y"]
)
def test_a_certificate_of_another_role_is_refused_with_one_line(role: str) -> None:
    refused = run(role, command=CERTIFICATE)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert f"{role!r} should be evaluator/APP or operator/NAME" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_the_installed_command_prints_the_same() -> None:
    done = subprocess.run([BIN / COMMAND[0], *COMMAND[1:], "digits", "v1"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == (run("digits", "v1").stdout, "")
    assert done.stdout.startswith("# atserving k8s evaluator digits v1\n")


def test_kubectl_reads_every_version_as_text(tmp_path: Path) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    files = [tmp_path / f"{number}.yaml" for number in range(len(VERSIONS))]
    for file, version in zip(files, VERSIONS, strict=True):
        file.write_text(run("digits", version).stdout)
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({"resources": [each.name for each in files]}))
    rendered = subprocess.run(["kubectl", "kustomize", tmp_path], capture_output=True, text=True, check=True).stdout
    labels = [each["metadata"]["labels"]["atserving/version"] for each in yaml.load_all(rendered, yaml.BaseLoader)]
    assert sorted(labels) == sorted(3 * VERSIONS)
    named = [flag for each in files for flag in ("-f", str(each))]
    labelled = ["kubectl", "label", "--local", *named, "-o", "name", "read=again"]
    assert subprocess.run(labelled, capture_output=True, text=True).stderr == ""


def test_a_longer_grace_lengthens_the_pods_grace() -> None:
    manifests = printed("digits", "v1", "--grace", "120")
    assert "--grace=120" in container(manifests)["args"]
    assert manifests["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 130


def test_names_that_kubernetes_refuses_get_unique_others() -> None:
    names = [
        ("a-b", "c"),
        ("a", "b-c"),
        ("A", "c"),
        ("a", "C"),
        ("a", "c."),
        ("a", "c_"),
        ("a", "c"),
        ("x" * 63, "1"),
        ("x" * 63, "2"),
    ]
    seen = set()
    for app, version in names:
        manifests = printed(app, version)
        deployment = manifests["Deployment"]
        seen.add((deployment["metadata"]["name"], *map(deployment["metadata"]["labels"].get, LABELS)))
        assert {f"--app={app}", f"--version={version}"} <= set(container(manifests)["args"])
        assert len(deployment["metadata"]["name"]) <= 46
        for label in LABELS:
            value = deployment["metadata"]["labels"][label]
            assert len(value) <= 63
            assert value[-1].isalnum()
    assert len({name for name, *_ in seen}) == len(names)
    assert len({tuple(labels) for _, *labels in seen}) == len(names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a b", "v1"], "'a b' should match"),
        (["digits", "$(reboot)"], "'$(reboot)' should match"),
        (["digits", "v1", "--replicas", "-1"], "--replicas"),
        (["digits", "v1", "--replicas", "0"], "--replicas 0 needs --autoscaler keda"),
        (["digits", "v1", "--autoscaler", "vpa"], "'vpa' is not one of 'prometheus-adapter', 'keda'"),
        (["digits", "v1", "--prometheus", "http://p:9090"], "--prometheus needs --autoscaler keda"),
        (["digits", "v1", "--autoscaler", "keda", "--prometheus", "p:9090"], "'p:9090' is not a URL"),
        (["digits", "v1", "--replicas", "3", "--max-replicas", "2"], "--max-replicas 2 is less than --replicas 3"),
        (["digits", "v1", "--image", "evaluator"], "'evaluator' has no tag, or a tag that moves"),
        (["digits", "v1", "--image", "evaluator:latest"], "'evaluator:latest' has no tag, or a tag that moves"),
        (["digits", "v1", "--memory", "much"], "'much' is not an amount of memory"),
        (["digits", "v1", "--namespace", "No_Name"], "'No_Name' is not a name"),
        (["digits", "v1", "--cpu", "0"], "'0' is not a number of CPUs"),
        (["digits", "v1", "--cpu", "\u0662"], "is not a number of CPUs"),
        (["digits", "v1", "--memory", "512m"], "'512m' is not an amount of memory"),
        (["digits", "v1", "--image", "A//:::x:1"], "'A//:::x:1' has no tag, or a tag that moves"),
        (["digits", "v1", "--replicas", "99999999999999"], "--replicas"),
    ],
)
def test_a_wrong_argument_is_refused_with_one_line(arguments: list[str], message: str) -> None:
    refused = run(*arguments)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not refused.stdout
