"""The `atserving` command."""

from __future__ import annotations

import importlib

import click

from atserving import __version__
from atserving.cli import service
from atserving.errors import StartError

# The commands by name, each in a module of its own that is imported when it is asked for: `up` and `demo` need packages
# that a gate's or a registry's machine need not have.
_COMMANDS = {
    "demo": ("atserving.cli.demo", "demo"),
    "release": ("atserving.cli.release", "release"),
    "up": ("atserving.cli.up", "up"),
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, name = _COMMANDS[cmd_name]
        try:
            command = getattr(importlib.import_module(module), name)
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
