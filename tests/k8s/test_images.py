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

from tests.k8s import manifests
from tests.k8s.checks.model import WORKLOADS, Workload
from tests.k8s.dockerfile import Context, chain, read
from tests.k8s.replay import Image, Replay

ROOT = Path(__file__).parents[2]
STAGES = read((ROOT / "Dockerfile").read_text())
CONTEXT = Context(ROOT)
# Each image with the stages that it copies its packages and the project from.
FINAL = {
    "gate": ("core-packages", "project"),
    "registry": ("core-packages", "project"),
    "evaluator": ("cpu-packages", "project"),
    "evaluator-gpu": ("gpu-packages", "gpu-project"),
}
# Each file of pins with the Python that it is for, and what of setup.cfg it has to satisfy.
PINS = {"core": ("3.11", []), "cpu": ("3.11", ["evaluator", "cpu"]), "gpu": ("3.12", ["evaluator", "gpu"])}
# onnxruntime-gpu loads the libraries of one CUDA only. That of docker/gpu.txt wants 13: a test below asks its metadata.
BASES = {
    "base": r"python:3\.11\.\d+-slim-[a-z]+",
    "gpu-base": r"nvidia/cuda:13\.\d+\.\d+-cudnn-runtime-ubuntu24\.04",
}
FILES = {"LICENSE", "README.md", "pyproject.toml", "setup.cfg"}
FOLDERS = {"docker", "atserving", "evaluator", "gate", "k8s", "registry"}
# What an image consists of beyond its base. ADD would fetch and unpack, CMD add arguments to the entry point.
OF_AN_IMAGE = {"LABEL", "COPY", "USER", "ENV", "EXPOSE", "ENTRYPOINT"}
APT = "apt-get update && apt-get install --yes --no-install-recommends {} && rm -rf /var/lib/apt/lists/*"
# What a build may run, beside APT: packages come by hash and as wheels, the project without any that it depends on.
COMMANDS = [
    r"python3? -m venv( --without-pip)? /opt/(build|atserving)",
    r"(/opt/build/bin/pip|pip --python /opt/atserving/bin/python) install"
    r" --require-hashes --only-binary :all: --requirement docker/(build|core|cpu|gpu)\.txt",
    r"/opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /opt/wheels \.",
    r"pip --python /opt/atserving/bin/python install"
    r" --no-deps --no-warn-script-location --prefix /opt/project /opt/wheels/\*\.whl",
]

_BIN = Path(sys.prefix) / "bin"
final = pytest.mark.parametrize("target", FINAL)


