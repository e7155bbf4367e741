"""The manifests run: as processes, by their own commands and probes, and through rollouts under load."""

from __future__ import annotations

import asyncio
import random
import re
import shutil
import ssl
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import orjson
import pytest

from atserving import __version__
from atserving.cli import examples
from tests.k8s.cluster import Cluster, free_network, running
from tests.k8s.manifests import K8S, evaluator, kustomize

BIN = Path(sys.executable).parent
SEVEN = (examples.FOLDER / "digits" / "images" / "7.png").read_bytes()
BYTES = {"content-type": "application/octet-stream"}
PATIENCE_S = 60.0
_PAUSE_S = 0.02


async def publish(cluster: Cluster) -> None:
    """Publishes the release, as through `kubectl port-forward`."""
    (v1, _) = examples.DIGITS
    command = [
        *(str(BIN / "atserving"), "release", "publish", "digits", "v1", v1.path.as_uri(), "--phase", "production"),
        *("--registry", f"{cluster.endpoints('registry')[0]}:50053"),
    ]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


async def answered(url: str, tls: ssl.SSLContext | None = None) -> None:
    """Waits until an eval through Envoy is answered."""
    async with aiohttp.ClientSession() as session, asyncio.timeout(PATIENCE_S):
        while True:
            async with session.post(f"{url}/v1/eval/digits", data=SEVEN, headers=BYTES, ssl=tls or True) as response:
                if response.status == 200:
                    return
            await asyncio.sleep(_PAUSE_S)


class Callers:
    """Callers that keep their connections: each asks one Envoy until that has it connect anew, or it fails."""

    def __init__(self, cluster: Cluster, path: str) -> None:
        self.answers: Counter[str] = Counter()
        self._cluster = cluster
        self._path = path
        self._changed = asyncio.Event()

    async def ask(self) -> None:
        while True:
            # A Service hands a new connection to any that is ready.
            if not (envoys := self._cluster.endpoints("envoy")):
                self.answers["no Envoy is ready"] += 1
                await asyncio.sleep(_PAUSE_S)
                continue
            envoy = random.choice(envoys)
            async with aiohttp.ClientSession(f"http://{envoy}:8080") as session:
                while await self._ask_once(session):  # noqa: ASYNC110 - a pace, not a condition
                    await asyncio.sleep(_PAUSE_S)

    async def _ask_once(self, session: aiohttp.ClientSession) -> bool:
        """Whether the connection may be used again."""
        try:
            async with session.post(self._path, data=SEVEN, headers=BYTES) as response:
                body = await response.read()
                good = response.status == 200 and orjson.loads(body)["result"]["confidences"][0]["class"] == "seven"
                self.answers["ok" if good else body.decode()] += 1
                return response.headers.get("connection") != "close"
        except aiohttp.ClientError as error:
            self.answers[repr(error)] += 1
            return False
        finally:
            self._changed.set()

    async def more(self, count: int) -> None:
        """Waits until so many more have been answered."""
        enough = self.answers.total() + count
        async with asyncio.timeout(PATIENCE_S):
            while self.answers.total() < enough:
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def load(cluster: Cluster, path: str = "/v1/eval/digits", callers: int = 4) -> AsyncIterator[Callers]:
    """Steady load while the block runs. Afterwards not one request may have failed."""
    asking = Callers(cluster, path)
    tasks = [asyncio.create_task(asking.ask()) for _ in range(callers)]
    try:
        await asking.more(50)
        yield asking
        await asking.more(50)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert asking.answers.keys() == {"ok"}, asking.answers


def allowed(cluster: Cluster) -> set[tuple[str, str, int]]:
    """The arrows inside the mesh that the NetworkPolicies allow."""
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
    manifests = "".join(path.read_text() for path in K8S.rglob("*.yaml"))
    images = dict(re.findall(r"(?:image|value): ([\w./-]+):v?(\d+\.\S+)", manifests))
    envoy = subprocess.run([BIN / "envoy", "--version"], capture_output=True, text=True, check=True).stdout
    assert f"/{images.pop('envoyproxy/envoy')}/" in envoy
    # etcd's is a later one: what is packaged here is old.
    assert images.pop("quay.io/coreos/etcd").startswith("3.5.")
    assert images == {f"atserving/{each}": __version__ for each in ("gate", "registry", "evaluator", "evaluator-gpu")}


@pytest.mark.timeout(300)
async def test_rollouts_under_load_lose_no_request(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    async with running(kustomize(K8S / "base"), tmp_path) as cluster:
        await publish(cluster)
        await cluster.apply(evaluator("digits", "v1"))
        await answered(f"http://{cluster.endpoints('envoy')[0]}:8080")
        async with load(cluster) as asking:
            assert cluster.arrows() == allowed(cluster)
            await cluster.rollout("digits-v1")
            await cluster.restart("etcd")
            await asyncio.gather(*(cluster.rollout(name) for name in ("registry", "gate", "envoy")))
        sent = asking.answers.total()
        for name, count in {"requests sent": sent, "requests failed": sent - asking.answers["ok"]}.items():
            record_property(name, count)
            print(f"{name}: {count}")


async def test_the_minimal_overlay_serves(tmp_path: Path) -> None:
    async with running(kustomize(K8S / "overlays" / "minimal"), tmp_path) as cluster:
        await publish(cluster)
        await cluster.apply(evaluator("digits", "v1", "--replicas", "1"))
        await answered(f"http://{cluster.endpoints('envoy')[0]}:8080")


async def test_the_production_overlay_serves_by_tls(tmp_path: Path) -> None:
    network = free_network()
    authority = Authority(tmp_path)
    addresses = ["127.0.0.1", *(f"{network}.{number}" for number in range(1, 40))]
    secrets = {
        "edge-tls": authority.certified("edge", addresses),
        "etcd-tls": authority.certified("etcd", addresses),
        "etcd-client-tls": authority.certified("registry", []),
    }
    async with running(kustomize(K8S / "overlays" / "production"), tmp_path, secrets, network) as cluster:
        await publish(cluster)
        await cluster.apply(evaluator("digits", "v1"))
        for envoy in cluster.endpoints("envoy"):
            await answered(
                f"https://{envoy}:8443", ssl.create_default_context(cadata=authority.certificate.read_text())
            )


class Authority:
    """Signs certificates, as the playbook does with openssl."""

    def __init__(self, folder: Path) -> None:
        if not shutil.which("openssl"):
            pytest.skip("openssl, which makes the keys, is not installed")
        self.certificate, self._key = folder / "ca.crt", folder / "ca.key"
        self._folder = folder
        self._make("etcd-authority", self.certificate, self._key)

    def certified(self, name: str, addresses: list[str]) -> dict[str, bytes]:
        """The files of a Secret: a certificate for these addresses, its key, and the authority's certificate."""
        certificate, key = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        names = ["-addext", "subjectAltName=" + ",".join(f"IP:{each}" for each in addresses)] if addresses else []
        signer = ["-CA", str(self.certificate), "-CAkey", str(self._key)]
        self._make(name, certificate, key, *signer, "-addext", "basicConstraints=critical,CA:FALSE", *names)
        files = {"tls.crt": certificate, "tls.key": key, "ca.crt": self.certificate}
        return {file: path.read_bytes() for file, path in files.items()}

    def _make(self, name: str, certificate: Path, key: Path, *flags: str) -> None:
        new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
        command = [*new, "-keyout", str(key), "-out", str(certificate), *flags]
        subprocess.run(command, check=True, capture_output=True)
