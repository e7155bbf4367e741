"""``atserving doctor``: what of a mesh can be reached from here, is healthy, and of which version."""

from __future__ import annotations

import http.client
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import click

from atserving import __version__
from atserving.admin.v1 import admin_pb2
from atserving.cli import contexts
from atserving.cli.ops import printing
from atserving.cli.ops.client import UNAVAILABLE, CommandError, Servers, pages
from atserving.cli.ops.options import Read, reading
from atserving.cli.tables import styled

OK, WARNING, FAILED = "ok", "warning", "failed"
_COLORS = {OK: "green", WARNING: "yellow", FAILED: "red"}
_PATIENCE_S = 5.0
_SKEW_S = 2.0
_BEHIND = 100
_KINDS = admin_pb2.ListProblemsResponse


class Finding(NamedTuple):
    """One thing that was looked at."""

    state: str
    what: str
    said: str
    do: str = ""
    """The advice to the operator."""


@click.command(
    help="Look at the registries, the edge, the config and the instances, and say what is wrong and what to do. The "
    "exit status is 1 if something has failed."
)
@click.option(
    "--edge",
    cls=contexts.OfMesh,
    default=lambda: contexts.chosen().edge,
    show_default="the context's, or none",
    metavar="URL",
    help="The URL of an Envoy, to ask for its health.",
)
@reading
def doctor(read: Read, edge: str) -> None:
    found = [*_registries(read.servers.addresses), *_edge(edge)]
    try:
        found += [*_problems(read.servers), *_apps(read.servers), *_instances(read.servers)]
    except CommandError as error:
        found.append(Finding(FAILED, "config", str(error), "start a registry that this machine reaches"))
    if read.is_for_programs:
        read.print({"findings": [each._asdict() for each in found]})
    else:
        rows = [
            (styled(each.state, fg=_COLORS[each.state]), *map(printing.text, (each.what, each.said, each.do)))
            for each in found
        ]
        printing.rows(("STATE", "WHAT", "FOUND", "DO"), rows)
    if any(each.state == FAILED for each in found):
        sys.exit(1)


def _registries(addresses: Iterable[str]) -> Iterator[Finding]:
    statuses: dict[str, admin_pb2.Status] = {}
    for address in addresses:
        what = f"registry {address}"
        try:
            asked_s = time.time()
            status = Servers([address], _PATIENCE_S).read(lambda stub: stub.GetStatus, admin_pb2.GetStatusRequest())
        except CommandError as error:
            do = "is it running, and reachable?" if error.exit_status == UNAVAILABLE else "is it of an older version?"
            yield Finding(FAILED, what, str(error).partition(": ")[2] or str(error), do)
            continue
        statuses[address] = status
        if status.stale:
            do = "bring etcd back; callers notice nothing meanwhile"
            yield Finding(FAILED, what, f"version {status.software}, has lost etcd: {status.stale}", do)
        elif status.software != __version__:
            yield Finding(WARNING, what, f"version {status.software}, and this command has {__version__}", "update one")
        else:
            yield Finding(OK, what, f"version {status.software}, config of revision {status.revision}")
        skew_s = status.time.ToMilliseconds() / 1000 - (asked_s + time.time()) / 2
        if abs(skew_s) > _SKEW_S:
            yield Finding(WARNING, what, f"its clock is {skew_s:+.0f} s from this one", "set the clocks")
    revisions = [each.revision for each in statuses.values()]
    if revisions and max(revisions) - min(revisions) > _BEHIND:
        yield Finding(FAILED, "registries", f"their revisions differ: {revisions}", "restart the one that is behind")