def pins(name: str) -> dict[str, str]:
    """Versions by package."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / f"docker/{name}.txt").read_text(), re.MULTILINE))


def test_hadolint_has_nothing_to_say() -> None:
    lint = [str(_BIN / "hadolint"), "--failure-threshold", "style", "Dockerfile"]
    done = subprocess.run(lint, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def ports(target: str) -> dict[str, int]:
    """What the manifests declare for the containers of an image, by name; those of CPUs and GPUs have the same."""
    image = f"atserving/{target.removesuffix('-gpu')}:"
    files = [path for folder in ("base", "evaluator") for path in sorted((ROOT / "k8s" / folder).glob("*.yaml"))]
    documents = [each for path in files for each in manifests.read(path.read_text())]
    workloads = [Workload(each) for each in documents if each["kind"] in WORKLOADS]
    (container,) = [each for one in workloads for each in one.containers if each.spec["image"].startswith(image)]
    return {each["name"]: each["containerPort"] for each in container.ports}


def test_base_images_are_of_their_family_and_have_full_versions() -> None:
    bases = {name: stage.base for name, stage in STAGES.items() if stage.base not in STAGES}
    assert bases.keys() == BASES.keys()
    for name, base in bases.items():
        assert re.fullmatch(f"{BASES[name]}(@sha256:[0-9a-f]{{64}})?", base), base


def test_a_build_runs_nothing_but_the_installs_of_what_is_pinned() -> None:
    """As root, so that what is copied from it belongs to root too."""
    in_images = {stage.name for target in FINAL for stage in chain(STAGES, target)}
    for stage in STAGES.values():
        if stage.name not in in_images:
            assert {each.keyword for each in stage.instructions} <= {"RUN", "COPY", "ENV", "WORKDIR"}
        assert all(each.flags.keys() <= {"from"} for each in stage.all("COPY"))
    apt = {APT.format("ca-certificates python3"), APT.format("python3-pip")}
    for run in [each for stage in STAGES.values() for each in stage.all("RUN")]:
        assert not run.flags
        if " && ".join(run.commands()) not in apt:
            for command in run.commands():
                assert any(re.fullmatch(each, command) for each in COMMANDS), command


@final
def test_an_image_runs_as_a_numbered_user_without_a_shell_in_between(target: str) -> None:
    stages = chain(STAGES, target)
    assert [each.value for stage in stages for each in stage.all("USER")] == ["10001:10001"]
    (entrypoint,) = [each for stage in stages for each in stage.all("ENTRYPOINT")]
    assert entrypoint.words() == ["python", "-m", target.removesuffix("-gpu")]
    assert entrypoint.value.startswith("[")
    assert {"org.opencontainers.image.title", "org.opencontainers.image.licenses"} <= {
        name for stage in stages for each in stage.all("LABEL") for name in each.pairs()
    }


@final
def test_an_image_has_no_more_than_its_base_its_packages_and_the_project(target: str) -> None:
    """So that no compiler, cache, source tree or installer comes with it, and its user may write to none of it."""
    base, *stages = chain(STAGES, target)
    for stage in stages:
        assert {each.keyword for each in stage.instructions} <= OF_AN_IMAGE
    assert {each.keyword for each in base.instructions} <= {"RUN", "ENV"}
    on_a_gpu = [APT.format("ca-certificates python3")] if target == "evaluator-gpu" else []
    assert [" && ".join(each.commands()) for each in base.all("RUN")] == on_a_gpu
    packages, project = FINAL[target]
    assert [(each.flags, each.value) for stage in stages for each in stage.all("COPY")] == [
        ({"from": packages}, "/opt/atserving /opt/atserving"),
        ({"from": project}, "/opt/project /opt/atserving"),
    ]


@final
def test_an_image_exposes_the_ports_that_the_manifests_declare(target: str) -> None:
    exposed = [int(port) for stage in chain(STAGES, target) for each in stage.all("EXPOSE") for port in each.words()]
    assert sorted(exposed) == sorted(ports(target).values())


@final
def test_an_image_has_no_other_variables_than_it_needs_and_listens_on_those_ports(target: str) -> None:
    stages = chain(STAGES, target)
    # Gate and registry listen there of themselves.
    listening = {"ATSERVING_LISTEN": "grpc", "ATSERVING_HTTP": "http"} if "evaluator" in target else {}
    assert {key: value for stage in stages for each in stage.all("ENV") for key, value in each.pairs().items()} == {
        "PATH": "/opt/atserving/bin:$PATH",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONSAFEPATH": "1",
        **{key: f"0.0.0.0:{ports(target)[name]}" for key, name in listening.items()},
        **({"CUDA_CACHE_PATH": "/tmp/cuda"} if target == "evaluator-gpu" else {}),
    }


def test_every_file_that_is_copied_exists_and_is_let_through() -> None:
    sources = [each.words()[0] for stage in STAGES.values() for each in stage.all("COPY") if "from" not in each.flags]
    assert len(sources) >= 5
    for source in sources:
        assert CONTEXT.files(source), source


def test_only_what_the_images_are_built_from_is_let_through() -> None:
    first, *through, last = CONTEXT.rules
    assert (first, last) == ("*", "**/__pycache__")
    assert sorted(through) == sorted(f"!{name}" for name in FILES | FOLDERS)
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


@pytest.mark.usefixtures("index")
def test_the_base_for_gpus_has_the_cuda_that_onnxruntime_is_built_for() -> None:
    """Its extras name the libraries, which the image has from its base."""
    wanted = f"onnxruntime-gpu[cuda,cudnn]=={pins('gpu')['onnxruntime-gpu']}"
    target = ["--python-version", PINS["gpu"][0], "--python-platform", "x86_64-unknown-linux-gnu"]
    command = [str(_BIN / "uv"), "pip", "compile", "--quiet", *target, "-"]
    done = subprocess.run(command, input=wanted, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (cuda,) = re.findall(r"^nvidia-cuda-runtime(?:-cu\d+)?==(\d+)\.", done.stdout, re.MULTILINE)
    assert STAGES["gpu-base"].base.startswith(f"nvidia/cuda:{cuda}.")


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
        (
            "evaluator",
            ["--app", "digits", "--version", "v1", "--http", "127.0.0.1:0"],
            "evaluator: no registry within 0.2 s: ",
        ),
    ],
)
def test_without_a_registry_it_says_so(replay: Replay, target: str, flags: list[str], message: str) -> None:
    with replay.image(target) as image:
        done = image.run(*flags, "--listen", "127.0.0.1:0", "--registry", "127.0.0.1:1", "--wait", "0.2")
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
