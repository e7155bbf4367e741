"""A loaded net: its model and its three functions, and what their answers mean."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import structlog

from atserving.errors import Internal, NetError, ServingError, StartError
from evaluator.net_contract import Config, Model, NetFunctions, Req
from evaluator.worker.request_codec import Files

log = structlog.get_logger()

MAX_RESULT_BYTES = 48 << 20
"""The most that one answer may measure: with what goes along in its message, less than a message may."""

_MAX_MESSAGE_LENGTH = 4096
_CODES = range(-(2**31), 2**31)


@dataclass(frozen=True)
class Prepared:
    """A request that is ready for the engine."""

    reqid: str
    req: Req
    files: Files | None = None
    """Those of its resources, which are removed once it is answered."""


@dataclass(frozen=True)
class Result:
    """What the net answered: ``json``, a JSON document, or ``stream``, bytes; the other is None."""

    message: str
    json: bytes | None = None
    stream: bytes | None = None


class NetRunner:
    """Calls the functions of a net in this process. ``prepare`` is for many threads, ``infer`` for the net's engines.

    What a net raises goes to the log with its trace; the caller learns only that the net failed.
    """

    def __init__(self, functions: NetFunctions, cfg: Config) -> None:
        """Loads the net, which may take long. Raises StartError."""
        self.longest_prepare_s = self.longest_infer_s = 0.0
        """The longest that a call of ``net_preprocess`` and of ``net_inference`` took so far."""
        self._functions = functions
        self._workspace = Path(cfg["custom_values"]["workspace"]).resolve()
        # What a net makes to send is removed when it is sent; what came with the release stays.
        self._kept = {Path(path).resolve() for name in ("tar_files", "custom_files") for path in cfg[name].values()}
        try:
            self._model = functions.net_init(cfg)
        except StartError as error:
            raise StartError(_one_line(str(error))) from error
        except Exception as error:
            log.exception("net_init failed")
            raise StartError(f"net_init raised {type(error).__name__}, see the log") from error
        if not isinstance(self._model, dict):
            raise StartError(f"net_init returned {type(self._model).__name__}, should be a dict")
        said = self._model.get("error")
        if said is not None and str(said) not in ("", "False", "0"):
            raise StartError(_one_line(str(said)))
        self.batch_size = _batch_size(self._model, cfg)

    def prepare(self, reqid: str, req: Req, files: Files | None = None) -> Prepared:
        """The request after ``net_preprocess``. Raises ServingError."""
        if self._functions.net_preprocess is None:
            return Prepared(reqid, req, files)
        began_s = time.perf_counter()
        try:
            return Prepared(reqid, self._functions.net_preprocess(self._model, req), files)
        except ServingError as error:
            raise _sendable(error) from error
        except Exception as error:
            log.exception("net_preprocess failed", reqid=reqid)
            raise Internal("the net failed to prepare the request") from error
        finally:
            self.longest_prepare_s = max(self.longest_prepare_s, time.perf_counter() - began_s)

    def infer(self, batch: Sequence[Prepared]) -> list[Result | ServingError]:
        """One outcome a request, in order. Raises ServingError where the batch as a whole failed."""
        reqid = ",".join(prepared.reqid for prepared in batch)
        began_s = time.perf_counter()
        try:
            rets = self._functions.net_inference(
                self._model, {"reqid": reqid, "reqs": [prepared.req for prepared in batch]}
            )
        except ServingError as error:
            raise _sendable(error) from error
        except Exception as error:
            log.exception("net_inference failed", reqid=reqid, batch=len(batch))
            raise Internal("the forward pass failed") from error
        finally:
            self.longest_infer_s = max(self.longest_infer_s, time.perf_counter() - began_s)
        if not isinstance(rets, list) or len(rets) != len(batch):
            log.error("net_inference did not return one ret a request", reqid=reqid, batch=len(batch))
            raise Internal("the net did not return one result a request")
        return [self._outcome(ret, prepared.reqid) for ret, prepared in zip(rets, batch, strict=True)]

    def _outcome(self, ret: object, reqid: str) -> Result | ServingError:
        if not isinstance(ret, dict):
            log.error("a ret is no dict", reqid=reqid, kind=type(ret).__name__)
            return Internal("the net's result is malformed")
        code, message = ret.get("code", 0), ret.get("message") or ""
        code = int(code) if isinstance(code, np.integer) else code
        # Only of an integer: a range compares anything else with all that it holds.
        if type(code) is not int or code not in _CODES or not isinstance(message, str):
            log.error("a ret's code is no integer or its message no text", reqid=reqid)
            return Internal("the net's result is malformed")
        message = _text(message)
        if code:
            return NetError(code, message)
        try:
            if ret.get("result_file") is not None:
                return Result(message, stream=_bounded(self._stream(ret["result_file"])))
            return Result(message, json=_bounded(_to_json(ret.get("result"))))
        except (TypeError, ValueError, OSError, RecursionError) as error:
            log.error("a ret's result can't be sent", reqid=reqid, reason=str(error))
            return Internal("the net's result is malformed")

    def _stream(self, result_file: object) -> bytes:
        if isinstance(result_file, bytes | bytearray | memoryview):
            return bytes(result_file)
        if not isinstance(result_file, str | Path):
            raise TypeError(f"result_file is {type(result_file).__name__}, neither bytes nor a path")
        path = (self._workspace / result_file).resolve()
        if not path.is_relative_to(self._workspace):
            raise ValueError("result_file is outside the workspace")
        if not path.is_file():
            raise ValueError("result_file is no file")
        if path.stat().st_size > MAX_RESULT_BYTES:
            raise ValueError(f"result_file is larger than {MAX_RESULT_BYTES} bytes")
        data = path.read_bytes()
        if path not in self._kept:
            path.unlink(missing_ok=True)
        return data


def _batch_size(model: Model, cfg: Config) -> int:
    """What the net says, else the release, else 1."""
    size = model.get("batch_size") or cfg["batch_size"] or 1
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
        raise StartError(f"the batch_size of net_init's model is {size!r}, should be a positive integer")
    return int(size)


def _sendable(error: ServingError) -> ServingError:
    """An error that a script may have raised, with whatever in it, as one that can be sent."""
    error.message = _text(str(error.message))
    if type(error.status) is not int or not 400 <= error.status <= 599:
        error.status = Internal.status
    if type(error.code) is not int or error.code not in _CODES:
        error.code = error.status
    # Only the instance itself sends a request elsewhere.
    error.refused, error.retry_after_s = False, None
    return error


def _text(message: str) -> str:
    return message[:_MAX_MESSAGE_LENGTH].encode(errors="replace").decode()


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_MAX_MESSAGE_LENGTH]


def _bounded(data: bytes) -> bytes:
    if len(data) > MAX_RESULT_BYTES:
        raise ValueError(f"the result is larger than {MAX_RESULT_BYTES} bytes")
    return data


def _to_json(result: Any) -> bytes:
    # orjson writes what is not finite as null. Only where there is a null is it worth looking for its cause.
    json = orjson.dumps(result, option=orjson.OPT_SERIALIZE_NUMPY)
    if b"null" in json:
        _refuse_not_finite(result)
    return json


def _refuse_not_finite(value: Any) -> None:
    if is_dataclass(value) and not isinstance(value, type):
        value = {each.name: getattr(value, each.name) for each in fields(value)}
    if isinstance(value, dict):
        for item in value.values():
            _refuse_not_finite(item)
    elif isinstance(value, list | tuple | np.ndarray):
        for item in value:
            _refuse_not_finite(item)
    elif isinstance(value, float | np.floating) and not math.isfinite(value):
        raise ValueError("the result holds a number that is not finite")
