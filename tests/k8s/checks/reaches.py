"""What do NetworkPolicies let through inside the mesh? Its arrows, from both ends, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from .arrows import (
    FROM_OR_TO,
    Arrow,
    arrows,
    is_inside,
    isolates,
    lets_through,
    peers_of,
    ports_of,
    rules,
    selected,
)
from .model import COMPONENT, Document, Manifests, Workload, at, dict_at, list_at, title

ARROWS = {
    ("envoy", "gate", "grpc"),
    ("gate", "registry", "grpc"),
    ("gate", "evaluator", "grpc"),
    ("evaluator", "registry", "grpc"),
    ("registry", "etcd", "client"),
    ("etcd", "etcd", "peer"),
}
"""The caller, the called component and its port, as in docs/architecture.md."""
# `etcdctl` in one member's pod may ask the other members. The rest is the component `operators`.
ALLOWED = ARROWS | {("etcd", "etcd", "client"), ("envoy", "registry", "operators"), ("registry", "evaluator", "grpc")}


def selectors_find_pods(manifests: Manifests) -> Iterator[str]:
    for policy in manifests.of("NetworkPolicy"):
        if not selected(manifests, dict_at(policy, "spec", "podSelector")):
            yield f"{title(policy)}: selects no pods"
    for policy, direction, _, rule in rules(manifests):
        for peer in list_at(rule, FROM_OR_TO[direction]):
            if is_inside(peer) and not selected(manifests, peer["podSelector"]):
                yield f"{title(policy)}: a peer of its {direction} selects no pods: {_labels(peer['podSelector'])}"


def peers_name_their_namespace(manifests: Manifests) -> Iterator[str]:
    """An empty selector of namespaces lets every namespace in."""
    for policy, direction, _, rule in rules(manifests):
        for peer in list_at(rule, FROM_OR_TO[direction]):
            if not peer or ("namespaceSelector" in peer and not any(peer["namespaceSelector"].values())):
                yield f"{title(policy)}: a peer of its {direction} may be in any namespace"


def ports_are_named_one_by_one(manifests: Manifests) -> Iterator[str]:
    for policy, direction, _, rule in rules(manifests):
        peers = list_at(rule, FROM_OR_TO[direction])
        outside = direction == "egress" and peers and all("ipBlock" in each for each in peers)
        for port in at(rule, "ports") or [{}]:
            if "port" not in port:
                yield f"{title(policy)}: its {direction} lets every port through"
            elif "endPort" in port and not outside:
                yield f"{title(policy)}: its {direction} lets ports {port['port']} to {port['endPort']} through"


def ports_have_listeners(manifests: Manifests) -> Iterator[str]:
    for policy, direction, pods, rule in rules(manifests):
        ends = _listeners(manifests, direction, pods, rule)
        for port, protocol in ports_of(rule) if ends else ():
            if all(each.number(port, protocol) is None for each in ends):
                silent = f"where {', '.join(map(str, ends))} does not listen"
                yield f"{title(policy)}: its {direction} lets {protocol} port {port} through, {silent}"


def listeners_have_ports(manifests: Manifests) -> Iterator[str]:
    """A selector that is too wide selects pods that listen on none of the rule's ports."""
    for policy, direction, pods, rule in rules(manifests):
        ports = ports_of(rule)
        for end in _listeners(manifests, direction, pods, rule):
            if ports and all(end.number(port, protocol) is None for port, protocol in ports):
                yield f"{title(policy)}: its {direction} selects {end} too, which listens on none of its ports"


def both_ends_agree(manifests: Manifests) -> Iterator[str]:
    for policy, direction, arrow in arrows(manifests):
        other = "egress" if direction == "ingress" else "ingress"
        if not lets_through(manifests, other, arrow):
            end = arrow.target if other == "ingress" else arrow.source
            yield f"{title(policy)}: its {direction} lets {arrow}, and no {other} of {end} does"


def only_the_mesh_arrows_exist(manifests: Manifests) -> Iterator[str]:
    for policy, direction, arrow in arrows(manifests):
        ends = (arrow.source.component, arrow.target.component)
        if not any((*ends, port) in ALLOWED for port in _names(arrow)):
            yield f"{title(policy)}: its {direction} lets {arrow}, which is no arrow of the mesh"


def all_mesh_arrows_exist(manifests: Manifests) -> Iterator[str]:
    for source, target, port in sorted(ARROWS):
        ends = product(*(selected(manifests, {"matchLabels": {COMPONENT: each}}) for each in (source, target)))
        for arrow in (Arrow(a, b, b.number(port)) for a, b in ends):
            if not (lets_through(manifests, "egress", arrow) and lets_through(manifests, "ingress", arrow)):
                yield f"NetworkPolicies: none lets {arrow}"


def everything_else_is_denied(manifests: Manifests) -> Iterator[str]:
    for direction in FROM_OR_TO:
        of_all = [each for each in manifests.of("NetworkPolicy") if not at(each, "spec", "podSelector")]
        if not any(isolates(each, direction) and not at(each, "spec", direction) for each in of_all):
            yield f"NetworkPolicies: none denies all pods their {direction}"


def _listeners(manifests: Manifests, direction: str, pods: list[Workload], rule: Document) -> list[Workload]:
    """The end that a rule's ports belong to."""
    return pods if direction == "ingress" else peers_of(manifests, rule, direction)


def _names(arrow: Arrow) -> list[str | None]:
    """The names of the port that an arrow leads to."""
    ports = [port for container in arrow.target.containers for port in container.ports]
    return [port.get("name") for port in ports if port["containerPort"] == arrow.port]


def _labels(selector: Document) -> str:
    return ", ".join(f"{key}={value}" for key, value in dict_at(selector, "matchLabels").items())


RULES = (
    selectors_find_pods,
    peers_name_their_namespace,
    ports_are_named_one_by_one,
    ports_have_listeners,
    listeners_have_ports,
    both_ends_agree,
    only_the_mesh_arrows_exist,
    all_mesh_arrows_exist,
    everything_else_is_denied,
)
