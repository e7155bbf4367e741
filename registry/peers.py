"""Decides by the certificates of peers what they may ask of a registry."""

from __future__ import annotations

from google.protobuf.message import Message

from atserving.errors import PermissionDenied
from atserving.rpc import Context
from atserving.tls import ENVOY, EVALUATOR, GATE, OPERATOR, Tls
from atserving.v1 import registry_pb2

_MOST_NAME_CHARS = 200


class Peers:
    """The rules of a registry with TLS."""

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self._operator = f"{tls.uri(OPERATOR)}/"

    def follow(self, method: str, request: Message, context: Context) -> str:
        """Let gates follow all and report, and evaluators follow and register their app. Raises PermissionDenied."""
        match request:
            case registry_pb2.WatchRequest(app=app):
                roles = [GATE, f"{EVALUATOR}/{app}"] if app else [GATE]
            case registry_pb2.RegisterInstanceRequest() | registry_pb2.DeregisterInstanceRequest():
                roles = [f"{EVALUATOR}/{request.instance.app}"]
            case _:
                roles = [GATE]
        if not any(self._tls.uri(role) in context.peer_names for role in roles):
            raise PermissionDenied(f"{_named(context)} may not call {method} here, only {' or '.join(roles)[:200]} may")
        return ""

    def operate(self, _method: str, _request: Message, context: Context) -> str:
        """Let Envoys and those with an operator's certificate operate, where nobody says who else may.

        Return the operator's name. Raises PermissionDenied.
        """
        for each in context.peer_names:
            if each.startswith(self._operator):
                name = each.removeprefix(self._operator)
                context.notes.update(operator=name, known_by="certificate")
                return name
        if self._tls.uri(ENVOY) not in context.peer_names:
            raise PermissionDenied(f"{_named(context)} may not operate, only {OPERATOR}/... and {ENVOY} may")
        return ""


def _named(context: Context) -> str:
    return ", ".join(context.peer_names)[:_MOST_NAME_CHARS] or "a peer without a name"
