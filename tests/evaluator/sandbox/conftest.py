"""A machine with two instances of a hostile script."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import orjson
import pytest

from tests.evaluator.sandbox.attacks import Hostile, hostile, publish, require_sandbox
from tests.processes import Registry

SECRET = "the-marked-secret"
# Libraries have threads for each CPU.
MOST_TASKS = 64 + 4 * (os.cpu_count() or 1)
MOST_FILE_MIB = 2


@dataclass(frozen=True)
class Host:
    """A machine with two instances of hostile scripts, and what they should not reach."""

    hostile: Hostile
    other: Hostile
    registry: Registry
    folder: Path
    """Has the workspaces, and the keys of the app's owner."""

    @property
    def keys(self) -> Path:
        return self.folder / "qiniu.json"


@pytest.fixture(scope="module")
def host(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    folder = tmp_path_factory.mktemp("host")
    keys = folder / "qiniu.json"
    keys.write_text(orjson.dumps({"access_key": "access", "secret_key": SECRET}).decode())
    flags = (
        *("--workspace", str(folder / "workspaces"), "--qiniu", str(keys), "--sandbox=require"),
        *(f"--script-processes={MOST_TASKS}", f"--script-file={MOST_FILE_MIB}"),
    )
    secrets = dict.fromkeys(("MY_SECRET", "NVIDIA_API_KEY", "TF_VAR_password", "TF_TOKEN_host"), SECRET)
    environment = {**secrets, "ATSERVING_GRACE": "7", "LANG": "C.UTF-8"}
    with ExitStack() as stack:
        (folder / "custom").write_text("custom")
        for app in ("hostile", "other"):
            publish(registry, app, folder, custom_files={"custom": (folder / "custom").as_uri()})
        first, second = (
            stack.enter_context(hostile(registry, app, *flags, **environment)) for app in ("hostile", "other")
        )
        yield Host(first, second, registry, folder)


@pytest.fixture(scope="package", autouse=True)
def sandbox() -> None:
    require_sandbox()
