"""Format the result of a conversion as text or JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .summary import Summary
from .verify import SEED, TOLERANCE, Verdict, Verification


def as_json(output: Path, summary: Summary, verification: Verification | None) -> dict[str, Any]:
    """Return the whole report as JSON values: shapes as lists, sizes in bytes, an unknown difference as None."""
    fields = asdict(summary)
    nodes = fields.pop("layers")
    result = {"output": str(output), **fields, "layers": _layers(summary), "nodes": nodes}
    if verification is not None:
        result["verification"] = {
            "seed": SEED,
            "tolerance": TOLERANCE,
            "agrees": verification.agrees,
            "inputs": dict(verification.inputs),
            "outputs": dict(verification.outputs),
            "oracles": [_verdict(verdict) for verdict in verification.verdicts],
        }
    return result


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "oracle": verdict.oracle,
        "status": _status(verdict),
        "reason": verdict.reason,
        "outputs": [{**asdict(one), "agrees": one.agrees} for one in verdict.comparisons],
    }


def _status(verdict: Verdict) -> str:
    if verdict.reason:
        return "not used"
    return "agrees" if verdict.agrees else "disagrees"


def _layers(summary: Summary) -> int:
    return int(summary.metadata["caffe.layers"])


def as_text(output: Path, summary: Summary, verification: Verification | None) -> str:
    """Return a short report in lines for a terminal."""
    facts = [
        *_named("inputs", summary.inputs),
        *_named("outputs", summary.outputs),
        ("layers", f"{_layers(summary)}, as {len(summary.layers)} ONNX nodes"),
        ("parameters", f"{summary.parameters:,}"),
        ("multiply-adds", f"{summary.multiply_adds:,} per image"),
        ("opset", str(summary.opset)),
        ("size", f"{summary.size:,} bytes"),
    ]
    lines = [str(output), *(f"  {name:<14}{value}" for name, value in facts)]
    if verification is not None:
        lines += _verification(verification)
    return "\n".join(_printable(line) for line in lines)


def _verification(verification: Verification) -> list[str]:
    lines = [f"ran in onnxruntime on random input (seed {SEED}): {_shapes(verification.inputs.items())}"]
    used = [verdict for verdict in verification.verdicts if not verdict.reason]
    for verdict in verification.verdicts:
        if verdict.reason:
            lines.append(f"{verdict.oracle} {verdict.reason}")
    for verdict in used:
        lines += [f"{verdict.oracle} {_status(verdict)} (tolerance {TOLERANCE:g} of the largest value):"]
        rows = [("output", "shape", "largest difference", "")]
        for one in verdict.comparisons:
            difference = one.reason if one.difference is None else f"{one.difference:.1e}"
            shape = _shape(verification.outputs[one.output])
            rows.append((one.output, shape, difference, "agrees" if one.agrees else "DISAGREES"))
        lines += _table(rows)
    if not used:
        lines.append("no oracle could run this net, so nothing was compared")
    return lines


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _named(label: str, shapes: Mapping[str, Sequence[int | str]]) -> list[tuple[str, str]]:
    """Return one fact per shape; only the first carries the label."""
    return [(label if i == 0 else "", f"{name} {_shape(shape)}") for i, (name, shape) in enumerate(shapes.items())]


def _shapes(named: Iterable[tuple[str, Sequence[int | str]]]) -> str:
    return ", ".join(f"{name} {_shape(shape)}" for name, shape in named)


def _shape(shape: Sequence[int | str]) -> str:
    return "(" + ", ".join(str(dim) for dim in shape) + ")"


def _printable(line: str) -> str:
    """Replace control characters: names come from an untrusted file and are printed to a terminal."""
    return "".join(char if char.isprintable() else "?" for char in line)
