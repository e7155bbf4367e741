"""Print the API's objects: as tables, or as its JSON."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import click
import orjson
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from atserving.admin.v1 import admin_pb2
from atserving.cli.tables import printable, styled, table
from atserving.errors import StartError

PHASES = {"staging": admin_pb2.PHASE_STAGING, "production": admin_pb2.PHASE_PRODUCTION}
_PHASE_NAMES: dict[int, str] = {number: name for name, number in PHASES.items()}


ROLES = ("viewer", "publisher", "admin")
"""The roles of operators, as the API numbers them from 1 on."""


def role(operator: admin_pb2.Operator) -> str:
    """Return the role of an operator, and the apps of a publisher."""
    name = ROLES[operator.role - 1] if 0 < operator.role <= len(ROLES) else "?"
    return text(f"{name} of {', '.join(operator.apps)}" if operator.apps else name)


def phase(number: int) -> str:
    """Return the name of a phase."""
    return _PHASE_NAMES.get(number, "?")


def shown_phase(number: int) -> str:
    """Return the name of a phase for a table."""
    name = phase(number)
    return styled(name, fg="green") if name == "production" else name


def moment(stamp: Timestamp) -> str:
    """Return a moment in RFC 3339, to the second; ``-`` if there is none."""
    return f"{stamp.ToDatetime():%Y-%m-%dT%H:%M:%SZ}" if stamp.seconds else "-"


def rows(headers: Sequence[str], found: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    click.echo(table(headers, found))


def fields(pairs: Iterable[tuple[str, str]]) -> None:
    """Print names and values, those that have a value."""
    click.echo(table((), [(f"{styled(name, bold=True)}:", value) for name, value in pairs if value]))


def text(value: Any) -> str:
    """Return a text of the config for a table, without the secrets of URIs."""
    return printable(_SECRETS.sub(_hidden, str(value)))


def compact(value: Any) -> str:
    """Return a value as JSON in one line, without the secrets of URIs."""
    return text(orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode())


# The credentials and the query of a URI, which may be a signature.
_SECRETS = re.compile(r"(://)([^/\s\"]*@)?([^\s\"?#]*)(\?[^\s\"#]+)?")


def _hidden(uri: re.Match[str]) -> str:
    return f"{uri[1]}{'***@' if uri[2] else ''}{uri[3]}{'?***' if uri[4] else ''}"


def as_dict(message: Message) -> dict[str, Any]:
    """Return a message as the API's JSON has it."""
    found: dict[str, Any] = whole(MessageToDict(message, preserving_proto_field_name=True))
    return found


def whole(value: Any) -> Any:
    """Return a value with integers in place of whole doubles, as a Struct has only those."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [whole(each) for each in value]
    if isinstance(value, dict):
        return {name: whole(each) for name, each in value.items()}
    return value


def document(value: Message | Mapping[str, Any], format_: str, *, one_of_many: bool = False) -> None:
    """Print a message, or a value, as ``json`` or ``yaml``.

    ``one_of_many``: others follow, so that it is one line of JSON, or a document of YAML with its mark. Raises
    StartError without PyYAML.
    """
    found = as_dict(value) if isinstance(value, Message) else value
    if format_ == "yaml":
        click.echo(("---\n" if one_of_many else "") + yaml(found), nl=False)
    else:
        click.echo(orjson.dumps(found, option=None if one_of_many else orjson.OPT_INDENT_2).decode())


def yaml(value: Any) -> str:
    """Return a value of JSON as YAML, with the fields in their order. Raises StartError without PyYAML."""
    try:
        import yaml as library
    except ModuleNotFoundError:
        raise StartError("YAML needs the package PyYAML: pip install '.[local]' in a checkout") from None
    return str(library.safe_dump(value, sort_keys=False, allow_unicode=True, width=120))


def warn(message: Message) -> None:
    """Print the warnings of an object on standard error, if it has any."""
    for warning in getattr(message, "warnings", ()):
        click.echo(f"warning: {printable(warning)}", err=True)


def shares(app: admin_pb2.App) -> None:
    """Print which version gets how much of the requests without a version."""
    rows(
        ("VERSION", "SHARE", "WEIGHT", "CAPACITY"),
        [
            (
                each.version,
                f"{each.share:.1%}",
                f"{each.weight:g}" if each.HasField("weight") else "-",
                str(each.capacity),
            )
            for each in app.shares
        ],
    )
