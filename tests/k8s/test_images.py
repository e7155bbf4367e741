"""The Dockerfile: linted, checked for what no linter sees, and replayed without an engine.

`evaluator-gpu` is not replayed: its packages are too large for that. Its instructions are those of `evaluator`, and its
packages are resolved.
"""

from __future__ import annotations

import configparser
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from packaging.requirements import Requirement

from tests.k8s.dockerfile import Context, chain, read
from tests.k8s.replay import Image, Replay

ROOT = Path(__file__).parents[2]
STAGES = read((ROOT / "Dockerfile").read_text())
CONTEXT = Context(ROOT)
FINAL = ["gate", "registry", "evaluator", "evaluator-gpu"]
# Each file of pins with the Python that it is for, and what of setup.cfg it has to satisfy.
PINS = {"core": ("3.11", []), "cpu": ("3.11", ["evaluator", "cpu"]), "gpu": ("3.12", ["evaluator", "gpu"])}

_BIN = Path(sys.prefix) / "bin"
final = pytest.mark.parametrize("target", FINAL)


def pins(name: str) -> dict[str, str]:
    """Versions by package."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / f"docker/{name}.txt").read_text(), re.MULTILINE))


def test_hadolint_has_nothing_to_say() -> None:
    lint = [str(_BIN / "hadolint"), "--failure-threshold", "style", "Dockerfile"]
    done = subprocess.run(lint, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_base_images_have_full_versions() -> None:
    bases = {stage.base for stage in STAGES.values()} - set(STAGES)
    assert bases
    for base in bases:
        assert re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+-[\w.-]+(@sha256:[0-9a-f]{64})?", base)


@final
def test_an_image_runs_as_a_numbered_user_without_a_shell_in_between(target: str) -> None:
    stages = chain(STAGES, target)
    users = [each.value for stage in stages for each in stage.all("USER")]
    assert users[-1:] == ["10001:10001"]
    (entrypoint,) = [each for stage in stages for each in stage.all("ENTRYPOINT")]
    assert entrypoint.words() == ["python", "-m", target.removesuffix("-gpu")]
    assert entrypoint.value.startswith("[")
    assert any(stage.all("EXPOSE") for stage in stages)
    assert {"org.opencontainers.image.title", "org.opencontainers.image.licenses"} <= {
        name for stage in stages for each in stage.all("LABEL") for name in each.pairs()
    }


@final
def test_an_image_has_no_more_than_its_base_its_packages_and_the_project(target: str) -> None:
    """So that no compiler, cache, source tree or installer comes with it."""
    stages = chain(STAGES, target)
    for stage in stages:
        for each in stage.all("COPY"):
            assert "from" in each.flags
        for each in stage.all("RUN"):
            update, install, clean = (part.strip() for part in each.value.split("&&"))
            assert (update, clean) == ("apt-get update", "rm -rf /var/lib/apt/lists/*")
            installed = re.fullmatch("apt-get install --yes --no-install-recommends (.+)", install)
            assert installed
            assert set(installed[1].split()) <= {"ca-certificates", "python3"}
    copied = {each.value for stage in stages for each in stage.all("COPY")}
    assert copied == {"/opt/atserving /opt/atserving", "/opt/project /opt/atserving"}


def test_every_file_that_is_copied_exists_and_is_let_through() -> None:
    sources = [each.words()[0] for stage in STAGES.values() for each in stage.all("COPY") if "from" not in each.flags]
    assert len(sources) >= 5
    for source in sources:
        assert CONTEXT.files(source), source


def test_only_what_the_images_are_built_from_is_let_through() -> None:
    assert CONTEXT.rules[0] == "*"
    seen = CONTEXT.files()
    assert {path.parts[0] for path in seen} <= {rule.removeprefix("!") for rule in CONTEXT.rules if rule[0] == "!"}
    assert Path("gate/__main__.py") in seen
    assert not [path for path in seen if "__pycache__" in path.parts or path.parts[0] in {"tests", ".git", ".venv"}]


@pytest.mark.parametrize("name", PINS)
def test_pins_are_within_the_ranges_of_setup_cfg(name: str) -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].splitlines()
    for extra in PINS[name][1]:
        lines += config["options.extras_require"][extra].splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith(("#", "atserving"))]
    assert wanted
    pinned = pins(name)
    for each in wanted:
        assert each.specifier.contains(pinned[each.name]), each


def test_gate_and_registry_get_no_package_of_the_evaluator() -> None:
    assert not pins("core").keys() & {"numpy", "onnx", "onnxruntime", "opencv-python-headless", "pillow", "aiohttp"}


def test_the_gpu_stages_do_what_the_cpu_stages_do() -> None:
    """The latter are replayed below, the former are not."""

    def commands(*names: str) -> list[str]:
        found = [each for name in names for each in STAGES[name].instructions if each.keyword in {"RUN", "COPY"}]
        texts = [f"{each.flags} {re.sub(r' +', ' ', each.value)}" for each in found]
        return [text.replace("python3 -m venv", "python -m venv") for text in texts if "apt-get" not in text]

    def as_on_a_cpu(texts: list[str]) -> list[str]:
        renamed = [text.replace("gpu.txt", "cpu.txt").replace("gpu-packages", "cpu-packages") for text in texts]
        return [text.replace("gpu-project", "project") for text in renamed]

    def variables(name: str) -> list[dict[str, str]]:
        found = [each.pairs() for stage in chain(STAGES, name) for each in stage.all("ENV")]
        return [{key: value for key, value in each.items() if not key.startswith("CUDA_")} for each in found]

    on_a_cpu = commands("cpu-packages", "project", "evaluator")
    assert as_on_a_cpu(commands("gpu-packages", "gpu-project", "evaluator-gpu")) == on_a_cpu
    assert variables("evaluator-gpu") == variables("evaluator")
    assert variables("gpu-packages") == variables("cpu-packages")


@pytest.fixture(scope="module")
def index() -> None:
    """Skips where the package index can't be reached."""
    command = [str(_BIN / "uv"), "pip", "compile", "--quiet", "-"]
    done = subprocess.run(command, input="click", capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the package index can't be reached: {done.stderr.strip().splitlines()[-1]}")


@pytest.mark.usefixtures("index")
def test_pins_are_all_that_is_needed_and_no_more(tmp_path: Path) -> None:
    """Resolved anew, without renewing anything, they stay as they are: for GPUs too."""
    shutil.copytree(ROOT / "docker", tmp_path / "docker")
    make = [
        "make",
        "-o",
        f"{sys.prefix}/installed",
        "pins",
        "UPGRADE=",
        f"PINS={tmp_path}/docker",
        f"VENV={sys.prefix}",
    ]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for path in (ROOT / "docker").iterdir():
        assert (tmp_path / "docker" / path.name).read_text() == path.read_text()


@pytest.fixture(scope="module")
def replay(index: None) -> Iterator[Replay]:
    with tempfile.TemporaryDirectory(prefix="images-") as folder:
        yield Replay(STAGES, CONTEXT, ROOT, Path(folder))


@pytest.fixture(params=["gate", "registry", "evaluator"])
def image(request: pytest.FixtureRequest, replay: Replay) -> Iterator[Image]:
    with replay.image(request.param) as image:
        before = _files(image.root)
        yield image
        # A read-only root would have been no hindrance.
        assert _files(image.root) == before


def _files(root: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in root.rglob("*") if not path.is_dir()}


def test_its_environment_is_what_is_pinned_and_the_project(image: Image) -> None:
    name = image.entrypoint[-1]
    code = f"""
import sys, importlib.metadata, importlib.util, {name}
print({name}.__file__, {name}.__cached__)
print(*(each.name.lower().replace("_", "-") for each in importlib.metadata.distributions()))
print(importlib.util.find_spec("pip"))
"""
    done = image.run(entrypoint=["python", "-c", code])
    assert done.returncode == 0, done.stderr
    place, packages, installer = done.stdout.splitlines()
    source, compiled = (Path(each) for each in place.split())
    assert source.is_relative_to(image.root / "opt/atserving")
    assert compiled.exists()
    assert sorted(packages.split()) == sorted([*pins("cpu" if name == "evaluator" else "core"), "atserving"])
    assert installer == "None"


def test_its_entry_point_explains_itself(image: Image) -> None:
    done = image.run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: {image.entrypoint[-1]} [OPTIONS]")


def test_its_command_is_there_too(image: Image) -> None:
    done = image.run("--version", entrypoint=["atserving"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("atserving, version ")


def test_its_command_fills_the_template_that_was_installed(replay: Replay) -> None:
    arguments = ["k8s", "evaluator", "digits", "v1", "--gpu"]
    expected = subprocess.run([_BIN / "atserving", *arguments], capture_output=True, text=True, check=True).stdout
    with replay.image("gate") as image:
        assert image.run(*arguments, entrypoint=["atserving"]).stderr.startswith("atserving: k8s needs the package ")
        # With what the command needs beside the project, and without the checkout.
        packages = image.environment | {"PYTHONPATH": sysconfig.get_path("purelib")}
        done = replace(image, environment=packages).run(*arguments, entrypoint=["atserving"])
    assert (done.stdout, done.stderr) == (expected, "")


@pytest.mark.parametrize(
    ("target", "flags", "message"),
    [
        ("gate", [], "gate: no config within 0.2 s: "),
        ("evaluator", ["--app", "digits", "--version", "v1"], "evaluator: no registry within 0.2 s: "),
    ],
)
def test_without_a_registry_it_says_so(replay: Replay, target: str, flags: list[str], message: str) -> None:
    with replay.image(target) as image:
        done = image.run(*flags, "--registry", "127.0.0.1:1", "--wait", "0.2")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(message)


def test_the_evaluator_runs_a_net(replay: Replay) -> None:
    tar, image_file = ROOT / "examples/digits/digits-v1.tar", ROOT / "examples/digits/images/7.png"
    with replay.image("evaluator") as image:
        done = image.run("check", str(tar), "--image", str(image_file))
    assert done.returncode == 0, done.stderr
    assert '7.png: {"confidences": ' in done.stdout


def test_the_registry_serves(replay: Replay) -> None:
    with (
        replay.image("registry") as image,
        image.popen("--etcd", "127.0.0.1:1", "--listen", "127.0.0.1:0") as process,
    ):
        try:
            assert process.stderr
            line = next(line for line in process.stderr if '"listening"' in line)
            (port,) = re.findall(r'"port": ?(\d+)', line)
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                health = health_pb2_grpc.HealthStub(channel)
                answer = health.Check(health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=True)
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        finally:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 0
