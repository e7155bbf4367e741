"""The ``atserving`` command."""

from __future__ import annotations

from importlib.metadata import EntryPoints, entry_points

import click

from atserving import __version__
from atserving.cli import service
from atserving.errors import StartError

_INSTALL = "pip install '.[local]' in a checkout"


def _commands() -> EntryPoints:
    """Return the commands of all installed packages; setup.cfg lists ours.

    So a service can add commands without an import here. A command is imported only when it is used or listed, because
    some commands need packages that are missing on a gate's machine.
    """
    return entry_points(group="atserving.commands")


class _Unusable(click.Command):
    """A command that can't be imported."""

    def __init__(self, name: str, reason: str, text: str) -> None:
        super().__init__(
            name,
            add_help_option=False,
            context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
            help=text,
        )
        self._reason = reason

    def invoke(self, ctx: click.Context) -> None:
        raise StartError(f"{self.name} {self._reason}")


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_commands().names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _commands().names:
            return None
        try:
            command = _commands()[cmd_name].load()
        except ModuleNotFoundError as error:
            return _Unusable(cmd_name, f"needs the package {error.name}: {_INSTALL}", f"Not installed: {_INSTALL}.")
        except Exception as error:
            # A library that is there may still fail. The other commands work on.
            reason = " ".join(str(error).split())[:200]
            return _Unusable(
                cmd_name, f"can't be used here: {type(error).__name__}: {reason}", "It can't be used here."
            )
        assert isinstance(command, click.Command)
        service.name_variables(command, f"ATSERVING_{cmd_name}")
        return command


@click.command(cls=_Commands, help="Work with AtServing, which serves Caffe networks as versioned releases.")
@click.version_option(__version__, allow_from_autoenv=False)
def atserving() -> None:
    pass


def main() -> None:
    service.run(atserving, "atserving")
