"""Read the metrics of many processes at once."""

from __future__ import annotations

import http.client
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from atserving.cli.tables import printable
from atserving.errors import StartError

TIMEOUT_S = 2.0
_MOST_AT_ONCE = 32
_MOST_BYTES = 64 << 20
_READ_BYTES = 1 << 16
# Beyond it, numbers of this kind are not exact any more: no process has counted so far.
_MOST = 2**53
_MOST_CODE_CHARS = 9

# The lines that the tables are made of. A gate of a thousand apps has many others.
_WANTED = (
    "atserving_gate_requests_total",
    "atserving_gate_request_seconds_bucket",
    "atserving_gate_requests_in_flight",
    "atserving_gate_refusals_total",
    "atserving_gate_instances",
    "atserving_gate_config_followed",
    "atserving_evaluator_requests_total",
    "atserving_evaluator_stage_seconds_bucket",
    "atserving_evaluator_batch_size_",
    "atserving_evaluator_requests_in_flight",
    "atserving_evaluator_max_concurrent",
    "atserving_evaluator_queue_length",
    "atserving_evaluator_worker_restarts_total",
    "atserving_registry_instances",
    "atserving_registry_mirror_stale",
)
# Of the stages only all together.
_STAGES, _WHOLE = "_stage_seconds_", 'stage="total"'
_KINDS = {"atserving_gate_": "gate", "atserving_evaluator_": "evaluator", "atserving_registry_": "registry"}

# Targets are named by the user; a proxy of the environment is for other hosts.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Target(NamedTuple):
    """The address of a process's ``/metrics``, and its name for people."""

    address: str
    name: str


class Series(NamedTuple):
    """A name and labels."""

    name: str
    labels: tuple[tuple[str, str], ...]


@dataclass
class Scrape:
    """The answer of a process, or the reason why there is none."""

    target: Target
    kind: str = ""
    """gate, evaluator or registry; empty for others, and if it has not answered."""
    values: Mapping[Series, float] = field(default_factory=dict)
    failure: str = ""
    """The reason why it has not answered."""


def resolve(names: Iterable[str]) -> list[Target]:
    """Return a target for each address of each ``host:port``. Raises StartError for an unknown host."""
    targets: dict[str, Target] = {}
    for name in names:
        host, _, port = name.rpartition(":")
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "no host can have this name"
            raise StartError(f"the target {printable(name)} has no address: {reason}") from None
        for _, _, _, _, (address, *_) in found:
            shown = f"[{address}]:{port}" if ":" in str(address) else f"{address}:{port}"
            targets.setdefault(shown, Target(shown, shown))
    return list(targets.values())


def scrape_all(targets: Sequence[Target]) -> list[Scrape]:
    """Ask all targets, each for TIMEOUT_S at most."""
    with ThreadPoolExecutor(min(_MOST_AT_ONCE, max(len(targets), 1))) as pool:
        return list(pool.map(_scrape, targets))


def _scrape(target: Target) -> Scrape:
    try:
        with _opener.open(f"http://{target.address}/metrics", timeout=TIMEOUT_S) as response:
            text = _body(response).decode(errors="replace")
    # ValueError: no host can have this name, or address.
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Scrape(target, failure=_reason(error))
    wanted = "\n".join(filter(_is_wanted, text.split("\n")))
    try:
        values = {
            Series(sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(wanted + "\n")
            for sample in family.samples
            if _is_sound(sample)
        }
    # The parser raises both for text that is none of metrics.
    except (ValueError, IndexError):
        return Scrape(target, failure="it answers something else than metrics")
    kind = next((kind for prefix, kind in _KINDS.items() if f"\n{prefix}" in text), "")
    return Scrape(target, kind, values)


def _body(response: http.client.HTTPResponse) -> bytes:
    """Return the body. Raises TimeoutError if it comes too slowly, as a timeout of the socket is one of each read."""
    deadline_s = time.monotonic() + TIMEOUT_S
    parts = []
    left = _MOST_BYTES
    while left > 0 and (part := response.read1(_READ_BYTES)):
        parts.append(part)
        left -= len(part)
        if time.monotonic() > deadline_s:
            raise TimeoutError
    return b"".join(parts)


def _is_sound(sample: Sample) -> bool:
    """Return whether the value is a number, and the status and the bound, if there are any, are numbers, too."""
    code, bound = sample.labels.get("code", "0"), sample.labels.get("le", "0")
    try:
        return abs(sample.value) <= _MOST and code.isdecimal() and len(code) <= _MOST_CODE_CHARS and float(bound) >= 0
    except ValueError:
        return False


def _is_wanted(line: str) -> bool:
    return line.startswith(_WANTED) and (_STAGES not in line or _WHOLE in line)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"it answers {error.code}"
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return f"no answer within {TIMEOUT_S:g} s"
    return str(getattr(reason, "strerror", None) or reason)
