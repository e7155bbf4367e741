"""Generates the Python stubs, their type stubs and Envoy's descriptor set from the definitions in this folder.

    python proto/generate.py [--out DIR]

Without ``--out``, the script updates the generated files of the project. A test generates them into an empty folder and
compares.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import google.api
import grpc_tools
from grpc_tools import protoc

PROTO = Path(__file__).resolve().parent
ROOT = PROTO.parent
DESCRIPTOR_SET = "envoy/atserving.binpb"
# What Envoy transcodes, or passes on.
_TRANSCODED = [
    "atserving/admin/v1/admin.proto",
    "atserving/v1/edge.proto",
    "atserving/v1/serving.proto",
]


def generate(out: Path) -> None:
    """Write all generated files below ``out``, in the project's layout. Raises SystemExit if protoc fails."""
    # protoc looks for mypy-protobuf's plugins on PATH; they are installed beside this interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    includes = [
        f"-I{PROTO}",
        f"-I{Path(next(iter(google.api.__path__))).parents[1]}",
        f"-I{Path(next(iter(grpc_tools.__path__))) / '_proto'}",
    ]
    definitions = sorted(PROTO.glob("atserving/**/*.proto")) + sorted(PROTO.glob("evaluator/**/*.proto"))
    services = [str(path.relative_to(PROTO)) for path in definitions if "\nservice " in path.read_text()]
    messages = [str(path.relative_to(PROTO)) for path in definitions if "\nservice " not in path.read_text()]
    python = [f"--python_out={out}", f"--mypy_out=quiet:{out}"]
    grpc = [f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}"]
    (out / DESCRIPTOR_SET).parent.mkdir(parents=True, exist_ok=True)
    descriptor_set = ["--include_imports", f"--descriptor_set_out={out / DESCRIPTOR_SET}"]
    for arguments in (
        [*python, *grpc, *services],
        [*python, *messages] if messages else [],
        [*descriptor_set, *_TRANSCODED],
    ):
        if arguments and protoc.main(["protoc", *includes, *arguments]) != 0:
            raise SystemExit(f"protoc failed: {' '.join(arguments)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT, help="the output folder (default: the project)")
    generate(parser.parse_args().out)


if __name__ == "__main__":
    main()
