"""The manifests run: as processes, by their own commands and probes, and through rollouts under load."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import pytest

from atserving import __version__
from atserving.cli.k8s import secret_of
from atserving.local import examples
from atserving.local.authority import Authority
from tests.evaluator.digits import digits_tar
from tests.k8s.authority import CertManager
from tests.k8s.callers import BYTES, PATIENCE_S, SEVEN, answered, load
from tests.k8s.checks.model import Manifests
from tests.k8s.checks.secured import role_of
from tests.k8s.cluster import AWAY_S, WORKLOADS, Cluster, Document, Secrets, free_network, running
from tests.k8s.manifests import K8S, certificate, evaluator, kustomizations, kustomize, with_components

BIN = Path(sys.executable).parent
DIGITS = examples.DIGITS[0].path.as_uri()
PRODUCTION = K8S / "overlays" / "production"
POLL_S = 0.05

# A net that takes longer than a gate drains.
SLOW = b"""
import time
def net_init(cfg): return {}
def net_inference(model, args):
    time.sleep(3)
    return [{"code": 0, "message": "", "result": "at last"} for _ in args["reqs"]]
"""
# A net whose answer is larger than a connection takes at once.
LARGE_BYTES = 30_000_000
LARGE = (
    b"""
def net_init(cfg): return {}
def net_inference(model, args):
    return [{"code": 0, "message": "", "result_file": bytes(%d)} for _ in args["reqs"]]
