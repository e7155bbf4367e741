"""The connections that NetworkPolicies let through between the pods of the mesh."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from .belongs import NAME, PART_OF
from .model import COMPONENT, Document, Manifests, Workload, at, dict_at, list_at, selects

FROM_OR_TO = {"ingress": "from", "egress": "to"}

# Stands for the evaluators before there are any: the policies for them are there first.
_EVALUATOR = Workload(
    {
        "kind": "Deployment",
        "metadata": {"name": "<app>-<version>"},
        "spec": {
            "template": {
                "metadata": {"labels": {COMPONENT: "evaluator", NAME: "evaluator", PART_OF: "atserving"}},
                "spec": {
                    "containers": [
                        {
                            "name": "evaluator",
                            "ports": [
                                {"name": "grpc", "containerPort": 50052},
                                {"name": "http", "containerPort": 9090},
                            ],
                        }
                    ]
                },
            }
        },
    }
)


@dataclass(frozen=True)
class Arrow:
    """Pods that reach other pods on a port, by its number. None where the others do not listen there."""

    source: Workload
    target: Workload
    port: int | None
    protocol: str = "TCP"

    def __str__(self) -> str:
        return f"{self.source} reach {self.target} on {self.protocol} port {self.port}"


def pods_of(manifests: Manifests) -> list[Workload]:
    """Return the workloads, with a stand-in for the evaluators where there are none yet."""
    if any(each.component == "evaluator" for each in manifests.workloads):
        return manifests.workloads
    return [*manifests.workloads, _EVALUATOR]


def selected(manifests: Manifests, selector: Document) -> list[Workload]:
    """Return those of ``pods_of`` that a LabelSelector selects."""
    return [each for each in pods_of(manifests) if selects(selector, each.labels)]


def is_inside(peer: Document) -> bool:
    """Whether a peer is in the policy's own namespace."""
    return "podSelector" in peer and "namespaceSelector" not in peer


def rules(manifests: Manifests) -> Iterator[tuple[Document, str, list[Workload], Document]]:
    """Yield each rule of each policy that has an effect: the policy, the direction, its pods, the rule."""
    for policy in manifests.of("NetworkPolicy"):
        pods = selected(manifests, dict_at(policy, "spec", "podSelector"))
        for direction in FROM_OR_TO:
            for rule in list_at(policy, "spec", direction) if isolates(policy, direction) else ():
                yield policy, direction, pods, rule


def ports_of(rule: Document) -> list[tuple[int | str, str]]:
    """Return the ports of a rule, by name or number, and their protocols."""
    return [(each["port"], each.get("protocol", "TCP")) for each in list_at(rule, "ports") if "port" in each]


def peers_of(manifests: Manifests, rule: Document, direction: str) -> list[Workload]:
    """Return the pods inside the mesh that a rule names as peers."""
    peers = [each for each in list_at(rule, FROM_OR_TO[direction]) if is_inside(each)]
    return [each for each in pods_of(manifests) if any(selects(peer["podSelector"], each.labels) for peer in peers)]


def arrows(manifests: Manifests) -> Iterator[tuple[Document, str, Arrow]]:
    """Yield the arrows that rules let through inside the mesh, each with its policy and direction."""
    for policy, direction, pods, rule in rules(manifests):
        for own, peer in product(pods, peers_of(manifests, rule, direction)):
            source, target = (peer, own) if direction == "ingress" else (own, peer)
            for port, protocol in ports_of(rule):
                number = target.number(port, protocol)
                if number is not None:
                    yield policy, direction, Arrow(source, target, number, protocol)


def lets_through(manifests: Manifests, direction: str, arrow: Arrow) -> bool:
    """Whether the policies of one end let an arrow through: one of them does, or none isolates that end."""
    end, other = (arrow.target, arrow.source) if direction == "ingress" else (arrow.source, arrow.target)
    isolated = False
    for policy in manifests.of("NetworkPolicy"):
        if not selects(dict_at(policy, "spec", "podSelector"), end.labels) or not isolates(policy, direction):
            continue
        isolated = True
        for rule in list_at(policy, "spec", direction):
            peers = list_at(rule, FROM_OR_TO[direction])
            named = not peers or any(is_inside(each) and selects(each["podSelector"], other.labels) for each in peers)
            ports = ports_of(rule)
            if named and (not ports or any(_is_on(arrow, port, protocol) for port, protocol in ports)):
                return True
    return not isolated


def isolates(policy: Document, direction: str) -> bool:
    """Whether a policy isolates its pods in a direction. The API server defaults ``policyTypes`` like this."""
    default = ["Ingress", *(["Egress"] if at(policy, "spec", "egress") else [])]
    return direction.capitalize() in at(policy, "spec", "policyTypes", default=default)


def _is_on(arrow: Arrow, port: int | str, protocol: str) -> bool:
    return protocol == arrow.protocol and arrow.target.number(port, protocol) == arrow.port
