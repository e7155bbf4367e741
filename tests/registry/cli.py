"""Run `atserving` at a registry, as an operator does, beside instances that a test registers."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import orjson

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
        """Start a command; its server and actor are given by variables."""
        variables = {"ATSERVING_SERVER": self.server, "ATSERVING_ACTOR": "ada@desk", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [ATSERVING, *arguments],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": os.environ["PATH"], **variables, **environment},
        )

    def run(self, *arguments: str, **environment: str) -> Ended:
        """Run a command to its end."""
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=60)
        return Ended(process.returncode, out, err)

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
