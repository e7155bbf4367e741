"""A release's `net.py`, loaded into this process: its functions, guarded, and what it prints."""

from __future__ import annotations

import functools
import importlib.util
import io
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from atserving.errors import StartError
from evaluator.net_contract import NetFunctions

log = structlog.get_logger()

_LONGEST_LINE = 2000


def load(path: Path) -> NetFunctions:
    """The functions of a `net.py`, whose neighbours it may import. Raises StartError."""
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("net", path)
    assert spec
    assert spec.loader
    module = sys.modules["net"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise StartError(f"{Path(error.filename or 'net.py').name}, line {error.lineno}: {error.msg}") from error
    except BaseException as error:
        log.exception("net.py failed")
        raise StartError(f"net.py raised {type(error).__name__} while it was loaded, see the log") from error
    functions = {name: getattr(module, name, None) for name in ("net_init", "net_inference", "net_preprocess")}
    for name, function in functions.items():
        if not callable(function) and (function is not None or name != "net_preprocess"):
            raise StartError(f"net.py has no function {name}")
    return NetFunctions(**{name: _guarded(function) for name, function in functions.items() if function})


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an error of what would end the thread: ``sys.exit`` in a script is no more than a failed call."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception:
            raise
        except BaseException as stop:
            raise RuntimeError(f"the script raised {type(stop).__name__}") from stop

    return call


class LogLines(io.TextIOBase):
    """Standard output for a script: each line that it prints is one in the log."""

    def __init__(self) -> None:
        self._part = threading.local()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, rest = (getattr(self._part, "text", "") + text).split("\n")
        if len(rest) > _LONGEST_LINE:
            lines, rest = [*lines, rest], ""
        self._part.text = rest
        for line in lines:
            log.info("script", text=line[:_LONGEST_LINE])
        return len(text)
