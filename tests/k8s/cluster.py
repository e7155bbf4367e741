"""A stand-in for a cluster: runs rendered manifests as processes of this machine, and rolls Deployments out.

It does for the manifests what a cluster does: controllers start pods and replace them by a Deployment's strategy,
kubelets probe and stop them (pods.py), Services know the ready pods, and DNS has their names (names.py). It schedules
nothing, limits nothing, and enforces no policy.

It makes pods wait less than a cluster does, where a wait is for others. DNS answers are cached for a shorter time, and
pods sleep so much less before they stop: they outlive the last cached answer by as many seconds as on a cluster. Its
Services give up a stopping Envoy at once, so Envoy drains for less time before it waits for requests in flight.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

from tests.k8s.names import CLUSTER_TTL_S, TTL_S, Names
from tests.k8s.pods import Pod, config_map_files

PATIENCE_S = 90.0
AWAY_S = 5
"""How long an Envoy drains before it waits for requests in flight."""
_NAMES_S = 0.2

# Appended to Envoy's bootstrap. On a cluster, a pod's resolv.conf names the DNS server; here, this does.
_RESOLVER = """
typed_dns_resolver_config:
  name: envoy.network.dns_resolver.cares
  typed_config:
    "@type": type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig
    resolvers: [{{socket_address: {{address: {address}, port_value: {port}}}}}]
    dns_resolver_options: {{no_default_search_domain: true}}
