"""The manifests run: as processes, by their own commands and probes, and through rollouts under load."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from atserving import __version__
from atserving.local import examples
from tests.evaluator.digits import digits_tar
from tests.k8s.authority import Authority
from tests.k8s.callers import BYTES, SEVEN, answered, load
from tests.k8s.checks.model import Manifests
from tests.k8s.cluster import AWAY_S, Cluster, Document, Secrets, free_network, running
from tests.k8s.manifests import K8S, evaluator, kustomizations, kustomize

BIN = Path(sys.executable).parent
DIGITS = examples.DIGITS[0].path.as_uri()

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
    """Run a mesh and its evaluators, and publish their releases, by app, once the registries are ready."""
    async with running(documents, folder, secrets, network) as cluster:
        await cluster.wait_ready("registry")
        registry = f"{cluster.endpoints('registry')[0]}:50054"
        for app, release in releases.items():
            await publish(app, release, registry)
        await cluster.wait_ready()
        yield cluster


async def publish(app: str, release: str, registry: str) -> None:
    """Publish a release, as through `kubectl port-forward`."""
    flags = ["--phase", "production", "--registry", registry]
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


async def test_the_production_overlay_serves_over_tls(tmp_path: Path) -> None:
    network = free_network()
    authority = Authority(tmp_path)
    addresses = [f"{network}.{number}" for number in range(1, 40)]
    members = [f"DNS:etcd-{number}.etcd" for number in range(3)]
    secrets = {
        "edge-tls": authority.certified("edge", [f"IP:{each}" for each in addresses]),
        # A member sees connections from 127.0.0.1, whatever the pod's address is.
        "etcd-tls": authority.certified("etcd", [*members, "IP:127.0.0.1"]),
        "etcd-client-tls": authority.certified("registry", []),
    }
    mesh = [*kustomize(K8S / "overlays" / "production"), *evaluator("digits", "v1", "--replicas", "1")]
    tls = ssl.create_default_context(cadata=authority.certificate.read_text())
    async with serving(mesh, {"digits": DIGITS}, tmp_path, secrets, network) as cluster:
        for envoy in cluster.endpoints("envoy"):
            await answered(f"https://{envoy}:8443", tls=tls)
