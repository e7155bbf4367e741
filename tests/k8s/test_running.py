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
from atserving.local import examples
from tests.evaluator.digits import digits_tar
from tests.k8s.cluster import Cluster, free_network, running
from tests.k8s.manifests import K8S, evaluator, kustomize

BIN = Path(sys.executable).parent
SEVEN = (examples.FOLDER / "digits" / "images" / "7.png").read_bytes()
BYTES = {"content-type": "application/octet-stream"}
PATIENCE_S = 60.0
_PAUSE_S = 0.02


# Nets that take longer than what is drained, and answer with more than a connection takes at once.
SLOW = b"""
import time
def net_init(cfg): return {}
def net_inference(model, args):
    time.sleep(3)
    return [{"code": 0, "message": "", "result": "at last"} for _ in args["reqs"]]
"""
LARGE_BYTES = 30_000_000
LARGE = (
    b"""
def net_init(cfg): return {}
def net_inference(model, args):
    return [{"code": 0, "message": "", "result_file": bytes(%d)} for _ in args["reqs"]]
"""
    % LARGE_BYTES
)


async def publish(cluster: Cluster, app: str = "digits", release: str = examples.DIGITS[0].path.as_uri()) -> None:
    """Publishes a release, as through `kubectl port-forward`."""
    command = [
        *(str(BIN / "atserving"), "release", "publish", app, "v1", release, "--phase", "production"),
        *("--registry", f"{cluster.endpoints('registry')[0]}:50054"),
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
                result = orjson.loads(body).get("result")
                good = result == "at last" or (result and result["confidences"][0]["class"] == "seven")
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
async def load(cluster: Cluster, path: str, callers: int, some: int) -> AsyncIterator[Callers]:
    """Steady load while the block runs. Afterwards not one request may have failed."""
    asking = Callers(cluster, path)
    tasks = [asyncio.create_task(asking.ask()) for _ in range(callers)]
    try:
        await asking.more(some)
        yield asking
        await asking.more(some)
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
    assert images == {f"atserving/{each}": __version__ for each in ("gate", "registry", "evaluator")}


@pytest.mark.timeout(300)
async def test_rollouts_under_load_lose_no_request(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    async with running(kustomize(K8S / "base"), tmp_path) as cluster:
        await publish(cluster)
        await publish(cluster, "slow", digits_tar(tmp_path / "slow.tar", **{"net.py": SLOW}))
        await cluster.apply([*evaluator("digits", "v1"), *evaluator("slow", "v1")])
        await answered(f"http://{cluster.endpoints('envoy')[0]}:8080")
        async with load(cluster, "/v1/eval/digits", 4, 50) as asking, load(cluster, "/v1/eval/slow", 2, 2) as slowly:
            assert cluster.arrows() == allowed(cluster)
            await asyncio.gather(cluster.rollout("digits-v1"), cluster.rollout("slow-v1"))
            await cluster.restart("etcd")
            await asyncio.gather(*(cluster.rollout(name) for name in ("registry", "gate", "envoy")))
        answers = asking.answers + slowly.answers
        for name, count in {
            "requests sent": answers.total(),
            "requests failed": answers.total() - answers["ok"],
        }.items():
            record_property(name, count)
            print(f"{name}: {count}")


async def test_the_minimal_overlay_serves_and_its_envoy_goes_once_it_has_sent_all(tmp_path: Path) -> None:
    async with running(kustomize(K8S / "overlays" / "minimal"), tmp_path) as cluster:
        await publish(cluster)
        await publish(cluster, "large", digits_tar(tmp_path / "large.tar", **{"net.py": LARGE}))
        names = ("digits", "large")
        await cluster.apply([each for app in names for each in evaluator(app, "v1", "--replicas", "1")])
        url = f"http://{cluster.endpoints('envoy')[0]}:8080"
        await answered(url)
        (envoy,) = cluster.pods["envoy"]
        async with (
            aiohttp.ClientSession(read_bufsize=1 << 16) as session,
            session.post(f"{url}/v1/eval/large", data=SEVEN, headers=BYTES) as response,
        ):
            going = asyncio.create_task(envoy.stop())
            # A caller that is slower than the 15 s that Envoy stays in any case.
            await asyncio.sleep(20)
            assert len(await response.read()) == LARGE_BYTES
        await going


async def test_the_production_overlay_serves_by_tls(tmp_path: Path) -> None:
    network = free_network()
    authority = Authority(tmp_path)
    addresses = [f"{network}.{number}" for number in range(1, 40)]
    members = [f"DNS:etcd-{number}.etcd" for number in range(3)]
    secrets = {
        "edge-tls": authority.certified("edge", [f"IP:{each}" for each in addresses]),
        # What comes from 127.1.2.3 here comes from 127.0.0.1, for the other end.
        "etcd-tls": authority.certified("etcd", [*members, "IP:127.0.0.1"]),
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

    def certified(self, name: str, names: list[str]) -> dict[str, bytes]:
        """The files of a Secret: a certificate for these names, its key, and the authority's certificate."""
        certificate, key = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        named = ["-addext", f"subjectAltName={','.join(names)}"] if names else []
        signer = ["-CA", str(self.certificate), "-CAkey", str(self._key)]
        self._make(name, certificate, key, *signer, "-addext", "basicConstraints=critical,CA:FALSE", *named)
        files = {"tls.crt": certificate, "tls.key": key, "ca.crt": self.certificate}
        return {file: path.read_bytes() for file, path in files.items()}

    def _make(self, name: str, certificate: Path, key: Path, *flags: str) -> None:
        new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
        command = [*new, "-keyout", str(key), "-out", str(certificate), *flags]
        subprocess.run(command, check=True, capture_output=True)
