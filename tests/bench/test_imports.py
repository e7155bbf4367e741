"""Benchmarks, chaos and attacks are used outside of the tests, and import none of them."""

from __future__ import annotations

import ast

import pytest

from atserving.local.examples import ROOT


@pytest.mark.parametrize("folder", ["bench", "reliability"])
def test_programs_import_no_tests(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "tests" for name in names), path
