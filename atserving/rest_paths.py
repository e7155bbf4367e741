"""Checks that a call that came as REST asks for what its path names.

Envoy fills a request from the path, the query and the body, and the last one wins: without this check, a body could
name another app than the path.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote

from google.api import annotations_pb2
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from atserving.errors import InvalidArgument

ORIGINAL_PATH = "x-envoy-original-path"
"""Where Envoy's transcoder keeps the path of the caller."""

_VARIABLE = re.compile(r"\{([\w.]+)\}")


class RestPaths:
    """The paths of a method."""

    def __init__(self, method: MethodDescriptor) -> None:
        rule: Any = method.GetOptions().Extensions[annotations_pb2.http]
        templates = [getattr(each, each.WhichOneof("pattern") or "get") for each in (rule, *rule.additional_bindings)]
        self._paths = [
            (re.compile(_VARIABLE.sub("([^/]*?)", _escaped(template))), _VARIABLE.findall(template))
            for template in templates
        ]
        self._variables = {name for _, names in self._paths for name in names}

    def check(self, path: str, request: Message) -> None:
        """Raise InvalidArgument if a request differs from the path that it came by. A missing variable is empty."""
        path = path.partition("?")[0]
        for pattern, names in self._paths:
            if found := pattern.fullmatch(path):
                wanted = dict.fromkeys(self._variables, "") | dict(
                    zip(names, map(unquote, found.groups()), strict=True)
                )
                for name, value in wanted.items():
                    if _field(request, name) != value:
                        reason = "differs from the path"
                        raise InvalidArgument(f"{name}: {reason}", fields={name: reason})
                return
        raise InvalidArgument("the path is not one of this call")


def _escaped(template: str) -> str:
    return "".join(part if part.startswith("{") else re.escape(part) for part in re.split(r"(\{[\w.]+\})", template))


def _field(request: Message, name: str) -> object:
    value: Any = request
    for part in name.split("."):
        value = getattr(value, part)
    return value
