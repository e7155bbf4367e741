"""Rules of Envoy: its bootstrap fits the pod that it is read in, and the mesh around it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

import yaml

import gate.__main__

from .containers import seconds
from .files import file_in, mount_of
from .model import Container, Document, Manifests, Workload, at
from .services import inside, serves

# The listeners of the bootstrap, and the ports that they are declared as.
LISTENERS = {"edge": "http", "ops": "ops", "edge-tls": "https"}
_HERE = "127.0.0.1"
_ADMIN = ("admin", "address")
_BY_NAME = ("STRICT_DNS", "LOGICAL_DNS")


def the_edge_reads_a_bootstrap(manifests: Manifests) -> Iterator[str]:
    for workload, container in _edges(manifests):
        if not _bootstrap(manifests, workload, container):
            path = container.flag("config-path")
            yield f"{container} reads --config-path {path}, which is no file of a ConfigMap with a bootstrap"


def the_admin_interface_is_closed(manifests: Manifests) -> Iterator[str]:
    """It can stop the process."""
    for workload, container in _edges(manifests):
        for part in _bootstrap(manifests, workload, container):
            address = _socket(at(part, *_ADMIN))
            if "admin" in part and not address.startswith(f"{_HERE}:"):
                yield f"{container} has its admin interface at {address}, should be at {_HERE}"


def the_edge_listens_on_declared_ports(manifests: Manifests) -> Iterator[str]:
    for workload, container in _edges(manifests):
        parts = _bootstrap(manifests, workload, container)
        listeners = [each for part in parts for each in at(part, "static_resources", "listeners", default=[])]
        found = {f"{LISTENERS.get(each['name'], each['name'])} {_socket(each['address'])}" for each in listeners}
        declared = {f"{each.get('name')} 0.0.0.0:{each['containerPort']}" for each in container.ports}
        if parts and found != declared:
            yield f"{container} declares {_list(declared)}, and its listeners are {_list(found)}"


def the_edge_drains(manifests: Manifests) -> Iterator[str]:
    """Envoy ends at once when it is told to, with all that is under way; a script waits for that before."""
    for workload, container in _edges(manifests):
        words = at(container.spec, "lifecycle", "preStop", "exec", "command", default=[])
        hook = re.fullmatch(r"bash (/\S+/drain\.sh) (\S+) [\d.]+ [\d.]+", " ".join(words))
        if not hook:
            yield f"{container} has no preStop hook that lets it drain: bash .../drain.sh ADMIN AWAY_S MOST_S"
            continue
        if _file(manifests, workload, container, hook[1]) is None:
            yield f"{container}: its preStop hook runs {hook[1]}, which is no file of a ConfigMap"
        for part in _bootstrap(manifests, workload, container):
            address = _socket(at(part, *_ADMIN))
            if "admin" in part and address != hook[2]:
                yield f"{container}: its preStop hook asks {hook[2]}, and its admin interface is at {address}"


def the_edge_finds_the_mesh(manifests: Manifests) -> Iterator[str]:
    for workload, container in _edges(manifests):
        for cluster in _clusters(manifests, workload, container):
            for address in _endpoints(cluster) if cluster.get("type") in _BY_NAME else ():
                host, _, port = address.rpartition(":")
                place = inside(manifests, host)
                if not place or not port.isdecimal() or not serves(manifests, *place, int(port)):
                    yield f"{container}: its cluster {cluster['name']} is at {address}, which leads nowhere"


def gates_drain_until_the_edge_knows(manifests: Manifests) -> Iterator[str]:
    """Envoy takes a gate out when its health has failed for so many times."""
    clusters = [each for edge in _edges(manifests) for each in _clusters(manifests, *edge)]
    checks = [
        each for cluster in clusters if cluster["name"] == "gate" for each in at(cluster, "health_checks", default=[])
    ]
    asked = max((float(each["interval"].rstrip("s")) * each["unhealthy_threshold"] for each in checks), default=0)
    for workload in manifests.workloads:
        for container in workload.lasting if workload.component == "gate" else ():
            drain = seconds(gate.__main__.main, container, "drain")
            if drain <= asked:
                yield f"{container} drains for {drain:g} s, and Envoy takes {asked:g} s to see that it does"


def _edges(manifests: Manifests) -> Iterator[tuple[Workload, Container]]:
    for workload in manifests.workloads:
        if workload.component == "envoy":
            yield from ((workload, each) for each in workload.lasting)


def _bootstrap(manifests: Manifests, workload: Workload, container: Container) -> list[Document]:
    """What Envoy reads, from its file and from a variable that is added to that; empty where there is no such file."""
    bootstrap = _read(_file(manifests, workload, container, container.flag("config-path") or "") or "")
    variable = re.fullmatch(r"\$\((\w+)\)", container.flag("config-yaml") or "")
    variables = [each for each in at(container.spec, "env", default=[]) if variable and each["name"] == variable[1]]
    sources = [at(each, "valueFrom", "configMapKeyRef", default={}) for each in variables]
    configs = [(manifests.find("ConfigMap", str(each.get("name"))), str(each.get("key"))) for each in sources]
    added = [at(config, "data", key, default="") for config, key in configs]
    return [bootstrap, *(part for each in added if (part := _read(each)))] if bootstrap else []


def _file(manifests: Manifests, workload: Workload, container: Container, path: str) -> str | None:
    """The text of a file that a ConfigMap is mounted with."""
    mount = mount_of(container, path)
    for volume in workload.volumes:
        if mount and volume["name"] == mount["name"] and "configMap" in volume:
            name = file_in(mount, path)
            items = at(volume, "configMap", "items", default=[{"key": name, "path": name}])
            key = next((each["key"] for each in items if each["path"] == name), "")
            return at(manifests.find("ConfigMap", str(at(volume, "configMap", "name"))), "data", key)
    return None


@functools.cache
def _read(text: str) -> Document | None:
    # It is long, and the same in all overlays.
    try:
        read = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return read if isinstance(read, dict) else None


def _clusters(manifests: Manifests, workload: Workload, container: Container) -> list[Document]:
    parts = _bootstrap(manifests, workload, container)
    return [each for part in parts for each in at(part, "static_resources", "clusters", default=[])]


def _endpoints(cluster: Document) -> Iterator[str]:
    for locality in at(cluster, "load_assignment", "endpoints", default=[]):
        for each in locality["lb_endpoints"]:
            yield _socket(at(each, "endpoint", "address"))


def _socket(address: Document | None) -> str:
    return f"{at(address, 'socket_address', 'address')}:{at(address, 'socket_address', 'port_value')}"


def _list(ports: set[str]) -> str:
    return ", ".join(sorted(ports))


RULES = (
    the_edge_reads_a_bootstrap,
    the_admin_interface_is_closed,
    the_edge_listens_on_declared_ports,
    the_edge_drains,
    the_edge_finds_the_mesh,
    gates_drain_until_the_edge_knows,
)
