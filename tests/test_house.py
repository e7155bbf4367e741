"""Import contracts see a forbidden import, instances start light, images have their tag, generated files are current.

`make lint` checks the contracts on the code itself.
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from atserving import __version__
from atserving.local import envoy_tls, envoy_tracing

ROOT = Path(__file__).resolve().parents[1]


BREAKS = {
    "gate/edge.py": "import registry.view",
    "atserving/uris.py": "import gate.edge",
    "evaluator/serving/capacity.py": "import numpy",
    "evaluator/fetching/unpack.py": "import evaluator.worker.schedule",
    "evaluator/worker/request_codec.py": "import grpc",
    "evaluator/images/png_data.py": "import evaluator.runtime.device",
    "evaluator/worker/progress.py": "import evaluator.worker.channel",
    "evaluator/caffe/wire.py": "import atserving.errors",
}
"""One forbidden import for each import contract, in the order of the contracts."""


def linter() -> dict[str, Any]:
    """The settings of import-linter."""
    settings: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    return settings


def test_the_import_contracts_cover_every_service() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    packages = {pattern.rstrip("*") for pattern in setup["options.packages.find"]["include"].split()}
    assert set(linter()["root_packages"]) == packages
    (independence,) = (each for each in linter()["contracts"] if each["type"] == "independence")
    assert set(independence["modules"]) == packages - {"atserving"}


def test_a_forbidden_import_breaks_its_contract(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in linter()["root_packages"]:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for path, line in BREAKS.items():
        with (tmp_path / path).open("a") as file:
            file.write(f"\n{line}\n")
    run = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    report = re.sub(r"\x1b\[[\d;]*m", "", run.stdout)
    kept = [each["name"] for each in linter()["contracts"] if f"{each['name']} BROKEN" not in report]
    assert not kept, run.stdout


def test_an_instance_starts_without_what_few_need() -> None:
    """An HTTP client costs time and memory, and only some requests need it."""
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, evaluator.__main__; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert "evaluator.fetching.resources" in loaded
    assert not {"aiohttp", "aiodns", "yarl", "pydantic", "evaluator.fetching.qiniu"} & set(loaded)


def test_images_are_tagged_with_the_version() -> None:
    command = ["make", "--silent", "images", "ENGINE=echo", "IMAGES=gate"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"--tag atserving/gate:{__version__} " in built


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


def test_the_bootstrap_with_tls_is_made_of_that_without() -> None:
    made = envoy_tls.with_tls((ROOT / "envoy" / "envoy.yaml").read_text())
    assert (ROOT / "envoy" / "envoy-tls.yaml").read_text() == made, "run make envoy"


def test_the_bootstraps_with_tracing_are_made_of_those_without() -> None:
    for name in envoy_tracing.NAMES:
        assert (envoy_tracing.COMPONENT / name).read_text() == envoy_tracing.for_kubernetes(name), "run make envoy"


def test_no_generated_file_is_left_over(generated: Path) -> None:
    patterns = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")
    for folder in ("atserving", "evaluator"):
        for pattern in patterns:
            for path in (ROOT / folder).rglob(pattern):
                assert (generated / path.relative_to(ROOT)).exists(), f"{path} has no definition in proto/"
