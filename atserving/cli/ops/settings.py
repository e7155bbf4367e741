"""``FIELD=VALUE`` arguments, as ``atserving worker set`` and ``atserving access set`` take them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import click

from atserving.cli.ops import completion

Parse = Callable[[str], Any]


def arguments(most_names: int, parsers: Mapping[str, Parse]) -> Callable[[Any], Any]:
    """Return the arguments ``[NAME...] FIELD=VALUE...``, as one pair: the names, and the fields by name."""

    def parse(
        context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
    ) -> tuple[list[str], dict[str, Any]]:
        names = [value for value in values if "=" not in value]
        pairs = [value.partition("=") for value in values if "=" in value]
        if list(values[: len(names)]) != names or len(names) > most_names or not pairs:
            raise click.BadParameter("should be names, then FIELD=VALUE", context, parameter)
        fields: dict[str, Any] = {}
        for name, _, value in pairs:
            if name not in parsers:
                raise click.BadParameter(f"{name!r} should be one of {', '.join(parsers)}", context, parameter)
            try:
                fields[name] = parsers[name](value)
            except ValueError as error:
                raise click.BadParameter(f"{name}: {value!r} {error}", context, parameter) from None
        return names, fields

    metavar = "[APP] FIELD=VALUE..." if most_names == 1 else "[APP [VERSION]] FIELD=VALUE..."

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
        fields = [f"{name}=" for name in parsers if name.startswith(incomplete)]
        return [*completion.apps(context, parameter, incomplete), *fields]

    return completion.argument("wanted", complete, nargs=-1, required=True, callback=parse, metavar=metavar)


def whole(text: str) -> int:
    """Return a whole number of the API's. Raises ValueError."""
    try:
        number = int(text)
    except ValueError:
        raise ValueError("should be a whole number") from None
    if abs(number) >= 1 << 31:
        raise ValueError("should be below 2147483648")
    return number


def number(text: str) -> float:
    """Return a number. Raises ValueError."""
    try:
        return float(text)
    except ValueError:
        raise ValueError("should be a number") from None


def size(text: str) -> int:
    """Return a number of bytes, which may end in kB, MB or GB. Raises ValueError."""
    for unit, scale in (("kB", 10**3), ("MB", 10**6), ("GB", 10**9)):
        if text.endswith(unit) and text.removesuffix(unit).isdecimal():
            return int(text.removesuffix(unit)) * scale
    if not text.isdecimal() or len(text) > 18:
        raise ValueError("should be a number of bytes, such as 500000, 200kB or 50MB")
    return int(text)


def boolean(text: str) -> bool:
    """Return true or false. Raises ValueError."""
    if text not in ("true", "false"):
        raise ValueError("should be true or false")
    return text == "true"
