"""Complete the names of apps, versions and aliases in a shell. Without an answer within a second there are none."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import click

from atserving.admin.v1 import admin_pb2
from atserving.cli.ops.client import CommandError, Servers
from atserving.cli.ops.options import DEFAULT_SERVER

_PATIENCE_S = 1.0
_MOST = 1000


def _completing(find: Callable[[Servers, str], Iterable[str]]) -> Callable[..., list[str]]:
    def complete(context: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
        addresses = context.params.get("server") or [DEFAULT_SERVER]
        try:
            # All of them within the time that somebody waits for a completion.
            with context.scope():
                servers = Servers(addresses, _PATIENCE_S / len(addresses))
            names = find(servers, context.params.get("app") or "")
            return sorted(name for name in names if name.startswith(incomplete))
        except CommandError:
            return []

    return complete


def _apps(servers: Servers, _: str) -> Iterable[str]:
    found = servers.read(lambda stub: stub.ListApps, admin_pb2.ListAppsRequest(page_size=_MOST))
    return [each.name for each in found.apps]


def _versions(servers: Servers, app: str) -> Iterable[str]:
    request = admin_pb2.ListReleasesRequest(app=app, page_size=_MOST)
    found = servers.read(lambda stub: stub.ListReleases, request)
    return [name for each in found.releases for name in (each.version, *each.aliases)]


def _weights(servers: Servers, app: str) -> Iterable[str]:
    return [f"{name}=" for name in _versions(servers, app)]


def _aliases(servers: Servers, app: str) -> Iterable[str]:
    found = servers.read(lambda stub: stub.GetApp, admin_pb2.GetAppRequest(app=app))
    return [f"{name}{end}" for name in found.aliases for end in "=-"]


apps = _completing(_apps)
weights = _completing(_weights)
aliases = _completing(_aliases)


def argument(name: str, complete: Callable[..., list[str]] | None = None, **attributes: Any) -> Callable[[Any], Any]:
    """Return an argument with completion."""
    return click.argument(name, shell_complete=complete, **attributes)


def app(**attributes: Any) -> Callable[[Any], Any]:
    """Return the argument ``app``."""
    return argument("app", apps, **attributes)


def version(**attributes: Any) -> Callable[[Any], Any]:
    """Return the argument ``version``."""
    return argument("version", _completing(_versions), **attributes)
