"""Run a Caffe net in other engines, the oracles: BVLC Caffe and OpenCV 4.

Each oracle runs in a process of its own, because it can abort: Caffe ends its process after a failed check, and OpenCV
can crash. Such a program reads `request.json` and `in_<i>.npy` from a folder and writes `out_<i>.npy` and `version` to
it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..net_plan import NetPlan
from .differences import caffe_difference, opencv_difference

Float32 = NDArray[np.float32]

_PROGRAMS = {"Caffe": "caffe_program.py", "OpenCV": "opencv_program.py"}
# The exit status of a program that cannot import its engine.
_NOT_INSTALLED = 3
_TIMEOUT_S = 600


@dataclass(frozen=True)
class OracleResult:
    """The result of an oracle: its outputs, or the reason why it did not run.

    Attributes:
        oracle: "Caffe" or "OpenCV", with the version if the oracle ran.
        outputs: float32 arrays by the output's name in the model, without outputs that the oracle does not know.
        reason: why the oracle is not installed, could not run the net, or cannot judge it; "" if it ran.
    """

    oracle: str
    outputs: Mapping[str, Float32]
    reason: str = ""


@dataclass(frozen=True)
class OracleRequest:
    """A net with its input.

    Attributes:
        feeds: float32 arrays by input blob.
        outputs: the names of the model's outputs, in the order of `plan.outputs`.
    """

    prototxt: Path
    caffemodel: Path
    plan: NetPlan
    feeds: Mapping[str, Float32]
    outputs: tuple[str, ...]


def run_caffe(request: OracleRequest, python: str = "") -> OracleResult:
    """Run the net in BVLC Caffe, unless the model differs from it on purpose; see `caffe_difference`.

    Args:
        python: an interpreter that can import caffe; "" for the running one.
    """
    reason = caffe_difference(request.plan)
    return OracleResult("Caffe", {}, reason) if reason else _run("Caffe", python or sys.executable, request)


def run_opencv(request: OracleRequest) -> OracleResult:
    """Run the net in OpenCV, unless OpenCV is known to differ from Caffe on one of the layers."""
    reason = opencv_difference(request.plan)
    return OracleResult("OpenCV", {}, reason) if reason else _run("OpenCV", sys.executable, request)


def _run(oracle: str, python: str, request: OracleRequest) -> OracleResult:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, request)
        program = Path(__file__).with_name(_PROGRAMS[oracle])
        try:
            done = subprocess.run(
                [python, str(program), str(folder)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT_S,
                check=False,
            )
        except OSError as error:
            return OracleResult(oracle, {}, f"{python}: {error.strerror}")
        except subprocess.TimeoutExpired:
            return OracleResult(oracle, {}, f"could not run the net in {_TIMEOUT_S} s")
        if done.returncode == _NOT_INSTALLED:
            return OracleResult(oracle, {}, "is not installed")
        if done.returncode != 0:
            return OracleResult(oracle, {}, f"could not run the net: {_failure_reason(done)}")
        return _read(folder, oracle, request)


def _write(folder: Path, request: OracleRequest) -> None:
    producers = {ref: (layer.spec.name, index) for layer in request.plan.layers for index, ref in enumerate(layer.tops)}
    content = {
        "prototxt": str(request.prototxt.resolve()),
        "caffemodel": str(request.caffemodel.resolve()),
        "inputs": list(request.feeds),
        "outputs": [(ref.name, *producers[ref]) for ref in request.plan.outputs],
    }
    (folder / "request.json").write_text(json.dumps(content))
    for i, array in enumerate(request.feeds.values()):
        np.save(folder / f"in_{i}.npy", array)


def _read(folder: Path, oracle: str, request: OracleRequest) -> OracleResult:
    version = (folder / "version").read_text()
    found = {
        name: np.load(path) for i, name in enumerate(request.outputs) if (path := folder / f"out_{i}.npy").is_file()
    }
    return OracleResult(f"{oracle} {version}", found)


def _failure_reason(done: subprocess.CompletedProcess[str]) -> str:
    """Return the reason for the failure: Caffe's failed check, an exception's message, or the signal."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip() and "***" not in line]
    checks = [line for line in lines if "Check failed" in line or line.startswith("F0")]
    if checks:
        return checks[0].split("] ", 1)[-1]
    errors = [line for line in lines if "rror:" in line]
    if done.returncode < 0 and not errors:
        return f"killed by signal {-done.returncode}"
    return (errors or lines or [f"exit status {done.returncode}"])[-1]
