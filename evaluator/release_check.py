"""Checks a release before it is published: fetches its files, and loads its net as an instance would.

A script of a release is read, not run: that is for an instance, or for ``evaluator check``, whose caller wants it.
"""

from __future__ import annotations

import ast
import asyncio
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atserving import known_fields
from atserving.config import Release
from atserving.errors import StartError
from evaluator.fetching.release import fetch_release
from evaluator.net_config import NetConfig
from evaluator.nets import BUILT_IN, built_in
from evaluator.options import Options

_FUNCTIONS = ("net_init", "net_inference")


@dataclass(frozen=True)
class Checked:
    """What was found."""

    digests: Mapping[str, str]
    """The sha256 of each file in hex, by the field that names it: ``file``, ``custom_files.<name>``."""
    warnings: list[str]


def check_release(release: Release) -> Checked:
    """Check a release. Raises StartError with one line that says what is wrong with it."""
    digests: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="atserving-check-") as folder:
        config = asyncio.run(fetch_release(release, Path(folder), digests=digests))
        warnings = _of_script(config) if config.script else _of_net(config)
    return Checked(digests, warnings)


def _of_net(config: NetConfig) -> list[str]:
    name = config.net
    if name not in BUILT_IN and (near := known_fields.meant(name, BUILT_IN)):
        raise StartError(f"custom_values.net is {name!r}, did you mean {near!r}? The built-in nets are: {_names()}")
    load = built_in(config.custom_values.fields.get("net", name))
    values = _Noted("custom_values", config.custom_values.fields)
    params = _Noted("model_params", config.model_params.fields)
    noted = replace(config, custom_values=values, model_params=params, workspace=None)
    if noted.use_device != "CPU":
        # This machine need not have one. The instance checks what takes a GPU.
        noted = replace(noted, use_device="CPU", model_params=params.without("tensorrt", "fp16"))
    load(noted)
    _read_the_rest(noted)
    return [*_unread(values, "net"), *_unread(params)]


def _read_the_rest(config: NetConfig) -> None:
    """Read what the processes of an instance read beside the net. Raises StartError."""
    assert config.limits
    for name in ("engines", "memory_mib"):
        config.model_params.optional_positive_int(name)
    config.model_params.boolean("network", False)
    for name in ("script_timeout_s", "init_timeout_s"):
        config.model_params.positive_number(name, 1.0)


def _of_script(config: NetConfig) -> list[str]:
    assert config.script
    try:
        tree = ast.parse(config.script.read_bytes(), "net.py")
    except (SyntaxError, ValueError) as error:
        raise StartError(
            f"net.py, line {getattr(error, 'lineno', None) or 1}: {getattr(error, 'msg', error)}"
        ) from None
    # A name may come from anywhere: from another module, or from an assignment in a branch.
    names = {name for node in ast.walk(tree) for name in _bound(node)}
    if "*" not in names and (missing := [name for name in _FUNCTIONS if name not in names]):
        raise StartError(f"net.py has no function {missing[0]}")
    _read_the_rest(config)
    return []


def _bound(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
            yield name
        case ast.Name(id=name, ctx=ast.Store()):
            yield name
        case ast.alias(name=name, asname=other):
            yield other or name


def _names() -> str:
    return ", ".join(sorted(BUILT_IN))


def _unread(options: _Noted, *read: str) -> list[str]:
    """Return a warning of the fields that nobody has read, each with the one that its writer may have meant."""
    unread = [name for name in options.fields if name not in (*options.asked, *read)]
    warning = known_fields.warning(unread, sorted(options.asked - options.fields.keys()))
    return [f"{options.name}: {warning}"] if warning else []


class _Noted(Options):
    """Options that note which of them are read."""

    def __init__(self, name: str, fields: Mapping[str, Any]) -> None:
        self.asked: set[str] = set()
        super().__init__(name, _NotedFields(fields, self.asked))
        self.name = name

    def without(self, *names: str) -> _Noted:
        """Return the options without some, which count as read; both note the same."""
        left = _Noted(self.name, {name: value for name, value in self.fields.items() if name not in names})
        self.asked |= set(names)
        left.asked = self.asked
        assert isinstance(left.fields, _NotedFields)
        left.fields.asked = self.asked
        return left


class _NotedFields(dict[str, Any]):
    """A dict that notes the names that are looked up."""

    def __init__(self, fields: Mapping[str, Any], asked: set[str]) -> None:
        super().__init__(fields)
        self.asked = asked

    def __contains__(self, name: object) -> bool:
        self.asked.add(str(name))
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)
