"""Wait until a version has ready instances."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click

from atserving.admin.v1 import admin_pb2
from atserving.cli.ops.client import NOT_FOUND, UNAVAILABLE, CommandError, Servers, pages
from atserving.cli.ops.options import flag

NOT_READY = 8
"""The exit status of a command that has waited in vain."""

_POLL_S = 0.25


def wait_flags(text: str) -> Callable[[Any], Any]:
    """Return ``--wait``, ``--instances`` and ``--timeout``."""

    def all_three(command: Any) -> Any:
        limit = flag(
            "--timeout",
            type=click.FloatRange(0),
            default=300.0,
            show_default=True,
            metavar="SECONDS",
            help="How long to wait.",
        )
        count = flag(
            "--instances",
            type=click.IntRange(1),
            metavar="NUMBER",
            help="Wait for so many ready instances. Default of --wait: for all that are registered, and at least 1.",
        )
        return flag("--wait", is_flag=True, help=text)(count(limit(command)))

    return all_three


def wait_ready(servers: Servers, app: str, version: str, wanted: int | None, timeout_s: float) -> None:
    """Wait until so many instances of a version, or of an alias, have the release's content. Raises CommandError.

    Without a number, wait until all that are registered have it, and as many as there were at first, at least one. Each
    that becomes ready is a line of the output.
    """
    until_s = time.monotonic() + timeout_s
    told: set[str] = set()
    asked = ""
    had = 0
    while True:
        ready, outdated, reason = 0, 0, ""
        total = wanted or max(had, 1)
        try:
            request = admin_pb2.ListInstancesRequest(app=app, version=version)
            for page in pages(servers, lambda stub: stub.ListInstances, request):
                for each in page.instances:
                    ready += not each.outdated
                    outdated += each.outdated
                    if not each.outdated and each.id not in told:
                        told.add(each.id)
                        click.echo(f"{app} {version} is ready: {each.address}")
            had = had or max(ready + outdated, 1)
            # Those that are replaced count until they are gone.
            total = wanted or max(had, ready + outdated)
            if ready >= total:
                return
            reason = f"{outdated} have loaded other content: start them again" if outdated else "no more are registered"
        except CommandError as error:
            # Another registry may not have heard of the app yet.
            if error.exit_status not in (NOT_FOUND, UNAVAILABLE):
                raise
            reason = str(error)
        if time.monotonic() >= until_s:
            said = f"{ready} of {total} instances of {app} {version} were ready within {timeout_s:g} s"
            raise CommandError(f"{said}: {reason}", NOT_READY)
        if (asking := f"waiting for {app} {version}: {ready} of {total} ready") != asked:
            click.echo(asking, err=True)
            asked = asking
        time.sleep(_POLL_S)
