"""A loaded net: its model and its three functions, and what their answers mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import orjson
import structlog

from atserving.errors import Internal, NetError, ServingError, StartError
from evaluator.contract import Config, NetFunctions, Req

log = structlog.get_logger()

_WARM_UP_SIDE = 32


@dataclass(frozen=True)
class Prepared:
    """A request that is ready for the engine."""

    reqid: str
    req: Req


@dataclass(frozen=True)
class Result:
    """What the net answered: ``json``, a JSON document, or ``stream``, bytes; the other is None."""

    message: str
    json: bytes | None = None
    stream: bytes | None = None


class Runner:
    """Calls the net. ``prepare`` is for many threads, ``infer`` for one at a time.

    What a net raises goes to the log with its trace; the caller learns only that the net failed.
    """

    def __init__(self, functions: NetFunctions, cfg: Config) -> None:
        """Loads the net, which may take long. Raises StartError."""
        self._functions = functions
        self._workspace = Path(cfg["custom_values"]["workspace"]).resolve()
        try:
            self._model = functions.net_init(cfg)
        except StartError:
            raise
        except Exception as error:
            log.exception("net_init failed")
            raise StartError(f"net_init raised {type(error).__name__}, see the log") from error
        if self._model.get("error"):
            raise StartError(str(self._model["error"]))
        self.batch_size = int(self._model.get("batch_size") or cfg["batch_size"] or 1)

    def prepare(self, reqid: str, req: Req) -> Prepared:
        """The request after ``net_preprocess``. Raises ServingError."""
        if self._functions.net_preprocess is None:
            return Prepared(reqid, req)
        try:
            return Prepared(reqid, self._functions.net_preprocess(self._model, req))
        except ServingError:
            raise
        except Exception as error:
            log.exception("net_preprocess failed", reqid=reqid)
            raise Internal("the net failed to prepare the request") from error

    def infer(self, batch: Sequence[Prepared]) -> list[Result | ServingError]:
        """One outcome a request, in order. Raises ServingError where the batch as a whole failed."""
        reqid = ",".join(prepared.reqid for prepared in batch)
        try:
            rets = self._functions.net_inference(
                self._model, {"reqid": reqid, "reqs": [prepared.req for prepared in batch]}
            )
        except ServingError:
            raise
        except Exception as error:
            log.exception("net_inference failed", reqid=reqid, batch=len(batch))
            raise Internal("the forward pass failed") from error
        if not isinstance(rets, list) or len(rets) != len(batch):
            log.error("net_inference did not return one ret a request", reqid=reqid, batch=len(batch))
            raise Internal("the net did not return one result a request")
        return [self._outcome(ret, prepared.reqid) for ret, prepared in zip(rets, batch, strict=True)]

    def warm_up(self) -> None:
        """Runs a picture through the net, alone and as a full batch, as requests will. Raises StartError."""
        picture = cv2.imencode(".png", np.full((_WARM_UP_SIDE, _WARM_UP_SIDE, 3), 127, np.uint8))[1].tobytes()
        for size in sorted({1, self.batch_size}):
            try:
                batch = [self.prepare("warm-up", {"data": {"uri": "", "body": picture}}) for _ in range(size)]
                outcomes = self.infer(batch)
            except ServingError as error:
                raise StartError(f"the net failed to warm up: {error}") from error
            for outcome in outcomes:
                if isinstance(outcome, ServingError):
                    raise StartError(f"the net failed to warm up: {outcome}")

    def _outcome(self, ret: object, reqid: str) -> Result | ServingError:
        if not isinstance(ret, dict):
            log.error("a ret is no dict", reqid=reqid, kind=type(ret).__name__)
            return Internal("the net's result is malformed")
        code, message = ret.get("code", 0), ret.get("message") or ""
        if isinstance(code, bool) or not isinstance(code, int) or not isinstance(message, str):
            log.error("a ret's code is no integer or its message no text", reqid=reqid)
            return Internal("the net's result is malformed")
        if code:
            return NetError(code, message)
        try:
            if ret.get("result_file") is not None:
                return Result(message, stream=self._stream(ret["result_file"]))
            return Result(message, json=_to_json(ret.get("result")))
        except (TypeError, ValueError, OSError, RecursionError) as error:
            log.error("a ret's result can't be sent", reqid=reqid, reason=str(error))
            return Internal("the net's result is malformed")

    def _stream(self, result_file: object) -> bytes:
        if isinstance(result_file, bytes | bytearray | memoryview):
            return bytes(result_file)
        path = Path(str(result_file)).resolve()
        if not path.is_relative_to(self._workspace):
            raise ValueError("result_file is outside the workspace")
        return path.read_bytes()


def _to_json(result: Any) -> bytes:
    # orjson writes what is not finite as null. Only where there is a null is it worth looking for its cause.
    json = orjson.dumps(result, option=orjson.OPT_SERIALIZE_NUMPY)
    if b"null" in json:
        _refuse_not_finite(result)
    return json


def _refuse_not_finite(value: Any) -> None:
    if isinstance(value, dict):
        for item in value.values():
            _refuse_not_finite(item)
    elif isinstance(value, list | tuple | np.ndarray):
        for item in value:
            _refuse_not_finite(item)
    elif isinstance(value, float | np.floating) and not math.isfinite(value):
        raise ValueError("the result holds a number that is not finite")
