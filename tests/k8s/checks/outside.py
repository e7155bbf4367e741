"""What do NetworkPolicies let through across the mesh's border? Callers, names, metrics, and evaluators' downloads."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, collapse_addresses, ip_network
from itertools import product

from atserving.hosts import Address, Network
from evaluator.fetching.addresses import _REFUSED, AddressPolicy

from .arrows import FROM_OR_TO, is_inside, pods_of, ports_of, rules
from .listens import COLLECTOR_PORTS
from .model import Document, Manifests, Workload, at, list_at, title

DNS_PORT = 53
DNS_PEER = {
    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
    "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
}
"""The pods that answer DNS, as every distribution of Kubernetes labels them."""
METRICS = {"envoy": "ops", "etcd": "metrics", "gate": "http", "registry": "http", "evaluator": "http"}
"""The ports that a Prometheus in another namespace reads."""
# Evaluators download resources on these ports.
_WEB = (80, 443)

# The special-purpose networks of IANA's registries for IPv4 and IPv6, multicast, and the evaluator's own list. Packets
# to IPv4-mapped addresses are IPv4 packets, so those networks are left out.
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
    """Policies open each port that a Service leads callers to."""
    for workload in (each for each in manifests.workloads if each.component == "envoy"):
        opened = {
            workload.number(*port)
            for _, direction, pods, rule in rules(manifests)
            for port in ports_of(rule)
            if direction == "ingress" and workload in pods and not rule.get("from")
        }
        services = [each for each in manifests.of("Service") if workload in manifests.behind(each)]
        if not services:
            yield f"{workload}: no Service leads callers to it"
        for service in services:
            for port in list_at(service, "spec", "ports"):
                target = port.get("targetPort", port["port"])
                if workload.number(target) not in {None, *opened}:
                    yield f"NetworkPolicies: none lets callers of {title(service)} reach {workload} on port {target}"


def pods_can_ask_dns(manifests: Manifests) -> Iterator[str]:
    asking = [
        each
        for _, direction, pods, rule in rules(manifests)
        for each in pods
        if direction == "egress"
        and DNS_PEER in list_at(rule, "to")
        and {(DNS_PORT, "UDP"), (DNS_PORT, "TCP")} <= set(ports_of(rule))
    ]
    for pods in pods_of(manifests):
        if pods not in asking:
            yield f"NetworkPolicies: none lets {pods} ask kube-dns, on port {DNS_PORT} (UDP and TCP)"


def other_namespaces_give_dns_and_take_spans_only(manifests: Manifests) -> Iterator[str]:
    for policy, direction, _, rule in rules(manifests):
        for peer in list_at(rule, "to") if direction == "egress" else ():
            dns = peer == DNS_PEER and all(port == DNS_PORT for port, _ in ports_of(rule))
            spans = "podSelector" not in peer and all(port in COLLECTOR_PORTS for port, _ in ports_of(rule))
            if "namespaceSelector" in peer and not (dns or spans):
                yield f"{title(policy)}: its egress leads to another namespace, for more than DNS and spans"


def only_the_edge_is_public(manifests: Manifests) -> Iterator[str]:
    """Anybody reaches Envoy's public ports and nothing else; no pod reaches everything."""
    for policy, direction, pods, rule in rules(manifests):
        if at(rule, FROM_OR_TO[direction]):
            continue
        for port, protocol in ports_of(rule):
            if direction == "egress" or not all(_is_edge(each, port, protocol) for each in pods):
                which = "from" if direction == "ingress" else "to"
                yield f"{title(policy)}: its {direction} lets {protocol} port {port} through {which} anywhere"


def blocks_are_public(manifests: Manifests) -> Iterator[str]:
    """Pods, nodes and a cloud's metadata service have addresses too, which a block may contain."""
    for policy, direction, _, rule in rules(manifests):
        for block in (each["ipBlock"] for each in list_at(rule, FROM_OR_TO[direction]) if "ipBlock" in each):
            whole, left_out = ip_network(block["cidr"]), _left_out(block)
            for network in refused():
                if whole.version == network.version and whole.overlaps(network) and not _covered(network, left_out):
                    yield f"{title(policy)}: its {direction} lets {network} through, which is not public, in {whole}"


def evaluators_reach_public_addresses(manifests: Manifests) -> Iterator[str]:
    evaluators = [each for each in pods_of(manifests) if each.component == "evaluator"]
    for workload, port in product(evaluators, _WEB):
        blocks = [
            (peer["ipBlock"]["cidr"], *list_at(peer["ipBlock"], "except"))
            for _, direction, pods, rule in rules(manifests)
            if direction == "egress"
            and workload in pods
            and any(_has(each, port) for each in at(rule, "ports", default=[{}]))
            for peer in list_at(rule, "to")
            if "ipBlock" in peer
        ]
        public = _not_reached(tuple(blocks))
        if public:
            yield f"NetworkPolicies: none lets {workload} reach public addresses such as {public} on port {port}"


def only_evaluators_reach_public_addresses(manifests: Manifests) -> Iterator[str]:
    for policy, direction, pods, rule in rules(manifests):
        if direction == "egress" and any("ipBlock" in each for each in list_at(rule, "to")):
            for each in pods:
                if each.component != "evaluator":
                    yield f"{title(policy)}: its egress lets {each} leave the mesh"


def outsiders_read_metrics_only(manifests: Manifests) -> Iterator[str]:
    """Releases are not published from outside either: ``kubectl port-forward`` goes through the node."""
    for policy, direction, pods, rule in rules(manifests):
        if direction == "egress" or all(is_inside(each) for each in list_at(rule, "from")):
            continue
        for (port, protocol), each in product(ports_of(rule), pods):
            metrics = each.number(METRICS.get(each.component or "", ""))
            if each.number(port, protocol) not in (None, metrics) and not _is_edge(each, port, protocol):
                yield f"{title(policy)}: its ingress lets outsiders reach {each} on {protocol} port {port}"


@cache
def refused() -> tuple[Network, ...]:
    """Return the special-purpose networks that an evaluator refuses to download from."""
    policy = AddressPolicy()
    return tuple(each for each in dict.fromkeys(_SPECIAL) if not policy.allows(str(each[0]), 443))


@cache
def _public() -> tuple[Address, ...]:
    """Addresses from all over both address spaces that an evaluator may download from."""
    spread: list[Address] = [IPv4Address((first << 24) + 1) for first in range(256)]
    spread += [IPv6Address((first << 112) + 1) for first in range(0x2000, 0x4000, 0x100)]
    policy = AddressPolicy()
    return tuple(each for each in spread if policy.allows(str(each), 443))


@cache
def _not_reached(blocks: tuple[tuple[str, ...], ...]) -> Address | None:
    """Return a public address that is in none of these blocks, each of which leaves out all networks but its first."""
    networks = [[ip_network(each) for each in block] for block in blocks]
    for public in _public():
        if not any(public in whole and not any(public in each for each in out) for whole, *out in networks):
            return public
    return None


def _left_out(block: Document) -> list[Network]:
    networks = [ip_network(each) for each in list_at(block, "except")]
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
    pods_can_ask_dns,
    other_namespaces_give_dns_and_take_spans_only,
    only_the_edge_is_public,
    blocks_are_public,
    evaluators_reach_public_addresses,
    only_evaluators_reach_public_addresses,
    outsiders_read_metrics_only,
)
