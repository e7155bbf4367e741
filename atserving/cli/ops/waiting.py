"""Wait until a version has a ready instance."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click

from atserving.admin.v1 import admin_pb2
from atserving.cli.ops.client import UNAVAILABLE, CommandError, Servers, pages
from atserving.cli.ops.options import flag

_POLL_S = 0.25


def wait_flags(text: str) -> Callable[[Any], Any]:
    """Return ``--wait`` and ``--timeout``."""

    def both(command: Any) -> Any:
        limit = flag(
            "--timeout",
            type=click.FloatRange(0),
            default=300.0,
            show_default=True,
            metavar="SECONDS",
            help="How long to wait.",
        )
        return flag("--wait", is_flag=True, help=text)(limit(command))

    return both


def wait_ready(servers: Servers, app: str, version: str, timeout_s: float) -> None:
    """Wait until an instance of a version, or of an alias, has the release's content. Raises CommandError."""
    until_s = time.monotonic() + timeout_s
    told = False
    while True:
        outdated, reason = 0, "none is registered"
        try:
            request = admin_pb2.ListInstancesRequest(app=app, version=version)
            for page in pages(servers, lambda stub: stub.ListInstances, request):
                for each in page.instances:
                    if not each.outdated:
                        click.echo(f"{app} {version} is ready: {each.address}")
                        return
                    outdated += 1
            if outdated:
                reason = f"{outdated} have loaded other content: start them again"
        except CommandError as error:
            if error.exit_status != UNAVAILABLE:
                raise
            reason = str(error)
        if time.monotonic() >= until_s:
            raise CommandError(f"no instance of {app} {version} was ready within {timeout_s:g} s: {reason}", 1)
        if not told:
            click.echo(f"waiting for an instance of {app} {version}", err=True)
            told = True
        time.sleep(_POLL_S)