"""

_BOOTSTRAPS = {"envoy.yaml", "envoy-tls.yaml"}

WORKLOADS = ("StatefulSet", "Deployment")

Document = dict[str, Any]
Secrets = Mapping[str, Path]
"""The folders with their files, by their names. Whoever replaces a file there replaces it in the pods."""


class Cluster:
    """The pods of some manifests. ``secrets`` are the Secrets that an operator provides."""

    def __init__(self, folder: Path, secrets: Secrets, network: str | None = None) -> None:
        self.documents: dict[tuple[str, str], Document] = {}
        """By kind and name."""
        self.pods: dict[str, list[Pod]] = {}
        """By the workload's name, terminating pods included."""
        self._folder = folder
        self._secrets = secrets
        self._network = network or free_network()
        self._addresses = (f"{self._network}.{number}" for number in itertools.count(1))
        self._numbers = itertools.count()
        self._names = Names(f"{self._network}.254", folder / "hosts", self._lookup)
        self._naming: asyncio.Task[None] | None = None

    def endpoints(self, service: str) -> list[str]:
        """Return the addresses of a Service's pods: the ready ones, or all where it publishes the others too."""
        manifest = self.documents.get(("Service", service))
        if manifest is None:
            return []
        selector = manifest["spec"]["selector"].items()
        every = manifest["spec"].get("publishNotReadyAddresses", False)
        pods = [pod for pods in list(self.pods.values()) for pod in list(pods)]
        return [
            pod.ip for pod in pods if selector <= pod.labels.items() and (every or (pod.ready and not pod.terminating))
        ]

    def _lookup(self, name: str) -> list[str]:
        """Return the addresses of a headless Service, or of a StatefulSet's pod behind one."""
        pod, _, service = name.rpartition(".")
        if not pod:
            headless = self.documents.get(("Service", name), {"spec": {}})["spec"].get("clusterIP") == "None"
            return self.endpoints(name) if headless else []
        return [
            each.ip for each in self.pods.get(service, []) if each.name == pod and each.ip in self.endpoints(service)
        ]

    async def _keep_names(self) -> None:
        while True:
            await asyncio.sleep(_NAMES_S)
            self._write_hosts()

    def _write_hosts(self) -> None:
        services = [name for kind, name in self.documents if kind == "Service"]
        members = [f"{pod.name}.{name}" for name in services for pod in self.pods.get(name, [])]
        self._names.write_hosts([*services, *members])

    async def start(self, documents: list[Document]) -> None:
        """Start all workloads of these documents at once, as `kubectl apply` does."""
        self.documents |= {(each["kind"], each["metadata"]["name"]): each for each in documents}
        names = [each["metadata"]["name"] for each in documents if each["kind"] in WORKLOADS]
        pods = [self._make_pod(name) for name in names for _ in range(self._replicas(name))]
        if self._naming is None:
            self._write_hosts()
            self._naming = asyncio.create_task(self._keep_names())
        await asyncio.gather(*(pod.start() for pod in pods))

    async def wait_ready(self, *names: str) -> None:
        """Wait until every pod of these workloads is ready; of all workloads without names."""
        pods = [pod for name in names or self.pods for pod in self.pods[name]]
        await asyncio.gather(*(pod.wait_ready(PATIENCE_S) for pod in pods))

    async def rollout(self, name: str) -> None:
        """Replace every pod of a Deployment by its strategy, and wait until the last old pod has stopped."""
        workload = self._workload(name)
        strategy, wanted = workload["spec"]["strategy"]["rollingUpdate"], self._replicas(name)
        assert strategy["maxUnavailable"] == 0
        old = list(self.pods[name])
        new: list[Pod] = []
        stopping: list[asyncio.Task[None]] = []
        while old:
            surge = wanted + strategy["maxSurge"] - len(old) - len(new)
            surging = [self._make_pod(name) for _ in range(min(surge, wanted - len(new)))]
            await asyncio.gather(*(pod.start() for pod in surging))
            new += surging
            await asyncio.gather(*(self._wait_available(pod, workload) for pod in new))
            while old and len(old) + len(new) > wanted:
                stopping.append(asyncio.create_task(old.pop(0).stop()))
        await asyncio.gather(*stopping)
        self.pods[name] = new

    async def restart(self, name: str) -> None:
        """Restart each pod of a StatefulSet, the last one first, and wait until it is ready before the next."""
        for pod in reversed(self.pods[name]):
            await pod.stop()
            await pod.start()
            await pod.wait_ready(PATIENCE_S)

    async def _wait_available(self, pod: Pod, workload: Document) -> None:
        await pod.wait_ready(PATIENCE_S)
        since = asyncio.get_running_loop().time() - pod.ready_since
        await asyncio.sleep(max(0, workload["spec"].get("minReadySeconds", 0) - since))

    def arrows(self) -> set[tuple[str, str, int]]:
        """Return which component is connected to which now, and to which port."""
        pods = [pod for pods in self.pods.values() for pod in pods if not pod.terminating]
        by_address = {pod.ip: pod for pod in pods}
        return {
            (pod.component, by_address[address].component, port)
            for pod in pods
            for address, port in pod.connections()
            # Leave out connections to itself, and the server's end of each connection.
            if address in by_address and address != pod.ip and by_address[address].listens_on(port)
        }

    def check(self) -> None:
        """Raise PodError where a cluster would have restarted a pod."""
        for pods in self.pods.values():
            for pod in pods:
                if not pod.terminating:
                    pod.check()

    async def stop(self) -> None:
        await asyncio.gather(*(pod.kill() for pods in self.pods.values() for pod in pods))
        if self._naming:
            self._naming.cancel()
            await asyncio.gather(self._naming, return_exceptions=True)
        self._names.stop()

    def _make_pod(self, name: str) -> Pod:
        workload = self._workload(name)
        number = next(self._numbers)
        ordinal = len(self.pods.get(name, []))
        pod_name = f"{name}-{ordinal}" if workload["kind"] == "StatefulSet" else f"{name}-{number:05x}"
        folder = self._folder / pod_name
        folder.mkdir()
        manifest = _hurried(workload["spec"]["template"])
        # Envoy asks the DNS server, but would find names in the hosts file first.
        asks = manifest["metadata"]["labels"]["app.kubernetes.io/component"] == "envoy"
        hosts = None if asks else self._names.hosts
        pod = Pod(manifest, pod_name, next(self._addresses), folder, self._value, self._files, hosts)
        self.pods.setdefault(name, []).append(pod)
        return pod

    def _workload(self, name: str) -> Document:
        return next(self.documents[kind, name] for kind in WORKLOADS if (kind, name) in self.documents)

    def _replicas(self, name: str) -> int:
        """Return the first number of pods: the autoscaler's minimum, where there is one."""
        autoscaler = self.documents.get(("HorizontalPodAutoscaler", name))
        return int(autoscaler["spec"]["minReplicas"] if autoscaler else self._workload(name)["spec"]["replicas"])

    def _value(self, reference: Document) -> str:
        return str(self.documents["ConfigMap", reference["name"]]["data"][reference["key"]])

    def _files(self, volume: Document) -> Mapping[str, bytes] | Path:
        match volume:
            case {"configMap": {"name": name}}:
                files = config_map_files(self.documents["ConfigMap", name])
                resolver = _RESOLVER.format(address=self._names.address, port=self._names.port).encode()
                for bootstrap in files.keys() & _BOOTSTRAPS:
                    files[bootstrap] += resolver
                return files
            case {"secret": {"secretName": name}}:
                return self._secrets[name]
        return {}


def _hurried(template: Document) -> Document:
    """Return a pod template with the shorter waits of the stand-in."""
    template = deepcopy(template)
    match template["spec"]["containers"]:
        case [{"lifecycle": {"preStop": {"sleep": sleep}}}]:
            sleep["seconds"] -= CLUSTER_TTL_S - TTL_S
        case [{"lifecycle": {"preStop": {"exec": {"command": ["bash", _, _, _, _] as command}}}}]:
            # bash drain.sh ADMIN AWAY_S MOST_S
            command[3] = str(AWAY_S)
    return template


@asynccontextmanager
async def running(
    documents: list[Document], folder: Path, secrets: Secrets | None = None, network: str | None = None
) -> AsyncIterator[Cluster]:
    """Start a cluster with these manifests, and stop it after the block. Its pods may not be ready yet."""
    cluster = Cluster(folder, secrets or {}, network)
    try:
        await cluster.start(documents)
        yield cluster
        cluster.check()
    finally:
        await cluster.stop()


def free_network() -> str:
    """Return the first three numbers of unused loopback addresses. Pods have ``.1``, ``.2``, ... of them."""
    while True:
        network = f"127.{random.randint(1, 254)}.{random.randint(1, 254)}"
        with socket.socket() as probe:
            try:
                probe.bind((f"{network}.1", 50051))
            except OSError:
                continue
        return network
