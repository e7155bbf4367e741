"""Read the Dockerfile and .dockerignore. Ours have no ARG, no heredoc, and no wildcard but ``**/name``."""

from __future__ import annotations

import fnmatch
import json
import re
from dataclasses import dataclass
from pathlib import Path

_PAIR = re.compile(r'([\w.]+)=(?:"([^"]*)"|(\S+))')


@dataclass(frozen=True)
class Instruction:
    """One line: its keyword, its flags by name, and the rest."""

    keyword: str
    flags: dict[str, str]
    value: str

    def words(self) -> list[str]:
        """Return the value as an argument list: the exec form's, or the words between blanks."""
        exec_form: list[str] = json.loads(self.value) if self.value.startswith("[") else self.value.split()
        return exec_form

    def pairs(self) -> dict[str, str]:
        """Return the pairs of an ENV or LABEL. Raises ValueError for a part that is not ``name=value``."""
        if rest := _PAIR.sub("", self.value).strip():
            raise ValueError(f"{self.keyword} has {rest!r}, which is not name=value")
        return {name: quoted or bare for name, quoted, bare in _PAIR.findall(self.value)}


@dataclass(frozen=True)
class Stage:
    """A FROM and the instructions after it."""

    name: str
    base: str
    instructions: list[Instruction]

    def all(self, keyword: str) -> list[Instruction]:
        return [each for each in self.instructions if each.keyword == keyword]


def read(text: str) -> dict[str, Stage]:
    """Return the stages by name, in their order."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    stages: dict[str, Stage] = {}
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        keyword, rest = line.split(maxsplit=1)
        flags = {}
        while match := re.match(r"--([\w-]+)=(\S+)\s+", rest):
            flags[match[1]] = match[2]
            rest = rest[match.end() :]
        if keyword == "FROM":
            base, _, name = rest.split()
            stage = stages[name] = Stage(name, base, [])
        else:
            stage.instructions.append(Instruction(keyword, flags, rest.strip()))
    return stages


def chain(stages: dict[str, Stage], name: str) -> list[Stage]:
    """Return the stages of an image, from its base to itself."""
    stage = stages[name]
    return [*(chain(stages, stage.base) if stage.base in stages else []), stage]


class Context:
    """The files that a build sees. The last line of .dockerignore that matches a file decides."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        lines = (folder / ".dockerignore").read_text().splitlines()
        self._rules = [line.strip() for line in lines if line.strip() and not line.startswith("#")]

    def files(self, below: str = ".") -> list[Path]:
        """Return the files in or at ``below``, relative to the folder."""
        found = []
        for entry in sorted((self._folder / below).iterdir() if (self._folder / below).is_dir() else []):
            path = entry.relative_to(self._folder)
            if self._let_through(path):
                found += self.files(str(path)) if entry.is_dir() else [path]
        if (self._folder / below).is_file() and self._let_through(Path(below)):
            found.append(Path(below))
        return found

    def _let_through(self, path: Path) -> bool:
        through = True
        for rule in self._rules:
            pattern = rule.removeprefix("!")
            names = path.parts if pattern.startswith("**/") else path.parts[:1]
            if any(fnmatch.fnmatchcase(name, pattern.removeprefix("**/")) for name in names):
                through = rule.startswith("!")
        return through
