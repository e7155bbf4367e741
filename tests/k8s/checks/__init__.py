"""Rules of the mesh that no schema knows. Each rule reads all manifests of one mesh and yields what is wrong.

A file answers one question about the manifests:

- ``belongs``: which mesh, component and namespace does each part belong to?
- ``confined``: is every pod confined as the restricted Pod Security Standard demands?
- ``finds``: does every pod find the files, variables and accounts that it names?
- ``listens``: does every process listen where others look for it?
- ``reaches``, ``outside``: what do NetworkPolicies let through, inside the mesh and across its border?
- ``drains``: do probes, hooks and grace periods let pods be replaced without losing requests?
- ``scales``: how many pods run, and how many survive a node drain?
- ``edge``: does Envoy's bootstrap fit the pod and the mesh?
- ``secured``: is every connection between pods TLS, or none, and does each end know itself and the other?
- ``certified``: does cert-manager make each Secret of TLS, with the names of the role whose it is?
- ``monitored``: does Prometheus find the metrics of every pod?

A message says what an operator can change: ``Deployment/gate: container 'gate' has no memory limit``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from . import belongs, certified, confined, drains, edge, finds, listens, monitored, outside, reaches, scales, secured
from .model import Document, Manifests

Rule = Callable[[Manifests], Iterator[str]]

RULES: tuple[Rule, ...] = (
    *belongs.RULES,
    *confined.RULES,
    *finds.RULES,
    *listens.RULES,
    *reaches.RULES,
    *outside.RULES,
    *drains.RULES,
    *scales.RULES,
    *edge.RULES,
    *secured.RULES,
    *certified.RULES,
    *monitored.RULES,
)


def check(documents: list[Document]) -> list[str]:
    """Return what is wrong with the documents of one mesh, in the order of the rules."""
    manifests = Manifests(documents)
    return [message for rule in RULES for message in rule(manifests)]
