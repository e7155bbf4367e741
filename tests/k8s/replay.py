"""Replays a Dockerfile without an engine: its COPY and RUN instructions in an empty folder, which stands for ``/``.

The base image is stood in for by a fresh virtual environment at its ``/usr/local``. Nothing keeps a command from seeing
the machine's other files; none is named in its environment, and the source tree is nowhere near.
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

from tests.k8s.dockerfile import Context, Instruction, Stage, chain

# How the package index is reached is the machine's business. All else in the environment is the Dockerfile's.
_OF_THE_MACHINE = re.compile(r"(PIP|SSL)_\w+|\w+_proxy|HOME", re.IGNORECASE)
# So that what the suite installs is fetched once.
_LEFT_OUT = {"PIP_NO_CACHE_DIR"}


@dataclass(frozen=True)
class Image:
    """A stage that was built, at the place where it was built."""

    root: Path
    environment: dict[str, str]
    entrypoint: list[str]

    def popen(self, *arguments: str) -> subprocess.Popen[str]:
        """Runs the entry point in a folder that nobody can write to."""
        return subprocess.Popen(
            [*self.entrypoint, *arguments],
            cwd="/proc",
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            executable=shutil.which(self.entrypoint[0], path=self.environment["PATH"]),
        )

    def run(self, *arguments: str, entrypoint: list[str] | None = None) -> subprocess.CompletedProcess[str]:
        image = self if entrypoint is None else Image(self.root, self.environment, entrypoint)
        with image.popen(*arguments) as process:
            output, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


class Replay:
    """Builds stages below ``folder``; each once, and only those asked for and what they are built from."""

    def __init__(self, stages: Mapping[str, Stage], context: Context, source: Path, folder: Path) -> None:
        self._stages = dict(stages)
        self._context = context
        self._source = source
        # Where a stage is while it is built or run, so that paths inside of it stay true; and where it is kept.
        self._root = folder / "root"
        self._kept = folder / "stages"
        self._kept.mkdir(parents=True)

    @contextmanager
    def image(self, target: str) -> Iterator[Image]:
        """The built stage, in place as long as the context lasts."""
        self._build(target)
        stages = chain(self._stages, target)
        entrypoint = [each.words() for stage in stages for each in stage.all("ENTRYPOINT")][-1]
        (self._kept / target).rename(self._root)
        try:
            yield Image(self._root, self._environment(target), entrypoint)
        finally:
            self._root.rename(self._kept / target)

    def _build(self, name: str) -> None:
        if (self._kept / name).exists():
            return
        stage = self._stages[name]
        for needed in [stage.base, *(copy.flags["from"] for copy in stage.all("COPY") if "from" in copy.flags)]:
            if needed in self._stages:
                self._build(needed)
        if stage.base in self._stages:
            shutil.copytree(self._kept / stage.base, self._root, symlinks=True, copy_function=os.link)
        else:
            subprocess.run([sys.executable, "-m", "venv", self._root / "usr/local"], check=True)
        try:
            for instruction in stage.instructions:
                self._play(name, instruction)
        except BaseException:
            shutil.rmtree(self._root)
            raise
        self._root.rename(self._kept / name)

    def _play(self, name: str, instruction: Instruction) -> None:
        folder = self._workdir(name)
        match instruction.keyword:
            case "COPY":
                source, destination = instruction.words()
                if stage := instruction.flags.get("from"):
                    shutil.copytree(
                        self._kept / stage / source.strip("/"),
                        self._root / destination.strip("/"),
                        symlinks=True,
                        copy_function=os.link,
                        dirs_exist_ok=True,
                    )
                else:
                    self._copy_from_context(source, folder / destination)
            case "RUN":
                # It would be this machine that is changed.
                assert "apt-get" not in instruction.value
                command = re.sub(r"(?<![\w./])/opt/", f"{self._root}/opt/", instruction.value)
                environment = self._environment(name) | {
                    key: value for key, value in os.environ.items() if _OF_THE_MACHINE.fullmatch(key)
                }
                done = subprocess.run(
                    ["/bin/sh", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
                )
                assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"

    def _copy_from_context(self, source: str, destination: Path) -> None:
        for path in self._context.files(source):
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
