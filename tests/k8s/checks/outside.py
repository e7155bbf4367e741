"""Rules of what NetworkPolicies let pass between the mesh and the outside: callers, names, what evaluators fetch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, collapse_addresses, ip_network
from itertools import product

from evaluator.fetching.addresses import _REFUSED, Address, AddressPolicy, Network

from .arrows import FROM_OR_TO, is_inside, pods_of, ports_of, rules
from .model import Document, Manifests, Workload, at, title
from .services import behind

DNS_PORT = 53
# The pods that answer for names, as every distribution of Kubernetes labels them.
DNS_PEER = {
    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
    "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
}
# Where metrics are, which a Prometheus in another namespace reads.
METRICS = {"envoy": "ops", "etcd": "metrics", "evaluator": "http"}
# What resources are fetched on.
_WEB = (80, 443)

# The networks of special purpose, by IANA's registries of IPv4 and IPv6, with multicast, and those that the evaluator
# names itself. IPv4-mapped addresses are left out: packets to them are IPv4's.
_SPECIAL: tuple[Network, ...] = (
    *(
        IPv4Network(each)
        for each in (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
            *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
            *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        )
    ),
    *(
        IPv6Network(each)
        for each in (
            *("::/128", "::1/128", "64:ff9b::/96", "100::/64", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
            *("5f00::/16", "fc00::/7", "fe80::/10", "ff00::/8"),
        )
    ),
    *_REFUSED,
)


def callers_reach_the_edge(manifests: Manifests) -> Iterator[str]:
    """Each port that a Service leads callers to."""
    for workload in (each for each in manifests.workloads if each.component == "envoy"):
        opened = {
            workload.number(*port)
            for _, direction, pods, rule in rules(manifests)
            for port in ports_of(rule)
            if direction == "ingress" and workload in pods and not rule.get("from")
        }
        services = [each for each in manifests.of("Service") if workload in behind(manifests, each)]
        if not services:
            yield f"{workload}: no Service leads callers to it"
        for service in services:
            for port in at(service, "spec", "ports", default=[]):
                target = port.get("targetPort", port["port"])
                if workload.number(target) not in {None, *opened}:
                    yield f"NetworkPolicies: none lets callers of {title(service)} reach {workload} on port {target}"


def names_can_be_asked_for(manifests: Manifests) -> Iterator[str]:
    asking = [
        each
        for _, direction, pods, rule in rules(manifests)
        for each in pods
        if direction == "egress"
        and DNS_PEER in at(rule, "to", default=[])
        and {(DNS_PORT, "UDP"), (DNS_PORT, "TCP")} <= set(ports_of(rule))
    ]
    for pods in pods_of(manifests):
        if pods not in asking:
            yield f"NetworkPolicies: none lets {pods} ask kube-dns for names, on port {DNS_PORT} (UDP and TCP)"


def other_namespaces_are_asked_for_names(manifests: Manifests) -> Iterator[str]:
    for policy, direction, _, rule in rules(manifests):
        for peer in at(rule, "to", default=[]) if direction == "egress" else ():
            names = peer == DNS_PEER and all(port == DNS_PORT for port, _ in ports_of(rule))
            if "namespaceSelector" in peer and not names:
                yield f"{title(policy)}: its egress leads to another namespace, and not to kube-dns for names alone"


def only_the_edge_is_open(manifests: Manifests) -> Iterator[str]:
    """From anywhere, only Envoy's public ports are reached; to anywhere, nothing goes."""
    for policy, direction, pods, rule in rules(manifests):
        if at(rule, FROM_OR_TO[direction]):
            continue
        for port, protocol in ports_of(rule):
            if direction == "egress" or not all(_is_edge(each, port, protocol) for each in pods):
                whence = "from" if direction == "ingress" else "to"
                yield f"{title(policy)}: its {direction} lets {protocol} port {port} pass {whence} anywhere"


