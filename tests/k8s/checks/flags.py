"""The values of flags, as a container gives them or as the mesh's programs default them."""

from __future__ import annotations

import click

import evaluator.__main__
import gate.__main__
import registry.__main__

from .model import Container

PROGRAMS: dict[str, click.Command] = {
    "gate": gate.__main__.main,
    "registry": registry.__main__.main,
    "evaluator": evaluator.__main__.main,
}
"""The programs that serve gRPC, by component."""


def value_of(container: Container, component: str, flag: str) -> str | None:
    """Return a flag's value: the container's, or the program's default."""
    given = container.flag(flag)
    if given is not None:
        return given
    default = next(each.default for each in PROGRAMS[component].params if f"--{flag}" in each.opts)
    # click marks a flag that has no default with an object of its own.
    return str(default) if isinstance(default, str | int | float) else None


def seconds(container: Container, component: str, flag: str) -> float:
    """Return the value of a flag that takes seconds."""
    return float(value_of(container, component, flag) or 0)
