"""Rules of NetworkPolicies inside of the mesh: they let pass its arrows, from both ends, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from .arrows import (
    FROM_OR_TO,
    Arrow,
    arrows,
    is_inside,
    isolates,
    lets_pass,
    peers_of,
    ports_of,
    rules,
    selected,
)
from .model import COMPONENT, Document, Manifests, Workload, at, title

# Who calls whom, and on which of its ports: docs/architecture.md.
ARROWS = {
    ("envoy", "gate", "grpc"),
    ("gate", "registry", "grpc"),
    ("gate", "evaluator", "grpc"),
    ("evaluator", "registry", "grpc"),
    ("registry", "etcd", "client"),
    ("etcd", "etcd", "peer"),
}
# A member of etcd may ask the others what etcdctl asks it in its pod.
ALLOWED = ARROWS | {("etcd", "etcd", "client")}


def policies_select_pods(manifests: Manifests) -> Iterator[str]:
    for policy in manifests.of("NetworkPolicy"):
        if not selected(manifests, at(policy, "spec", "podSelector", default={})):
            yield f"{title(policy)}: selects no pods"


def peers_select_pods(manifests: Manifests) -> Iterator[str]:
    for policy, direction, _, rule in rules(manifests):
        for peer in at(rule, FROM_OR_TO[direction], default=[]):
            if is_inside(peer) and not selected(manifests, peer["podSelector"]):
                yield f"{title(policy)}: a peer of its {direction} selects no pods: {_labels(peer['podSelector'])}"


def policy_ports_are_named(manifests: Manifests) -> Iterator[str]:
    for policy, direction, _, rule in rules(manifests):
        peers = at(rule, FROM_OR_TO[direction], default=[])
        outside = direction == "egress" and peers and all("ipBlock" in each for each in peers)
        for port in at(rule, "ports") or [{}]:
            if "port" not in port:
                yield f"{title(policy)}: its {direction} lets every port pass"
            elif "endPort" in port and not outside:
                yield f"{title(policy)}: its {direction} lets ports {port['port']} to {port['endPort']} pass"


def peers_are_told_apart(manifests: Manifests) -> Iterator[str]:
    for policy, direction, _, rule in rules(manifests):
        for peer in at(rule, FROM_OR_TO[direction], default=[]):
            if not peer or ("namespaceSelector" in peer and not any(peer["namespaceSelector"].values())):
                yield f"{title(policy)}: a peer of its {direction} may be in any namespace"


def ingress_ports_are_listened_on(manifests: Manifests) -> Iterator[str]:
    for policy, direction, pods, rule in rules(manifests):
        for port, protocol in ports_of(rule) if direction == "ingress" else ():
            if pods and all(each.number(port, protocol) is None for each in pods):
                yield f"{title(policy)}: its ingress lets {protocol} port {port} pass, which {_all(pods)} has not"


def egress_ports_are_listened_on(manifests: Manifests) -> Iterator[str]:
    for policy, direction, _, rule in rules(manifests):
        peers = peers_of(manifests, rule, direction) if direction == "egress" else []
        for port, protocol in ports_of(rule) if peers else ():
            if all(each.number(port, protocol) is None for each in peers):
                yield f"{title(policy)}: its egress lets {protocol} port {port} pass, which {_all(peers)} has not"


def ends_listen(manifests: Manifests) -> Iterator[str]:
    """Who is named at the end of an arrow listens on one of its ports: a selector that is too wide names others."""
    for policy, direction, pods, rule in rules(manifests):
        for end in pods if direction == "ingress" else peers_of(manifests, rule, direction):
            ports = ports_of(rule)
            if ports and all(end.number(port, protocol) is None for port, protocol in ports):
                yield f"{title(policy)}: its {direction} is for {end} too, which listens on none of its ports"


def both_ends_agree(manifests: Manifests) -> Iterator[str]:
    for policy, direction, arrow in arrows(manifests):
        other = "egress" if direction == "ingress" else "ingress"
        if not lets_pass(manifests, other, arrow):
            yield f"{title(policy)}: its {direction} lets {arrow}, and no {other} of {_end(arrow, other)} does"


def nothing_but_the_mesh(manifests: Manifests) -> Iterator[str]:
    for policy, direction, arrow in arrows(manifests):
        ends = (arrow.source.component, arrow.target.component)
        if not any((*ends, port) in ALLOWED for port in _names(arrow)):
            yield f"{title(policy)}: its {direction} lets {arrow}, which is no arrow of the mesh"


def the_mesh_can_talk(manifests: Manifests) -> Iterator[str]:
    for source, target, port in sorted(ARROWS):
        ends = product(*(selected(manifests, {"matchLabels": {COMPONENT: each}}) for each in (source, target)))
        for arrow in (Arrow(a, b, b.number(port)) for a, b in ends):
            if not (lets_pass(manifests, "egress", arrow) and lets_pass(manifests, "ingress", arrow)):
                yield f"NetworkPolicies: none lets {arrow}"


def everything_is_denied_first(manifests: Manifests) -> Iterator[str]:
    for direction in FROM_OR_TO:
        everybody = [each for each in manifests.of("NetworkPolicy") if not at(each, "spec", "podSelector")]
        if not any(isolates(each, direction) and not at(each, "spec", direction) for each in everybody):
            yield f"NetworkPolicies: none denies all pods their {direction}"


def _names(arrow: Arrow) -> list[str | None]:
    """The names of the port that an arrow leads to."""
    ports = [port for container in arrow.target.lasting for port in container.ports]
    return [port.get("name") for port in ports if port["containerPort"] == arrow.port]


def _end(arrow: Arrow, direction: str) -> Workload:
    return arrow.target if direction == "ingress" else arrow.source


def _all(pods: list[Workload]) -> str:
    return ", ".join(str(each) for each in pods)


def _labels(selector: Document) -> str:
    return ", ".join(f"{key}={value}" for key, value in at(selector, "matchLabels", default={}).items())


RULES = (
    policies_select_pods,
    peers_select_pods,
    peers_are_told_apart,
    policy_ports_are_named,
    ingress_ports_are_listened_on,
    egress_ports_are_listened_on,
    ends_listen,
    both_ends_agree,
    nothing_but_the_mesh,
    the_mesh_can_talk,
    everything_is_denied_first,
)