def blocks_are_public(manifests: Manifests) -> Iterator[str]:
    """Pods, nodes and the metadata of clouds have addresses too, which a block lets pass like any other."""
    for policy, direction, _, rule in rules(manifests):
        for block in (each["ipBlock"] for each in at(rule, FROM_OR_TO[direction], default=[]) if "ipBlock" in each):
            whole, left_out = ip_network(block["cidr"]), _left_out(block)
            for network in refused():
                if whole.version == network.version and whole.overlaps(network) and not _covered(network, left_out):
                    yield f"{title(policy)}: its {direction} lets {network} pass, which is not public, in {whole}"


def evaluators_reach_what_is_public(manifests: Manifests) -> Iterator[str]:
    evaluators = [each for each in pods_of(manifests) if each.component == "evaluator"]
    for workload, port in product(evaluators, _WEB):
        blocks = [
            (ip_network(peer["ipBlock"]["cidr"]), _left_out(peer["ipBlock"]))
            for _, direction, pods, rule in rules(manifests)
            if direction == "egress"
            and workload in pods
            and any(_has(each, port) for each in at(rule, "ports", default=[{}]))
            for peer in at(rule, "to", default=[])
            if "ipBlock" in peer
        ]
        for public in _public():
            if not any(public in whole and not any(public in each for each in out) for whole, out in blocks):
                yield f"NetworkPolicies: none lets {workload} reach public addresses such as {public} on port {port}"
                break


def only_evaluators_go_out(manifests: Manifests) -> Iterator[str]:
    for policy, direction, pods, rule in rules(manifests):
        if direction == "egress" and any("ipBlock" in each for each in at(rule, "to", default=[])):
            for each in pods:
                if each.component != "evaluator":
                    yield f"{title(policy)}: its egress lets {each} reach what is outside of the mesh"


def outsiders_read_metrics_alone(manifests: Manifests) -> Iterator[str]:
    """Nobody publishes a release from there either: that goes through the node, by ``kubectl port-forward``."""
    for policy, direction, pods, rule in rules(manifests):
        if direction == "egress" or all(is_inside(each) for each in at(rule, "from", default=[])):
            continue
        for (port, protocol), each in product(ports_of(rule), pods):
            metrics = each.number(METRICS.get(each.component or "", ""))
            if each.number(port, protocol) not in (None, metrics) and not _is_edge(each, port, protocol):
                yield f"{title(policy)}: its ingress lets others than the mesh reach {each} on {protocol} port {port}"


@cache
def refused() -> tuple[Network, ...]:
    """The networks of special purpose that an evaluator refuses to fetch from."""
    policy = AddressPolicy()
    return tuple(each for each in dict.fromkeys(_SPECIAL) if not policy.allows(str(each[0])))


@cache
def _public() -> tuple[Address, ...]:
    """Addresses all over both spaces, of those that an evaluator fetches from."""
    spread: list[Address] = [IPv4Address((first << 24) + 1) for first in range(256)]
    spread += [IPv6Address((first << 112) + 1) for first in range(0x2000, 0x4000, 0x100)]
    policy = AddressPolicy()
    return tuple(each for each in spread if policy.allows(str(each)))


def _left_out(block: Document) -> list[Network]:
    networks = [ip_network(each) for each in at(block, "except", default=[])]
    return [
        *collapse_addresses(each for each in networks if isinstance(each, IPv4Network)),
        *collapse_addresses(each for each in networks if isinstance(each, IPv6Network)),
    ]


def _covered(network: Network, by: list[Network]) -> bool:
    return any(network.version == each.version and network.subnet_of(each) for each in by)  # type: ignore[arg-type]


def _has(ports: Document, number: int) -> bool:
    first = ports.get("port")
    tcp = ports.get("protocol", "TCP") == "TCP"
    return tcp and (first is None or (isinstance(first, int) and first <= number <= ports.get("endPort", first)))


def _is_edge(pods: Workload, port: int | str, protocol: str) -> bool:
    public = {pods.number("http"), pods.number("https")} - {None}
    return pods.component == "envoy" and pods.number(port, protocol) in public


RULES = (
    callers_reach_the_edge,
    names_can_be_asked_for,
    other_namespaces_are_asked_for_names,
    only_the_edge_is_open,
    blocks_are_public,
    evaluators_reach_what_is_public,
    only_evaluators_go_out,
    outsiders_read_metrics_alone,
)
