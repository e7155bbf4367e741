"""Replay a Dockerfile without a container engine: its COPY and RUN instructions, in an empty folder instead of ``/``.

A new virtual environment at its ``/usr/local`` stands for the base image. Commands could see the machine's other files;
nothing in their environment names those, and the source tree is elsewhere.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from atserving.local.child import bound_to_parent
from tests.k8s.dockerfile import Context, Instruction, Stage, chain

# The machine says how to reach the package index. The Dockerfile sets the rest of the environment.
_OF_THE_MACHINE = re.compile(r"(PIP|UV|SSL)_\w+|\w+_proxy|HOME", re.IGNORECASE)
# With their caches, pip and uv download each package once.
_LEFT_OUT = {"PIP_NO_CACHE_DIR", "UV_NO_CACHE"}


@dataclass(frozen=True)
class Image:
    """A built stage, in the folder where it was built."""

    root: Path
    environment: dict[str, str]
    entrypoint: list[str]

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        """Run the entry point in a folder that nobody can write to."""
        program, *own = self.entrypoint
        found = shutil.which(program, path=self.environment["PATH"]) or program
        return subprocess.Popen(
            bound_to_parent([found, *own, *arguments]),
            cwd="/proc",
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, entrypoint: list[str] | None = None) -> subprocess.CompletedProcess[str]:
        image = self if entrypoint is None else Image(self.root, self.environment, entrypoint)
        with image.popen(*arguments) as process:
            output, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


class Replay:
    """Builds stages below ``folder``, each once: the images that tests ask for, and the stages that those need."""

    def __init__(self, stages: Mapping[str, Stage], context: Context, source: Path, folder: Path) -> None:
        self._stages = dict(stages)
        self._context = context
        self._source = source
        # A stage is built and run in one folder, so that the paths in its files stay valid, and kept in another.
        self._root = folder / "root"
        self._kept = folder / "stages"
        self._kept.mkdir(parents=True)

    @contextmanager
    def image(self, target: str) -> Iterator[Image]:
        """Yield the built stage. It stays in its folder until the context ends."""
        self._build(target)
        stages = chain(self._stages, target)
        entrypoint = [each.words() for stage in stages for each in stage.all("ENTRYPOINT")][-1]
        self._files(target).rename(self._root)
        try:
            yield Image(self._root, self._environment(target), entrypoint)
        finally:
            self._root.rename(self._files(target))

    def _files(self, name: str) -> Path:
        """The folder that keeps a stage. A stage that changes no file has its base's."""
        stage = self._stages[name]
        changes = stage.base not in self._stages or stage.all("COPY") or stage.all("RUN")
        return self._kept / name if changes else self._files(stage.base)

    def _build(self, name: str) -> None:
        stage = self._stages[name]
        for needed in [stage.base, *(copy.flags["from"] for copy in stage.all("COPY") if "from" in copy.flags)]:
            if needed in self._stages:
                self._build(needed)
        if self._files(name).exists():
            return
        try:
            if stage.base in self._stages:
                shutil.copytree(self._files(stage.base), self._root, symlinks=True, copy_function=os.link)
            else:
                subprocess.run([sys.executable, "-m", "venv", self._root / "usr/local"], check=True)
            for instruction in stage.instructions:
                self._play(name, instruction)
        except BaseException:
            shutil.rmtree(self._root, ignore_errors=True)
            raise
        self._root.rename(self._files(name))

    def _play(self, name: str, instruction: Instruction) -> None:
        folder = self._workdir(name)
        match instruction.keyword:
            case "COPY":
                source, destination = instruction.words()
                if stage := instruction.flags.get("from"):
                    shutil.copytree(
                        self._files(stage) / source.strip("/"),
                        self._root / destination.strip("/"),
                        symlinks=True,
                        copy_function=os.link,
                        dirs_exist_ok=True,
                    )
                else:
                    self._copy_from_context(source, folder / destination)
            case "RUN":
                # It would change this machine.
                assert "apt-get" not in instruction.value
                command = re.sub(r"(?<![\w./])/opt/", f"{self._root}/opt/", instruction.value)
                machine = {key: value for key, value in os.environ.items() if _OF_THE_MACHINE.fullmatch(key)}
                environment = self._environment(name) | machine
                done = subprocess.run(
                    ["/bin/sh", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
                )
                assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    def _copy_from_context(self, source: str, destination: Path) -> None:
        paths = self._context.files(source)
        assert paths, f"COPY {source}: the context has no such file"
        for path in paths:
            target = destination / (path.relative_to(source) if (self._source / source).is_dir() else path.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self._source / path, target)

    def _workdir(self, name: str) -> Path:
        paths = [each.value for stage in chain(self._stages, name) for each in stage.all("WORKDIR")]
        folder = self._root / paths[-1].strip("/") if paths else self._root
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _environment(self, name: str) -> dict[str, str]:
        environment = {"PATH": f"{self._root}/usr/local/bin:/usr/bin:/bin"}
        for stage in chain(self._stages, name):
            for each in stage.all("ENV"):
                for key, value in each.pairs().items():
                    mapped = re.sub(r"(?<![\w./])/opt/", f"{self._root}/opt/", value)
                    environment[key] = mapped.replace("$PATH", environment["PATH"])
        return {key: value for key, value in environment.items() if key not in _LEFT_OUT}
