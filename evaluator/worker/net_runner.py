"""Calls a loaded net, and checks and encodes its results."""

from __future__ import annotations

import json as json_module
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
from evaluator.net_config import NetConfig
from evaluator.net_contract import LoadNet, Req, Shrinkable
from evaluator.runtime import memory_limit
from evaluator.worker.request_codec import Files

log = structlog.get_logger()

MAX_RESULT_BYTES = 48 << 20
"""The largest result; with the rest of its message it stays below the limit of a message."""

_MAX_MESSAGE_LENGTH = 4096
_CODES = range(-(2**31), 2**31)


@dataclass(slots=True)
class Prepared:
    """A request that is ready for the engine."""

    reqid: str
    req: Any
    """The request after ``preprocess`` of the net."""
    files: Files | None = None
    """The files of its resources; the worker removes them after the reply."""


@dataclass(slots=True)
class Result:
    """A net's result: ``json``, a JSON document, or ``stream``, bytes; the other is None."""

    message: str
    json: bytes | None = None
    stream: bytes | None = None


class NetRunner:
    """Calls a net in this process: many threads ``prepare``, the net's engines ``infer``.

    It logs the net's exceptions with their traces; the caller only learns that the net failed.
    """

    def __init__(self, load: LoadNet, config: NetConfig) -> None:
        """Load the net, which may take long. Raises StartError."""
        self.longest_prepare_s = self.longest_infer_s = 0.0
        """The longest call of the net's ``preprocess`` and ``infer`` so far."""
        self.wide: NetRunner | None = None
        """The same net for a request that runs alone, with a thread for each CPU; None if one thread does as well."""
        assert config.workspace, "an instance has a workspace"
        self._workspace = config.workspace.resolve()
        # The runner removes a result file after sending it, but never a file of the release.
        self._kept = {path.resolve() for files in (config.tar_files, config.custom_files) for path in files.values()}
        try:
            self._net = load(config)
        except StartError as error:
            raise StartError(_one_line(str(error))) from error
        except Exception as error:
            log.exception("net_init failed")
            raise StartError(f"net_init raised {type(error).__name__}, see the log") from error
        self.batch_size = self._net.batch_size or config.batch_size or 1

    def shrink(self) -> None:
        """Give back the memory that larger batches took than those to come, if the net can."""
        if isinstance(self._net, Shrinkable):
            self._net.shrink()

    def prepare(self, reqid: str, req: Req, files: Files | None = None) -> Prepared:
        """Return the request after the net's ``preprocess``. Raises a ServingError."""
        began_s = time.perf_counter()
        try:
            return Prepared(reqid, self._net.preprocess(req), files)
        except ServingError as error:
            _make_sendable(error)
            raise
        except Exception as error:
            _refuse_shortage(error, reqid)
            log.exception("net_preprocess failed", reqid=reqid)
            raise Internal("the net failed to prepare the request") from error
        finally:
            self.longest_prepare_s = max(self.longest_prepare_s, time.perf_counter() - began_s)

    def infer(self, batch: Sequence[Prepared]) -> list[Result | ServingError]:
        """Return one outcome per request, in order. Raises a ServingError if the batch as a whole failed."""
        reqid = ",".join(prepared.reqid for prepared in batch)
        began_s = time.perf_counter()
        try:
            rets = self._net.infer(reqid, [prepared.req for prepared in batch])
        except ServingError as error:
            _make_sendable(error)
            raise
        except Exception as error:
            _refuse_shortage(error, reqid)
            log.exception("net_inference failed", reqid=reqid, batch=len(batch))
            raise Internal("the forward pass failed") from error
        finally:
            self.longest_infer_s = max(self.longest_infer_s, time.perf_counter() - began_s)
        if not isinstance(rets, list) or len(rets) != len(batch):
            log.error(
                "net_inference failed", reqid=reqid, batch=len(batch), reason="it did not return one ret a request"
            )
            raise Internal("the net did not return one result a request")
        return [self._outcome(ret, prepared.reqid) for ret, prepared in zip(rets, batch, strict=True)]

    def _outcome(self, ret: object, reqid: str) -> Result | ServingError:
        if not isinstance(ret, dict):
            log.error("result rejected", reqid=reqid, reason=f"the ret is no dict but {type(ret).__name__}")
            return Internal("the net's result is malformed")
        code, message = ret.get("code", 0), ret.get("message") or ""
        code = int(code) if isinstance(code, np.integer) else code
        # Check the type first: a range compares any other type with all its members.
        if type(code) is not int or code not in _CODES or not isinstance(message, str):
            log.error("result rejected", reqid=reqid, reason="the ret's code is no integer, or its message no text")
            return Internal("the net's result is malformed")
        message = _text(message)
        if code:
            return NetError(code, message)
        try:
            if ret.get("result_file") is not None:
                return Result(message, stream=_bounded(self._stream(ret["result_file"])))
            return Result(message, json=_bounded(_to_json(ret.get("result"))))
        except MemoryError:
            log.warning("memory exhausted", reqid=reqid)
            return memory_limit.exhausted()
        except (TypeError, ValueError, OSError, RecursionError) as error:
            log.error("result rejected", reqid=reqid, reason=str(error))
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


def _refuse_shortage(error: Exception, reqid: str) -> None:
    """Raise Unavailable if ``error`` says that memory was short."""
    if memory_limit.is_shortage(error):
        log.warning("memory exhausted", reqid=reqid)
        raise memory_limit.exhausted() from error


def _make_sendable(error: ServingError) -> None:
    """Make an error of a script, which may hold anything, fit to be sent."""
    error.message = _text(str(error.message))
    if type(error.status) is not int or not 400 <= error.status <= 599:
        error.status = Internal.status
    if type(error.code) is not int or error.code not in _CODES:
        error.code = error.status
    # Only the instance itself may redirect a request.
    error.refused, error.retry_after_s = False, None


def _text(message: str) -> str:
    return message[:_MAX_MESSAGE_LENGTH].encode(errors="replace").decode()


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_MAX_MESSAGE_LENGTH]


def _bounded(data: bytes) -> bytes:
    if len(data) > MAX_RESULT_BYTES:
        raise ValueError(f"the result is larger than {MAX_RESULT_BYTES} bytes")
    return data


def _to_json(result: Any) -> bytes:
    # orjson writes numbers that are not finite as null, so only a null is worth a search.
    try:
        json = orjson.dumps(result, option=orjson.OPT_SERIALIZE_NUMPY)
    except TypeError as error:
        if "64-bit" not in str(error):
            raise
        json = _with_large_integers(result)
    if b"null" in json:
        _refuse_not_finite(result)
    return json


def _with_large_integers(result: Any) -> bytes:
    """Encode a result with integers that orjson does not take: slower, and with the same values."""
    return json_module.dumps(
        result, default=_plain, allow_nan=False, ensure_ascii=False, separators=(",", ":")
    ).encode()


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    raise TypeError(f"Type is not JSON serializable: {type(value).__name__}")


def _refuse_not_finite(value: Any) -> None:
    if is_dataclass(value) and not isinstance(value, type):
        value = {each.name: getattr(value, each.name) for each in fields(value)}
    if isinstance(value, dict):
        for item in value.values():
            _refuse_not_finite(item)
    elif isinstance(value, np.ndarray):
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ValueError("the result holds a number that is not finite")
    elif isinstance(value, list | tuple):
        for item in value:
            _refuse_not_finite(item)
    elif isinstance(value, float | np.floating) and not math.isfinite(value):
        raise ValueError("the result holds a number that is not finite")
