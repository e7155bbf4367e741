"""The Dockerfile: linted, compared with the manifests, and replayed without a container engine.

The stages of `evaluator-gpu` are not replayed, as its packages are too large. Their instructions are compared with
those of `evaluator`, and their packages are resolved.
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

from tests.k8s.checks.confined import CONTAINER
from tests.k8s.checks.flags import value_of
from tests.k8s.checks.listens import PORTS
from tests.k8s.checks.model import WORKLOADS, Container, Workload
from tests.k8s.dockerfile import Context, chain, read
from tests.k8s.manifests import ROOT
from tests.k8s.manifests import read as read_manifests
from tests.k8s.replay import Image, Replay

STAGES = read((ROOT / "Dockerfile").read_text())
CONTEXT = Context(ROOT)
IMAGES = ("gate", "registry", "evaluator", "evaluator-gpu")
# Each file of pins: the Python that it is for, and the extras of setup.cfg that it must satisfy.
PINS = {
    "core": ("3.11", ["oidc", "signatures", "tracing"]),
    "cpu": ("3.11", ["evaluator", "cpu", "signatures", "tracing"]),
    "gpu": ("3.12", ["evaluator", "gpu", "signatures", "tracing"]),
}
FILES = {"LICENSE", "README.md", "pyproject.toml", "setup.cfg"}
FOLDERS = {"docker", "atserving", "evaluator", "gate", "k8s", "registry"}

_BIN = Path(sys.prefix) / "bin"
each_image = pytest.mark.parametrize("target", IMAGES)


def pins(name: str) -> dict[str, str]:
    """Return the pinned versions by package."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / f"docker/{name}.txt").read_text(), re.MULTILINE))


def variables(target: str) -> dict[str, str]:
    """Return the variables that an image sets."""
    found = [each.pairs() for stage in chain(STAGES, target) for each in stage.all("ENV")]
    return {key: value for each in found for key, value in each.items()}


def container(target: str) -> Container:
    """Return the manifests' container of an image. The GPU's image runs in the container of the CPU's."""
    image = f"atserving/{target.removesuffix('-gpu')}:"
    files = [path for folder in ("base", "evaluator") for path in sorted((ROOT / "k8s" / folder).glob("*.yaml"))]
    documents = [each for path in files for each in read_manifests(path.read_text())]
    workloads = [Workload(each) for each in documents if each["kind"] in WORKLOADS]
    (found,) = [each for one in workloads for each in one.containers if each.spec["image"].startswith(image)]
    return found


