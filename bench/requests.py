"""The kinds of requests that the mesh answers, as loads on it."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from dataclasses import dataclass, replace
from typing import Any

from atserving.v1 import serving_pb2
from bench.answer import Answer
from bench.callers import Job
from bench.processes import VERSION


@dataclass(frozen=True)
class Target:
    """An app that a mesh serves, and a picture for it."""

    edge: str
    """The URL of the mesh."""
    app: str
    picture: bytes
    picture_url: str
    answer: Answer

    def octet_stream(self) -> Job:
        """Return the load of requests with the picture as their body."""
        return Job(self._url, self.picture, 1, 1, answer=self.answer)

    def padded(self, size: int) -> Job:
        """Return the load of bodies with ``size`` bytes: the same PNG with a chunk that decoders skip."""
        chunk = b"teSt" + bytes(size - len(self.picture) - 12)
        filler = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        # The signature and the header come first.
        return replace(self.octet_stream(), body=self.picture[:33] + filler + self.picture[33:])

    def data_uri(self) -> Job:
        """Return the load of JSON with the picture in it."""
        return self._json(self._url, {"data": self._inline})

    def http_uri(self) -> Job:
        """Return the load of JSON with the picture's URL, from which the evaluator fetches it each time."""
        return self._json(self._url, {"data": {"uri": self.picture_url}})

    def batch(self, count: int) -> Job:
        """Return the load of batches, each of ``count`` tasks."""
        tasks = [{"op": self._path, "data": self._inline}] * count
        return replace(self._json(f"{self.edge}/v1/batch", tasks), answer=replace(self.answer, count=count))

    def grpc(self) -> Job:
        """Return the load of gRPC calls with the picture in them."""
        request = serving_pb2.EvalRequest(app=self.app, version=VERSION, data=[serving_pb2.Resource(body=self.picture)])
        method = "/atserving.v1.ServingService/Eval"
        return Job(self.edge, request.SerializeToString(), 1, 1, method=method, answer=self.answer)

    def unknown_app(self) -> Job:
        """Return the load of requests that the gate refuses."""
        return Job(f"{self.edge}/v1/eval/unknown", self.picture, 1, 1, status=404)

    def health(self) -> Job:
        """Return the load of requests that Envoy answers alone."""
        return Job(f"{self.edge}/health", b"", 1, 1)

    @property
    def _path(self) -> str:
        return f"/v1/eval/{self.app}/{VERSION}"

    @property
    def _url(self) -> str:
        return self.edge + self._path

    @property
    def _inline(self) -> dict[str, str]:
        # Decoders and the evaluator go by the content, not by this type.
        return {"uri": "data:image/png;base64," + base64.b64encode(self.picture).decode()}

    def _json(self, url: str, value: Any) -> Job:
        return Job(url, json.dumps(value).encode(), 1, 1, content_type="application/json", answer=self.answer)