def _edge(url: str) -> Iterator[Finding]:
    if not url:
        yield Finding(WARNING, "edge", "not looked at", "name one by --edge")
        return
    what = f"edge {url}"
    if not url.startswith(("http://", "https://")):
        yield Finding(FAILED, what, "no URL of HTTP", "name it as http://host:port")
        return
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=_PATIENCE_S) as response:  # noqa: S310
            yield Finding(OK, what, f"/health is {response.status}")
    except urllib.error.HTTPError as error:
        yield Finding(
            FAILED, what, f"/health is {error.code}", "no gate is ready, or it is short of memory: see its log"
        )
    except (OSError, ValueError, http.client.HTTPException) as error:
        yield Finding(FAILED, what, f"no answer: {getattr(error, 'reason', error)}", "is it running, and reachable?")


def _problems(servers: Servers) -> Iterator[Finding]:
    do = {
        _KINDS.KIND_MALFORMED: (FAILED, "correct or delete the key"),
        _KINDS.KIND_DELETION_HELD: (FAILED, "restore etcd, or run: atserving release accept-deletions"),
        _KINDS.KIND_UNKNOWN_FIELDS: (WARNING, "correct the field"),
        _KINDS.KIND_INEFFECTIVE: (WARNING, "correct or delete the key"),
        _KINDS.KIND_UNTRUSTED: (FAILED, "sign it: atserving release put --sign-key"),
    }
    found = servers.read(lambda stub: stub.ListProblems, admin_pb2.ListProblemsRequest(app="-")).problems
    for each in found:
        state, action = do.get(each.kind, (WARNING, ""))
        yield Finding(state, each.key, each.reason, action)
    if not found:
        yield Finding(OK, "config", "every value is right")


def _apps(servers: Servers) -> Iterator[Finding]:
    count = 0
    for app in _listed(servers, lambda stub: stub.ListApps, admin_pb2.ListAppsRequest(), "apps"):
        count += 1
        what = f"app {app.name}"
        idle = [each.version for each in app.shares if not each.capacity]
        if app.shares and not any(each.share for each in app.shares):
            said = "no version in production with a weight above 0 has a ready instance"
            yield Finding(FAILED, what, said, "start one, or roll back")
        elif idle:
            yield Finding(
                WARNING, what, f"in production without an instance: {', '.join(idle)}", "start one, or demote it"
            )
        elif app.releases and not app.shares:
            yield Finding(
                WARNING, what, "no version is in production", f"run: atserving release promote {app.name} ..."
            )
        if app.HasField("shadow") and not _ready(servers, app.name, app.shadow.version):
            said = f"its shadow {app.shadow.version} has no ready instance, so copies are dropped"
            yield Finding(WARNING, what, said, "start one, or end the shadow")
    yield Finding(OK, "apps", f"{count} looked at")


def _ready(servers: Servers, app: str, version: str) -> int:
    """Return how many instances of a version are ready. Raises CommandError."""
    try:
        request = admin_pb2.GetReleaseRequest(app=app, version=version)
        return servers.read(lambda stub: stub.GetRelease, request).instances
    except CommandError as error:
        if error.exit_status == UNAVAILABLE:
            raise
        return 0


def _instances(servers: Servers) -> Iterator[Finding]:
    count = 0
    request = admin_pb2.ListInstancesRequest(app="-", load=True)
    for each in _listed(servers, lambda stub: stub.ListInstances, request, "instances"):
        count += 1
        what = f"instance {each.app} {each.version} {each.id}"
        if each.unreachable:
            do = "is it alive? The registries may not reach instances where gates do"
            yield Finding(WARNING, what, f"{each.address}: {each.unreachable}", do)
        elif each.load.away:
            yield Finding(FAILED, what, "its worker does not serve", "see its log")
        elif each.outdated:
            yield Finding(WARNING, what, "has loaded other content than its release has", "start it again")
        elif each.load.software not in ("", __version__):
            yield Finding(WARNING, what, f"version {each.load.software}", f"update it to {__version__}")
    yield Finding(OK, "instances", f"{count} looked at")


def _listed(servers: Servers, method: Callable[..., Any], request: Any, field: str) -> Iterator[Any]:
    for page in pages(servers, method, request):
        yield from getattr(page, field)