def test_hadolint_finds_nothing() -> None:
    lint = [str(_BIN / "hadolint"), "--failure-threshold", "style", "Dockerfile"]
    done = subprocess.run(lint, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@each_image
def test_an_image_listens_on_the_ports_that_it_exposes_and_the_manifests_declare(target: str) -> None:
    exposed = {int(port) for stage in chain(STAGES, target) for each in stage.all("EXPOSE") for port in each.words()}
    declared = container(target)
    assert exposed == {each["containerPort"] for each in declared.ports}
    component = target.removesuffix("-gpu")
    env = [{"name": name, "value": value} for name, value in variables(target).items()]
    alone = Container(target, {"name": target, "env": env})
    for flag, port in PORTS[component].items():
        address = value_of(alone, component, flag)
        # A registry publishes releases on the port of its other calls unless a flag separates them.
        assert address == f"0.0.0.0:{declared.number(port)}" or (flag, address) == ("listen-operators", None)


@each_image
def test_an_image_runs_as_the_user_of_the_manifests(target: str) -> None:
    (user,) = [each.value for stage in chain(STAGES, target) for each in stage.all("USER")]
    assert int(user.partition(":")[0]) in CONTAINER["securityContext.runAsUser"]


def test_a_build_sees_the_files_that_it_needs_and_no_others() -> None:
    seen = CONTEXT.files()
    assert {path.parts[0] for path in seen} == FILES | FOLDERS
    assert Path("gate/__main__.py") in seen
    assert not [path for path in seen if "__pycache__" in path.parts]


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
    def commands(*names: str) -> list[str]:
        found = [each for name in names for each in STAGES[name].instructions if each.keyword in {"RUN", "COPY"}]
        texts = [f"{each.flags} {re.sub(r' +', ' ', each.value)}" for each in found]
        return [text.replace("python3 -m venv", "python -m venv") for text in texts if "apt-get" not in text]

    uv, *on_a_gpu = commands("gpu-packages", "gpu-project", "evaluator-gpu")
    assert uv == "{'from': 'build'} /usr/local/bin/uv /usr/local/bin/"
    renamed = [text.replace("gpu.txt", "cpu.txt").replace("gpu-packages", "cpu-packages") for text in on_a_gpu]
    on_a_cpu = commands("cpu-packages", "project", "evaluator")
    assert [text.replace("gpu-project", "project") for text in renamed] == on_a_cpu
    more = {"CUDA_CACHE_PATH": "/tmp/cuda"}
    assert variables("evaluator-gpu") == variables("evaluator") | more
    assert variables("gpu-packages").items() <= variables("cpu-packages").items()


def _on_linux(python: str) -> list[str]:
    return ["--python-version", python, "--python-platform", "x86_64-unknown-linux-gnu"]


@pytest.fixture(scope="module")
def index() -> None:
    """Skips the tests where the package index cannot be reached."""
    command = [str(_BIN / "uv"), "pip", "compile", "--quiet", "-"]
    done = subprocess.run(command, input="click", capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")


@pytest.mark.usefixtures("index")
def test_pins_are_the_packages_that_setup_cfg_needs(tmp_path: Path) -> None:
    """Resolving them again, without upgrades, changes no file; the GPU's included."""
    # uv writes the project's metadata anew, which commands of other tests read in the checkout.
    copy = tmp_path / "checkout"
    copy.mkdir()
    for name in (*FILES, "Makefile"):
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    make = ["make", "-o", f"{sys.prefix}/installed", "pins", "UPGRADE=", f"VENV={sys.prefix}"]
    done = subprocess.run(make, cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for path in (ROOT / "docker").iterdir():
        assert (copy / "docker" / path.name).read_text() == path.read_text()


@pytest.mark.usefixtures("index")
def test_the_base_for_gpus_has_the_cuda_that_onnxruntime_is_built_for() -> None:
    """onnxruntime loads the libraries of one CUDA only: its extras say which, and the base image has them."""
    wanted = f"onnxruntime-gpu[cuda,cudnn]=={pins('gpu')['onnxruntime-gpu']}"
    command = [str(_BIN / "uv"), "pip", "compile", "--quiet", *_on_linux(PINS["gpu"][0]), "-"]
    done = subprocess.run(command, input=wanted, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (cuda,) = re.findall(r"^nvidia-cuda-runtime(?:-cu\d+)?==(\d+)\.", done.stdout, re.MULTILINE)
    assert STAGES["gpu-base"].base.startswith(f"nvidia/cuda:{cuda}.")


# Installing the packages takes a minute, and several on a busy machine.
replayed = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def replay(index: None) -> Iterator[Replay]:
    with tempfile.TemporaryDirectory(prefix="images-") as name:
        yield Replay(STAGES, CONTEXT, ROOT, Path(name))


@pytest.fixture(params=["gate", "registry", "evaluator"])
def image(request: pytest.FixtureRequest, replay: Replay) -> Iterator[Image]:
    with replay.image(request.param) as image:
        before = _files(image.root)
        yield image
        # The test changed no file, so the image runs on a read-only root.
        assert _files(image.root) == before


def _files(root: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in root.rglob("*") if not path.is_dir()}


@replayed
def test_an_image_has_its_pins_and_the_project_and_nothing_else(image: Image) -> None:
    """No installer, source tree, cache or wheel is left in it."""
    name = image.entrypoint[-1]
    code = f"""
import sys, importlib.metadata, importlib.util, {name}
print({name}.__file__, {name}.__cached__)
print(*(each.name.lower().replace("_", "-") for each in importlib.metadata.distributions()))
print(importlib.util.find_spec("pip"))
"""
    done = image.run(entrypoint=["python", "-c", code])
    assert done.returncode == 0, done.stderr
    module, packages, installer = done.stdout.splitlines()
    source, compiled = (Path(each) for each in module.split())
    assert source.is_relative_to(image.root / "opt/atserving")
    assert compiled.exists()
    assert sorted(packages.split()) == sorted([*pins("cpu" if name == "evaluator" else "core"), "atserving"])
    assert installer == "None"
    # The base image's Python is in usr.
    assert sorted(str(each.relative_to(image.root)) for each in image.root.glob("*/*")) == [
        "opt/atserving",
        "usr/local",
    ]


@replayed
def test_an_image_runs_its_entry_point_and_the_command(image: Image) -> None:
    done = image.run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"Usage: {image.entrypoint[-1]} [OPTIONS]")
    done = image.run("--version", entrypoint=["atserving"])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("atserving, version ")


@replayed
def test_the_command_fills_the_template_that_is_installed(replay: Replay) -> None:
    arguments = ["k8s", "evaluator", "digits", "v1", "--gpu", "--tls"]
    expected = subprocess.run([_BIN / "atserving", *arguments], capture_output=True, text=True, check=True).stdout
    with replay.image("gate") as image:
        assert image.run(*arguments, entrypoint=["atserving"]).stderr.startswith("atserving: k8s needs the package ")
        # With the packages that the command needs, and without the checkout.
        packages = image.environment | {"PYTHONPATH": sysconfig.get_path("purelib")}
        done = replace(image, environment=packages).run(*arguments, entrypoint=["atserving"])
    assert (done.stdout, done.stderr) == (expected, "")


@replayed
@pytest.mark.parametrize(
    ("target", "flags", "message"),
    [
        ("gate", ["--http", "127.0.0.1:0"], "gate: no config within 0.2 s: "),
        (
            "evaluator",
            ["--app", "digits", "--version", "v1", "--http", "127.0.0.1:0"],
            "evaluator: no registry within 0.2 s: ",
        ),
    ],
)
def test_a_service_without_a_registry_fails_with_one_line(
    replay: Replay, target: str, flags: list[str], message: str
) -> None:
    with replay.image(target) as image:
        done = image.run(*flags, "--listen", "127.0.0.1:0", "--registry", "127.0.0.1:1", "--wait", "0.2")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(message)


@replayed
def test_the_evaluator_runs_a_net(replay: Replay) -> None:
    tar, image_file = ROOT / "examples/digits/digits-v1.tar", ROOT / "examples/digits/images/7.png"
    with replay.image("evaluator") as image:
        done = image.run("check", str(tar), "--image", str(image_file))
    assert done.returncode == 0, done.stderr
    assert re.search(r"7\.png:\n +index +class +score\n +7 ", done.stdout)


@replayed
def test_the_registry_serves(replay: Replay) -> None:
    with (
        replay.image("registry") as image,
        image.popen("--etcd", "127.0.0.1:1", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0") as process,
    ):
        try:
            assert process.stderr
            line = next(line for line in process.stderr if '"service starting"' in line)
            (port,) = re.findall(r'"port": ?(\d+)', line)
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                health = health_pb2_grpc.HealthStub(channel)
                answer = health.Check(health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=True)
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        finally:
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 0