"""
    % LARGE_BYTES
)


@asynccontextmanager
async def serving(
    documents: list[Document],
    releases: Mapping[str, str],
    folder: Path,
    secrets: Secrets | None = None,
    network: str | None = None,
) -> AsyncIterator[Cluster]:
    """Run a mesh and its evaluators, and publish their releases, by app, once the registries are ready.

    The operator of a mesh with TLS shows the Secret ``operator-ada-tls``.
    """
    async with running(documents, folder, secrets, network) as cluster:
        await cluster.wait_ready("registry")
        for app, release in releases.items():
            await publish(app, release, cluster, (secrets or {}).get("operator-ada-tls"))
        await cluster.wait_ready()
        yield cluster


async def publish(app: str, release: str, cluster: Cluster, certificate: Path | None = None) -> None:
    """Publish a release, as through `kubectl port-forward`."""
    flags = ["--phase", "production", "--registry", f"{cluster.endpoints('registry')[0]}:50054"]
    if certificate:
        files = {"--tls-cert": "tls.crt", "--tls-key": "tls.key", "--tls-ca": "ca.crt"}
        flags += [word for flag, name in files.items() for word in (flag, str(certificate / name))]
    command = [str(BIN / "atserving"), "release", "put", "--no-check", app, "v1", release, *flags]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def allowed(cluster: Cluster) -> set[tuple[str, str, int]]:
    """Return the arrows inside the mesh that the NetworkPolicies allow."""
    component = "app.kubernetes.io/component"
    return {
        (policy["spec"]["podSelector"]["matchLabels"][component], peer["podSelector"]["matchLabels"][component], port)
        for (kind, _), policy in cluster.documents.items()
        if kind == "NetworkPolicy"
        for rule in policy["spec"].get("egress", [])
        for peer in rule["to"]
        if peer.keys() == {"podSelector"}
        for port in [each["port"] for each in rule["ports"]]
    }


def test_the_images_are_of_the_versions_that_run_here() -> None:
    evaluators = [*evaluator("digits", "v1"), *evaluator("digits", "v2", "--gpu")]
    rendered = [each for folder in kustomizations() for each in kustomize(folder)]
    images = {str(each.spec["image"]) for _, each in Manifests([*rendered, *evaluators]).containers}
    # etcd's is a later one than the newest that comes as a package.
    (etcd,) = [each for each in images if each.startswith("quay.io/coreos/etcd:v3.5.")]
    said = subprocess.run([BIN / "envoy", "--version"], capture_output=True, text=True, check=True).stdout
    (envoy,) = [each for each in images if f"/{each.removeprefix('envoyproxy/envoy:v')}/" in said]
    own = {f"atserving/{each}:{__version__}" for each in ("gate", "registry", "evaluator", "evaluator-gpu")}
    assert images == {etcd, envoy, *own}


@pytest.mark.timeout(300)
async def test_rollouts_under_load_lose_no_request(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    releases = {"digits": DIGITS, "slow": digits_tar(tmp_path / "slow.tar", **{"net.py": SLOW})}
    evaluators = [*evaluator("digits", "v1"), *evaluator("slow", "v1", "--replicas", "1")]
    async with serving([*kustomize(K8S / "base"), *evaluators], releases, tmp_path) as cluster:
        await answered(f"http://{cluster.endpoints('envoy')[0]}:8080")
        async with load(cluster, "/v1/eval/digits", 4, 50) as asking, load(cluster, "/v1/eval/slow", 2, 2) as slowly:
            assert cluster.arrows() == allowed(cluster)
            # All at once, as after `kubectl apply` of a new version.
            names = ("digits-v1", "slow-v1", "registry", "gate", "envoy")
            await asyncio.gather(cluster.restart("etcd"), *(cluster.rollout(name) for name in names))
        answers = asking.answers + slowly.answers
        for name, count in {
            "requests sent": answers.total(),
            "requests failed": answers.total() - answers["ok"],
        }.items():
            record_property(name, count)
            print(f"{name}: {count}")


async def test_the_minimal_overlay_serves_and_its_envoy_stops_once_it_has_sent_everything(tmp_path: Path) -> None:
    releases = {"large": digits_tar(tmp_path / "large.tar", **{"net.py": LARGE})}
    mesh = [*kustomize(K8S / "overlays" / "minimal"), *evaluator("large", "v1", "--replicas", "1")]
    async with serving(mesh, releases, tmp_path) as cluster:
        url = f"http://{cluster.endpoints('envoy')[0]}:8080"
        await answered(url, "large")
        # It has no certificate.
        for scheme in ("https", "http"):
            async with aiohttp.ClientSession() as session:
                with pytest.raises(aiohttp.ClientError):
                    await session.get(f"{scheme}://{cluster.endpoints('envoy')[0]}:8443/health", ssl=False)
        (envoy,) = cluster.pods["envoy"]
        async with (
            aiohttp.ClientSession(read_bufsize=1 << 16) as session,
            session.post(f"{url}/v1/eval/large", data=SEVEN, headers=BYTES) as response,
        ):
            stopping = asyncio.create_task(envoy.stop())
            # Read nothing until Envoy would stop if nobody were reading.
            await asyncio.sleep(AWAY_S + 3)
            assert len(await response.read()) == LARGE_BYTES
        await stopping


async def test_certificates_of_cert_manager_secure_every_connection_and_are_renewed(tmp_path: Path) -> None:
    network = free_network()
    more = [*evaluator("digits", "v1", "--replicas", "1", "--tls"), *certificate("evaluator/digits")]
    components = [K8S / "components" / each for each in ("cert-manager", "operators")]
    mesh = with_components(PRODUCTION, components, [*more, *certificate("operator/ada")], tmp_path)
    manager = CertManager(tmp_path / "mesh", mesh)
    addresses = [f"{network}.{number}" for number in range(1, 40)]
    edge = Authority(tmp_path / "edge").issue("edge", addresses)
    secrets = {**manager.issue(), "edge-tls": edge.cert.parent}
    callers = ssl.create_default_context(cafile=str(edge.ca))
    async with serving(mesh, {"digits": DIGITS}, tmp_path, secrets, network) as cluster:
        for envoy in cluster.endpoints("envoy"):
            await answered(f"https://{envoy}:8443", tls=callers)
        assert await instances_with_load(cluster) == 1
        ports = secured_ports(cluster)
        assert {each.shows for each in ports} == {"gate-tls", "registry-tls", "evaluator-digits-tls", "etcd-tls"}
        await asyncio.gather(*(refuses(each, None) for each in ports))
        of_etcd = [each for each in ports if each.shows == "etcd-tls"]
        await asyncio.gather(*(refuses(each, secrets["evaluator-digits-tls"]) for each in of_etcd))
        await asyncio.gather(*(shows(each, secrets) for each in ports))
        manager.issue()
        await asyncio.gather(*(shows(each, secrets) for each in ports))
        # Everybody goes on, over old connections and new ones.
        await publish("digits", DIGITS, cluster, secrets["operator-ada-tls"])
        assert await instances_with_load(cluster) == 1
        for envoy in cluster.endpoints("envoy"):
            await answered(f"https://{envoy}:8443", tls=callers)


async def instances_with_load(cluster: Cluster) -> int:
    """Return how many instances tell their load: Envoy asks a registry for it, which asks each instance."""
    url = f"http://{cluster.endpoints('envoy')[0]}:9903/v1/apps/digits/instances?load=true"
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        assert response.status == 200, await response.text()
        return sum("load" in each for each in (await response.json())["instances"])


@dataclass(frozen=True)
class Port:
    """A port for other pods, and the Secrets that its pod and a caller show there."""

    ip: str
    number: int
    shows: str
    takes: str


CALLERS = {"grpc": "registry-tls", "operators": "envoy-tls", "client": "registry-tls", "peer": "etcd-tls"}
"""The ports for other pods, and a Secret that lets a caller in."""


def secured_ports(cluster: Cluster) -> list[Port]:
    containers = Manifests([each for (kind, _), each in cluster.documents.items() if kind in WORKLOADS]).containers
    return [
        Port(pod.ip, number, secret_of(role_of(workload, container)), caller)
        for workload, container in containers
        for name, caller in CALLERS.items()
        if workload.component != "envoy" and (number := container.number(name))
        for pod in cluster.pods[workload.name]
    ]


def context(secret: Path | None) -> ssl.SSLContext:
    """Return the context of a caller with the certificate in a Secret, or without one."""
    found = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    found.check_hostname, found.verify_mode = False, ssl.CERT_NONE
    if secret:
        found.load_cert_chain(secret / "tls.crt", secret / "tls.key")
    return found


async def refuses(port: Port, secret: Path | None) -> None:
    """Check that a port ends a connection with a certificate, or without one."""
    async with asyncio.timeout(PATIENCE_S):
        with suppress(OSError):
            reader, writer = await asyncio.open_connection(port.ip, port.number, ssl=context(secret))
            with closing(writer):
                assert not await reader.read(), f"{port} answers"


async def shows(port: Port, secrets: Secrets) -> None:
    """Wait until a port shows the certificate that is in its Secret now."""
    wanted = ssl.PEM_cert_to_DER_cert((secrets[port.shows] / "tls.crt").read_text())
    async with asyncio.timeout(PATIENCE_S):
        while True:
            _, writer = await asyncio.open_connection(port.ip, port.number, ssl=context(secrets[port.takes]))
            with closing(writer):
                if writer.get_extra_info("ssl_object").getpeercert(binary_form=True) == wanted:
                    return
            await asyncio.sleep(POLL_S)
