"""A conversion's result for people and for programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .summary import Summary
from .verify import SEED, TOLERANCE, Judgement, Verification


def as_json(output: Path, summary: Summary, verification: Verification | None) -> dict[str, Any]:
    """Everything, in values that JSON has: shapes as lists, sizes in bytes, a difference that is not known as null."""
    fields = asdict(summary)
    nodes = fields.pop("layers")
    result = {"output": str(output), **fields, "layers": _layers(summary), "nodes": nodes}
    if verification is not None:
        result["verification"] = {
            "seed": SEED,
            "tolerance": TOLERANCE,
            "agrees": verification.agrees,
            "inputs": dict(verification.shapes),
            "outputs": dict(verification.outputs),
            "oracles": [_judgement(judgement) for judgement in verification.judgements],
        }
    return result


def _judgement(judgement: Judgement) -> dict[str, Any]:
    return {
        "oracle": judgement.oracle,
        "status": _status(judgement),
        "reason": judgement.reason,
        "outputs": [{**asdict(one), "agrees": one.agrees} for one in judgement.comparisons],
    }


def _status(judgement: Judgement) -> str:
    if judgement.reason:
        return "not used"
    return "agrees" if judgement.agrees else "disagrees"


def _layers(summary: Summary) -> int:
    return int(summary.metadata["caffe.layers"])


def as_text(output: Path, summary: Summary, verification: Verification | None) -> str:
    """Some lines for a terminal."""
    facts = [
        *_named("inputs", summary.inputs),
        *_named("outputs", summary.outputs),
        ("layers", f"{_layers(summary)}, as {len(summary.layers)} nodes"),
        ("parameters", f"{summary.parameters:,}"),
        ("multiply-adds", f"{summary.multiply_adds:,} an image"),
        ("opset", str(summary.opset)),
        ("size", f"{summary.size:,} bytes"),
    ]
    lines = [str(output), *(f"  {name:<14}{value}" for name, value in facts)]
    if verification is not None:
        lines += _verification(verification)
    return "\n".join(_printable(line) for line in lines)


def _verification(verification: Verification) -> list[str]:
    lines = [f"ran in onnxruntime on random input (seed {SEED}): {_shapes(verification.shapes.items())}"]
    used = [judgement for judgement in verification.judgements if not judgement.reason]
    for judgement in verification.judgements:
        if judgement.reason:
            lines.append(f"{judgement.oracle} {judgement.reason}")
    for judgement in used:
        lines += [f"{judgement.oracle} {_status(judgement)}, to {TOLERANCE:g} of the largest value:"]
        rows = [("output", "shape", "largest difference", "")]
        for one in judgement.comparisons:
            difference = one.reason if one.difference is None else f"{one.difference:.1e}"
            shape = _shape(verification.outputs[one.output])
            rows.append((one.output, shape, difference, "agrees" if one.agrees else "DISAGREES"))
        lines += _table(rows)
    if not used:
        lines.append("there is no oracle to compare it with")
    return lines


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _named(what: str, shapes: Mapping[str, Sequence[int | str]]) -> list[tuple[str, str]]:
    """One a line, the first of them beside what they are."""
    return [(what if i == 0 else "", f"{name} {_shape(shape)}") for i, (name, shape) in enumerate(shapes.items())]


def _shapes(named: Iterable[tuple[str, Sequence[int | str]]]) -> str:
    return ", ".join(f"{name} {_shape(shape)}" for name, shape in named)


def _shape(shape: Sequence[int | str]) -> str:
    return "(" + ", ".join(str(dim) for dim in shape) + ")"


def _printable(line: str) -> str:
    """Names come from a file that anyone may have written, and go to a terminal."""
    return "".join(char if char.isprintable() else "?" for char in line)
