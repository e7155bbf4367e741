"""What no schema says of the mesh's manifests: small rules, each of which reads them all and says what is wrong.

A rule is a function that yields messages, as an operator can act on:
``Deployment/gate: container 'gate' has no memory limit``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from . import (
    containers,
    edge,
    etcd,
    files,
    identity,
    listening,
    network,
    outside,
    probes,
    references,
    rollouts,
    scaling,
    security,
    server,
    services,
)
from .model import Document, Manifests

Rule = Callable[[Manifests], Iterator[str]]

RULES: tuple[Rule, ...] = (
    *identity.RULES,
    *server.RULES,
    *containers.RULES,
    *probes.RULES,
    *references.RULES,
    *files.RULES,
    *listening.RULES,
    *services.RULES,
    *network.RULES,
    *outside.RULES,
    *scaling.RULES,
    *rollouts.RULES,
    *edge.RULES,
    *etcd.RULES,
    *security.RULES,
)


def check(documents: list[Document]) -> list[str]:
    """What is wrong with the documents of one mesh, in the order of the rules; empty where nothing is."""
    manifests = Manifests(documents)
    return [message for rule in RULES for message in rule(manifests)]
