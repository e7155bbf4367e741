"""The `atserving` command."""

from __future__ import annotations

from importlib.metadata import EntryPoints, entry_points

import click

from atserving import __version__
from atserving.cli import service
from atserving.errors import StartError


def _commands() -> EntryPoints:
    """What installed packages offer as commands; setup.cfg lists ours.

    So a service can add its own without being imported here, and each is imported only when it is asked for: some need
    packages that a gate's machine need not have.
    """
    return entry_points(group="atserving.commands")


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_commands().names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _commands().names:
            return None
        try:
            command = _commands()[cmd_name].load()
        except ModuleNotFoundError as error:
            raise StartError(f"{cmd_name} needs the package {error.name}: pip install 'atserving[local]'") from None
        assert isinstance(command, click.Command)
        return command


@click.command(cls=_Commands, help="Work with AtServing, which serves Caffe networks as versioned releases.")
@click.version_option(__version__)
def atserving() -> None:
    pass


def main() -> None:
    service.run(atserving, "atserving")
