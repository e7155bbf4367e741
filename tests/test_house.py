"""The plan of the house holds: imports point one way, and what is generated is up to date."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_imports_point_one_way() -> None:
    run = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout


def test_the_converter_imports_nothing_of_ours() -> None:
    for path in (ROOT / "evaluator" / "caffe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                package = ".".join(path.relative_to(ROOT).parent.parts)
                names = [importlib.util.resolve_name("." * node.level + (node.module or ""), package)]
            for name in names:
                ours = name.split(".")[0] in ("atserving", "gate", "registry", "evaluator")
                assert not ours or name.startswith("evaluator.caffe"), f"{path} imports {name}"


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("generated")
    subprocess.run([sys.executable, ROOT / "proto" / "generate.py", "--out", out], check=True)
    return out


def test_generated_files_are_up_to_date(generated: Path) -> None:
    fresh = {path.relative_to(generated): path.read_bytes() for path in generated.rglob("*") if path.is_file()}
    assert len(fresh) > 10
    stale = [str(name) for name, content in fresh.items() if (ROOT / name).read_bytes() != content]
    assert not stale, f"run `make proto`: {stale}"


def test_no_generated_file_is_left_over(generated: Path) -> None:
    patterns = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")
    for folder in ("atserving", "evaluator"):
        for pattern in patterns:
            for path in (ROOT / folder).rglob(pattern):
                assert (generated / path.relative_to(ROOT)).exists(), f"{path} has no definition in proto/"
