"""The operators that are kept in etcd, below ``/ava/serving/operators/``. Only registries read them."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec
import structlog

from atserving.config import OPERATORS, MalformedConfig, check_cost
from atserving.operators import Key, Operator
from atserving.v1 import etcd_pb2

log = structlog.get_logger()


class Roster:
    """The operators of etcd, as the mirror has them.

    An entry that is malformed knows nobody, whatever it was before. Deletions count at once: none is held back.
    """

    def __init__(self) -> None:
        self.operators: dict[str, Operator] = {}
        self.revisions: dict[str, int] = {}
        """The revisions that wrote them, by name."""
        self.malformed: dict[str, str] = {}
        """Keys whose value is malformed, and the reason."""
        self._by_key: dict[Key, Operator] = {}

    def find(self, key: Key) -> Operator | None:
        """Return the operator whom a proof names."""
        return self._by_key.get(key)

    def replace(self, kvs: Iterable[etcd_pb2.KeyValue]) -> None:
        """Take a snapshot."""
        self.operators, self.revisions, known, self.malformed = {}, {}, self.malformed, {}
        for kv in kvs:
            self._put(kv, known)
        self._index()

    def apply(self, events: Iterable[etcd_pb2.Event]) -> None:
        """Take events."""
        for event in events:
            key = text_of(event.kv.key)
            name = key.removeprefix(OPERATORS)
            known = {key: self.malformed.pop(key, "")}
            self.operators.pop(name, None)
            self.revisions.pop(name, None)
            if event.type == etcd_pb2.Event.PUT:
                self._put(event.kv, known)
        self._index()

    def _put(self, kv: etcd_pb2.KeyValue, known: dict[str, str]) -> None:
        key = text_of(kv.key)
        try:
            operator = read(key, kv.value)
        except MalformedConfig as error:
            self.malformed[key] = f"{error}; it knows nobody until you correct or delete it"
            if known.get(key) != self.malformed[key]:
                log.warning("config skipped", key=key, reason=str(error), last_good_kept=False)
            return
        self.operators[operator.name] = operator
        self.revisions[operator.name] = kv.mod_revision

    def _index(self) -> None:
        self._by_key = {each.key: each for _, each in sorted(self.operators.items(), reverse=True)}


def read(key: str, value: bytes) -> Operator:
    """Return the operator of a key. Raises MalformedConfig."""
    check_cost(value)
    try:
        operator = msgspec.json.decode(value, type=Operator)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedConfig(str(error)) from None
    if key != OPERATORS + operator.name:
        raise MalformedConfig("name: is not that of the key")
    return operator


def without_secrets(key: str, value: bytes | None) -> tuple[str | None, bool]:
    """Return a value for the history, without the digest of a token; and whether it is malformed, so left out."""
    if value is None:
        return None, False
    try:
        return msgspec.json.encode(read(key, value).shown()).decode(), False
    except MalformedConfig:
        # It may hold anything.
        return None, True


def text_of(key: bytes) -> str:
    return key.decode(errors="backslashreplace")
