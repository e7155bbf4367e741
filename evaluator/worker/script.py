"""A release's ``net.py``, loaded into this process: its functions as a net, and its output as log lines.

The only module that handles ``cfg`` and ``model`` as dicts: the seed defines them so for scripts.
"""

from __future__ import annotations

import importlib.util
import io
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from atserving.errors import StartError
from evaluator.net_config import Cfg, NetConfig
from evaluator.net_contract import Req, Ret

log = structlog.get_logger()

_MAX_LINE_CHARS = 2000

Model = dict[str, Any]


@dataclass(frozen=True)
class Script:
    """The functions of a ``net.py``. Calling it with a config runs ``net_init``."""

    net_init: Callable[[Cfg], Model]
    net_inference: Callable[[Model, dict[str, Any]], list[Ret]]
    net_preprocess: Callable[[Model, Req], Req] | None = None

    def __call__(self, config: NetConfig) -> ScriptNet:
        """Load the script's net. Raises StartError and the errors of ``net_init``."""
        return ScriptNet(self, config)


class ScriptNet:
    """The net that ``net_init`` of a script returned."""

    def __init__(self, script: Script, config: NetConfig) -> None:
        self._script = script
        self._model = _guarded(script.net_init)(config.to_cfg())
        if not isinstance(self._model, dict):
            raise StartError(f"net_init returned {type(self._model).__name__}, should be a dict")
        error = self._model.get("error")
        if error is not None and str(error) not in ("", "False", "0"):
            raise StartError(str(error))
        self.batch_size = _batch_size(self._model)
        self._net_preprocess = _guarded(script.net_preprocess) if script.net_preprocess else None
        self._net_inference = _guarded(script.net_inference)

    def preprocess(self, req: Req) -> Any:
        """Return the request after ``net_preprocess``, if the script has one."""
        return self._net_preprocess(self._model, req) if self._net_preprocess else req

    def infer(self, reqid: str, reqs: Sequence[Any]) -> list[Ret]:
        """Return the result of ``net_inference``; a faulty script may return anything."""
        rets: list[Ret] = self._net_inference(self._model, {"reqid": reqid, "reqs": list(reqs)})
        return rets


def load(path: Path) -> Script:
    """Load a ``net.py``, which may import the modules next to it. Raises StartError."""
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
    return Script(**{name: function for name, function in functions.items() if function})


def _batch_size(model: Model) -> int | None:
    size = model.get("batch_size")
    if not size:
        return None
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
        raise StartError(f"the batch_size of net_init's model is {size!r}, should be a positive integer")
    return int(size)


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn exceptions that would end the thread into errors: ``sys.exit`` in a script only fails the call."""

    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception:
            raise
        except BaseException as stop:
            raise RuntimeError(f"the script raised {type(stop).__name__}") from stop

    return call


class LogLines(io.TextIOBase):
    """Standard output for a script: logs each line that the script prints."""

    def __init__(self) -> None:
        self._part = threading.local()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, rest = (getattr(self._part, "text", "") + text).split("\n")
        if len(rest) > _MAX_LINE_CHARS:
            lines, rest = [*lines, rest], ""
        self._part.text = rest
        for line in lines:
            log.info("script printed", text=line[:_MAX_LINE_CHARS])
        return len(text)
