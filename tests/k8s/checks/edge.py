"""Does Envoy's bootstrap fit the pod that reads it, and the mesh around it?"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

import yaml

from .finds import file_in, mount_of
from .flags import seconds
from .listens import serves, split_host
from .model import Container, Document, Manifests, Workload, at, dict_at, list_at

LISTENERS = {"edge": ("http", "https"), "ops": ("ops",)}
"""The bootstrap's listeners, and the names that their ports are declared as, that of the first address first."""
_HERE = "127.0.0.1"
_BY_NAME = ("STRICT_DNS", "LOGICAL_DNS")


def the_edge_reads_a_bootstrap(manifests: Manifests) -> Iterator[str]:
    for workload, container in _edges(manifests):
        if not _bootstrap(manifests, workload, container):
            path = container.flag("config-path")
            yield f"{container} reads --config-path {path}, which is no file of a ConfigMap with a bootstrap"


def the_admin_interface_is_local(manifests: Manifests) -> Iterator[str]:
    """Any client of the admin interface can stop Envoy."""
    for workload, container in _edges(manifests):
        for address in _admins(manifests, workload, container):
            if not address.startswith(f"{_HERE}:"):
                yield f"{container} has its admin interface at {address}, should be at {_HERE}"


def the_edge_listens_on_declared_ports(manifests: Manifests) -> Iterator[str]:
    for workload, container in _edges(manifests):
        parts = _bootstrap(manifests, workload, container)
        listeners = [each for part in parts for each in list_at(part, "static_resources", "listeners")]
        found = {listed for each in listeners for listed in _listed(each)}
        # Only the pod itself reaches these, and who may forward ports to it.
        found = {each for each in found if f" {_HERE}:" not in each}
        declared = {f"{each.get('name')} 0.0.0.0:{each['containerPort']}" for each in container.ports}
        if parts and found != declared:
            listed = ", ".join(sorted(found))
            yield f"{container} declares {', '.join(sorted(declared))}, and its listeners are {listed}"


def the_edge_drains(manifests: Manifests) -> Iterator[str]:
    """Envoy drops requests in flight at SIGTERM; a script waits for them before that."""
    for workload, container in _edges(manifests):
        words = list_at(container.spec, "lifecycle", "preStop", "exec", "command")
        hook = re.fullmatch(r"bash (/\S+/drain\.sh) (\S+) [\d.]+ [\d.]+", " ".join(words))
        if not hook:
            yield f"{container} has no preStop hook that drains it: bash .../drain.sh ADMIN AWAY_S MOST_S"
            continue
        if _file(manifests, workload, container, hook[1]) is None:
            yield f"{container}: its preStop hook runs {hook[1]}, which is no file of a ConfigMap"
        for address in _admins(manifests, workload, container):
            if address != hook[2]:
                yield f"{container}: its preStop hook asks {hook[2]}, and its admin interface is at {address}"


def the_edge_finds_the_mesh(manifests: Manifests) -> Iterator[str]:
    for workload, container in _edges(manifests):
        for cluster in _clusters(manifests, workload, container):
            for address in _endpoints(cluster) if cluster.get("type") in _BY_NAME else ():
                host, _, port = address.rpartition(":")
                parts = split_host(manifests, host)
                if not parts or not port.isdecimal() or not serves(manifests, *parts, int(port)):
                    yield f"{container}: its cluster {cluster['name']} is at {address}, which no pod serves"


def gates_drain_until_the_edge_knows(manifests: Manifests) -> Iterator[str]:
    """Envoy ejects a draining gate after so many failed health checks."""
    clusters = [each for edge in _edges(manifests) for each in _clusters(manifests, *edge)]
    checks = [each for cluster in clusters if cluster["name"] == "gate" for each in list_at(cluster, "health_checks")]
    noticed_s = max((float(each["interval"].rstrip("s")) * each["unhealthy_threshold"] for each in checks), default=0)
    for workload, container in manifests.containers:
        if workload.component == "gate" and (drain_s := seconds(container, "gate", "drain")) <= noticed_s:
            yield f"{container} drains for {drain_s:g} s, and Envoy takes {noticed_s:g} s to notice"


def _listed(listener: Document) -> Iterator[str]:
    addresses = [listener["address"], *(each["address"] for each in list_at(listener, "additional_addresses"))]
    names = LISTENERS.get(listener["name"], ())
    for number, address in enumerate(addresses):
        yield f"{names[number] if number < len(names) else listener['name']} {_socket(address)}"


def _edges(manifests: Manifests) -> Iterator[tuple[Workload, Container]]:
    return ((workload, each) for workload, each in manifests.containers if workload.component == "envoy")


def _bootstrap(manifests: Manifests, workload: Workload, container: Container) -> list[Document]:
    """Envoy's file, and the variable that is merged into it; empty where there is no such file."""
    bootstrap = _read(_file(manifests, workload, container, container.flag("config-path") or "") or "")
    variable = re.fullmatch(r"\$\((\w+)\)", container.flag("config-yaml") or "")
    variables = [each for each in container.variables if variable and each["name"] == variable[1]]
    sources = [dict_at(each, "valueFrom", "configMapKeyRef") for each in variables]
    configs = [(manifests.find("ConfigMap", str(each.get("name"))), str(each.get("key"))) for each in sources]
    merged = [at(config, "data", key, default="") for config, key in configs]
    return [bootstrap, *(part for each in merged if (part := _read(each)))] if bootstrap else []


def _file(manifests: Manifests, workload: Workload, container: Container, path: str) -> str | None:
    """The text of a file that comes from a ConfigMap."""
    mount = mount_of(container, path)
    for volume in workload.volumes:
        if mount and volume["name"] == mount["name"] and "configMap" in volume:
            name = file_in(mount, path)
            items = at(volume, "configMap", "items", default=[{"key": name, "path": name}])
            key = next((each["key"] for each in items if each["path"] == name), "")
            text: str | None = at(manifests.find("ConfigMap", str(at(volume, "configMap", "name"))), "data", key)
            return text
    return None


@functools.cache
def _read(text: str) -> Document | None:
    # The text is long, and the same in all overlays.
    try:
        read = yaml.safe_load(text)
    except yaml.YAMLError:
        return None
    return read if isinstance(read, dict) else None


def _admins(manifests: Manifests, workload: Workload, container: Container) -> list[str]:
    """The addresses of the admin interface."""
    admins = [at(part, "admin", "address") for part in _bootstrap(manifests, workload, container) if "admin" in part]
    return [_socket(each) for each in admins]


def _clusters(manifests: Manifests, workload: Workload, container: Container) -> list[Document]:
    parts = _bootstrap(manifests, workload, container)
    return [each for part in parts for each in list_at(part, "static_resources", "clusters")]


def _endpoints(cluster: Document) -> Iterator[str]:
    for locality in list_at(cluster, "load_assignment", "endpoints"):
        for each in locality["lb_endpoints"]:
            yield _socket(at(each, "endpoint", "address"))


def _socket(address: Document | None) -> str:
    return f"{at(address, 'socket_address', 'address')}:{at(address, 'socket_address', 'port_value')}"


RULES = (
    the_edge_reads_a_bootstrap,
    the_admin_interface_is_local,
    the_edge_listens_on_declared_ports,
    the_edge_drains,
    the_edge_finds_the_mesh,
    gates_drain_until_the_edge_knows,
)
