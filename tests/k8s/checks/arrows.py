"""What NetworkPolicies let pass between the pods of the mesh."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from .identity import NAME, PART_OF
from .model import COMPONENT, Document, Manifests, Workload, at, selects

FROM_OR_TO = {"ingress": "from", "egress": "to"}

# Stands for the evaluators where there are none yet, as policies are there before them; so do its ports.
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
    """Pods that reach others on a port, by its number; None where the others don't listen on it."""

    source: Workload
    target: Workload
    port: int | None
    protocol: str = "TCP"

    def __str__(self) -> str:
        return f"{self.source} reach {self.target} on {self.protocol} port {self.port}"


def pods_of(manifests: Manifests) -> list[Workload]:
    """The workloads, with one for the evaluators that are still to come."""
    there = any(each.component == "evaluator" for each in manifests.workloads)
    return manifests.workloads if there else [*manifests.workloads, _EVALUATOR]


def selected(manifests: Manifests, selector: Document) -> list[Workload]:
    """Those of ``pods_of`` that a LabelSelector selects."""
    return [each for each in pods_of(manifests) if selects(selector, each.labels)]


def is_inside(peer: Document) -> bool:
    """Whether a peer is of the policy's own namespace."""
    return "podSelector" in peer and "namespaceSelector" not in peer


def rules(manifests: Manifests) -> Iterator[tuple[Document, str, list[Workload], Document]]:
    """Each rule of each policy that counts: its policy, its direction, and the pods it is for."""
    for policy in manifests.of("NetworkPolicy"):
        pods = selected(manifests, at(policy, "spec", "podSelector", default={}))
        for direction in FROM_OR_TO:
            for rule in at(policy, "spec", direction, default=[]) if isolates(policy, direction) else ():
                yield policy, direction, pods, rule


def ports_of(rule: Document) -> list[tuple[int | str, str]]:
    """The ports that a rule names, by name or number, and their protocols."""
    return [(each["port"], each.get("protocol", "TCP")) for each in at(rule, "ports", default=[]) if "port" in each]


def peers_of(manifests: Manifests, rule: Document, direction: str) -> list[Workload]:
    """The pods inside the mesh that a rule names."""
    peers = [each for each in at(rule, FROM_OR_TO[direction], default=[]) if is_inside(each)]
    return [each for each in pods_of(manifests) if any(selects(peer["podSelector"], each.labels) for peer in peers)]


def arrows(manifests: Manifests) -> Iterator[tuple[Document, str, Arrow]]:
    """What the rules let pass between pods of the mesh, each with its policy and its direction."""
    for policy, direction, pods, rule in rules(manifests):
        for own, peer in product(pods, peers_of(manifests, rule, direction)):
            source, target = (peer, own) if direction == "ingress" else (own, peer)
            for port, protocol in ports_of(rule):
                number = target.number(port, protocol)
                if number is not None:
                    yield policy, direction, Arrow(source, target, number, protocol)


def lets_pass(manifests: Manifests, direction: str, arrow: Arrow) -> bool:
    """Whether the policies of one end let an arrow pass: one of them does, or none is for that end's pods."""
    end, other = (arrow.target, arrow.source) if direction == "ingress" else (arrow.source, arrow.target)
    isolated = False
    for policy in manifests.of("NetworkPolicy"):
        if not selects(at(policy, "spec", "podSelector", default={}), end.labels) or not isolates(policy, direction):
            continue
        isolated = True
        for rule in at(policy, "spec", direction, default=[]):
            peers = at(rule, FROM_OR_TO[direction], default=[])
            named = not peers or any(is_inside(each) and selects(each["podSelector"], other.labels) for each in peers)
            ports = ports_of(rule)
            if named and (not ports or any(_is_on(arrow, port, protocol) for port, protocol in ports)):
                return True
    return not isolated


def _is_on(arrow: Arrow, port: int | str, protocol: str) -> bool:
    return protocol == arrow.protocol and arrow.target.number(port, protocol) == arrow.port


def isolates(policy: Document, direction: str) -> bool:
    """Whether a policy is of a direction; as the server fills in where it has no policyTypes."""
    filled_in = ["Ingress", *(["Egress"] if at(policy, "spec", "egress") else [])]
    return direction.capitalize() in at(policy, "spec", "policyTypes", default=filled_in)
