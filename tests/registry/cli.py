"""Run `atserving` at a registry, as an operator does, beside instances that a test registers."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import grpc
import orjson
import pytest
import structlog

from atserving.cli.main import main
from atserving.local.examples import ROOT
from atserving.v1 import registry_pb2, registry_pb2_grpc

ATSERVING = str(Path(sys.executable).parent / "atserving")
PUT = ("release", "put", "--no-check")
"""Publishes a release whose files are not there."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return orjson.loads(self.out)


@dataclass
class Cli:
    """The command line of one operator, whose app is the test's own."""

    server: str
    app: str

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command as a process; its server and actor are given by variables."""
        return subprocess.Popen(
            [ATSERVING, *arguments],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **self._variables, **environment},
        )

    def run(self, *arguments: str, **environment: str) -> Ended:
        """Run a command to its end, in this process: a test runs many, and each start of one costs half a second."""
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
        logging = structlog.get_config()
        try:
            with (
                patch.dict(os.environ, {**self._variables, **environment}),
                patch.object(sys, "argv", ["atserving", *arguments]),
                patch.object(sys, "stdin", io.StringIO()),
                redirect_stdout(out),
                redirect_stderr(err),
                pytest.raises(SystemExit) as ended,
            ):
                main()
        finally:
            structlog.configure(**logging)
        status = ended.value.code
        assert isinstance(status, int)
        return Ended(status, *(each.buffer.getvalue().decode() for each in (out, err)))

    @property
    def _variables(self) -> dict[str, str]:
        return {"ATSERVING_SERVER": self.server, "ATSERVING_ACTOR": "ada@desk"}

    def __call__(self, *arguments: str) -> str:
        """Run a command that succeeds; return its output."""
        ended = self.run(*arguments)
        assert ended.status == 0, ended.err
        return ended.out

    def register(self, version: str, digest: str | None = None, id_: str = "i", capacity: int = 4) -> None:
        """Register an instance of a version of the app; with the release's content unless ``digest`` is given."""
        if digest is None:
            digest = self.run("release", "show", self.app, version, "-o", "json").json["digest"]
        instance = registry_pb2.Instance(
            app=self.app, version=version, id=id_, address="127.0.0.1:1", capacity=capacity, digest=digest
        )
        with grpc.insecure_channel(self.server) as channel:
            stub = registry_pb2_grpc.RegistryServiceStub(channel)
            stub.RegisterInstance(registry_pb2.RegisterInstanceRequest(instance=instance), timeout=10)

    def deregister(self, version: str, id_: str = "i") -> None:
        """Deregister it."""
        instance = registry_pb2.Instance(app=self.app, version=version, id=id_)
        with grpc.insecure_channel(self.server) as channel:
            stub = registry_pb2_grpc.RegistryServiceStub(channel)
            stub.DeregisterInstance(registry_pb2.DeregisterInstanceRequest(instance=instance), timeout=10)
