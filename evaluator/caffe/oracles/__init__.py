"""Other engines that run Caffe nets, each in a process of its own: on a net they cannot run, they may abort.

Caffe itself (BVLC's) ends its process where a check fails; OpenCV 4 has been seen to crash. What such a program is
given and gives back is files of a folder: `request.json`, `in_<i>.npy` and `out_<i>.npy`.
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
from .differences import unfit, unfit_caffe

Float32 = NDArray[np.float32]

_PROGRAMS = {"Caffe": "caffe_program.py", "OpenCV": "opencv_program.py"}
_MISSING = 3
_TIMEOUT_S = 600


@dataclass(frozen=True)
class Answer:
    """What an oracle said: its outputs by their name in the model, or the reason why there are none.

    Attributes:
        oracle: "Caffe" or "OpenCV", with the version where it is known.
        outputs: by name; an output that the oracle does not have is missing.
        reason: why it was not there, could not run the net, or cannot judge it; "" where it ran.
    """

    oracle: str
    outputs: Mapping[str, Float32]
    reason: str = ""


@dataclass(frozen=True)
class Question:
    """A net, what to feed it, and which of its blobs to ask for.

    Attributes:
        feeds: by input blob.
        outputs: the model's outputs in the order of the plan's.
    """

    prototxt: Path
    caffemodel: Path
    plan: NetPlan
    feeds: Mapping[str, Float32]
    outputs: tuple[str, ...]


def ask_caffe(question: Question, python: str = "") -> Answer:
    """BVLC Caffe's answer; `python` is an interpreter that can import caffe, if this one cannot.

    It is not asked about a loss, in whose place the model has the softmax.
    """
    reason = unfit_caffe(question.plan)
    return Answer("Caffe", {}, reason) if reason else _ask("Caffe", python or sys.executable, question)


def ask_opencv(question: Question) -> Answer:
    """OpenCV's answer. It is not asked about layers that it is known to compute otherwise than Caffe."""
    reason = unfit(question.plan)
    return Answer("OpenCV", {}, reason) if reason else _ask("OpenCV", sys.executable, question)


def _ask(oracle: str, python: str, question: Question) -> Answer:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder, question)
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
            return Answer(oracle, {}, f"{python}: {error.strerror}")
        except subprocess.TimeoutExpired:
            return Answer(oracle, {}, f"could not run the net in {_TIMEOUT_S} s")
        if done.returncode == _MISSING:
            return Answer(oracle, {}, "is not installed")
        if done.returncode != 0:
            return Answer(oracle, {}, f"could not run the net: {_complaint(done)}")
        return _read(folder, oracle, question)


def _write(folder: Path, question: Question) -> None:
    makers = {ref: (layer.spec.name, index) for layer in question.plan.layers for index, ref in enumerate(layer.tops)}
    request = {
        "prototxt": str(question.prototxt.resolve()),
        "caffemodel": str(question.caffemodel.resolve()),
        "inputs": list(question.feeds),
        "outputs": [(ref.name, *makers[ref]) for ref in question.plan.outputs],
    }
    (folder / "request.json").write_text(json.dumps(request))
    for i, array in enumerate(question.feeds.values()):
        np.save(folder / f"in_{i}.npy", array)


def _read(folder: Path, oracle: str, question: Question) -> Answer:
    version = (folder / "version").read_text()
    found = {
        name: np.load(path) for i, name in enumerate(question.outputs) if (path := folder / f"out_{i}.npy").is_file()
    }
    return Answer(f"{oracle} {version}", found)


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The line that says why: Caffe's failed check, an exception, or the signal that ended it."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip() and "***" not in line]
    checks = [line for line in lines if "Check failed" in line or line.startswith("F0")]
    if checks:
        return checks[0].split("] ", 1)[-1]
    errors = [line for line in lines if "rror:" in line]
    if done.returncode < 0 and not errors:
        return f"it was ended by signal {-done.returncode}"
    return (errors or lines or [f"exit status {done.returncode}"])[-1]
