"""An evaluator with trusted keys starts signed releases, and refuses others, for its own reason, before it unpacks."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from atserving.config import Release, validate
from atserving.errors import StartError
from atserving.signatures import TrustedKeys
from evaluator.fetching.release import fetch_release
from evaluator.serving.instance import InstanceSettings, run
from tests.evaluator.digits import DIGITS, digits_tar
from tests.processes import Registry, evaluator
from tests.signing import Signer, trusted

EVIL = b"import sys\nprint('evil', file=sys.stderr)\ndef net_init(cfg): ...\ndef net_inference(model, args): ...\n"


def pinned(path: Path) -> str:
    return f"{path.as_uri()}#sha256={hashlib.sha256(path.read_bytes()).hexdigest()}"


@pytest.fixture
def ada(tmp_path: Path) -> Signer:
    return Signer(tmp_path, "ada")


@pytest.fixture
def keys(ada: Signer, tmp_path: Path) -> Path:
    return trusted(tmp_path / "trusted.json", ada.entry("signed-*"))


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    return Path(shutil.copy(DIGITS / "digits-v1.tar", tmp_path / "release.tar"))


def publish(registry: Registry, fields: dict[str, Any]) -> None:
    registry.put(f"eval/{fields['name']}/{fields['version']}", fields)


async def start_error(registry: Registry, app: str, keys: Path, workspace: Path) -> str:
    """Return the message with which an evaluator fails to start. It leaves no files."""
    await asyncio.to_thread(workspace.mkdir)
    settings = InstanceSettings(
        app, "v1", [registry.address], "127.0.0.1:0", workspace=workspace, trusted_keys=TrustedKeys(keys)
    )
    with pytest.raises(StartError) as error:
        await run(settings)
    assert os.listdir(workspace) == []
    return str(error.value)


def test_signed_release_serves(registry: Registry, ada: Signer, keys: Path, tar: Path) -> None:
    publish(registry, ada.signed(name="signed-good", version="v1", file=pinned(tar)))
    with evaluator(registry, "signed-good", "v1", "--trusted-keys", str(keys)) as process:
        assert process.logged(event="release loading")["signed_by"] == "ada"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"signature": None}, "it has no signature"),
        ({"signature": "garbage"}, "its signature should be <id of a key>:<Ed25519 signature in base64>"),
        ({"name": "signed-other"}, "its signature with the key of ada is one of other content"),
        ({"custom_values": {"threshold": 1}}, "its signature with the key of ada is one of other content"),
        ({"name": "unsigned"}, "the key of ada may not sign for app 'unsigned'"),
    ],
    ids=str,
)
async def test_release_without_its_signature_is_not_started(
    change: dict[str, Any], reason: str, registry: Registry, ada: Signer, keys: Path, tar: Path, tmp_path: Path
) -> None:
    fields = {**ada.signed(name="signed-bad", version="v1", file=pinned(tar)), **change}
    publish(registry, {name: value for name, value in fields.items() if value is not None})
    message = await start_error(registry, fields["name"], keys, tmp_path / "workspace")
    assert message == f"{fields['name']} v1 may not run, see --trusted-keys: {reason}"


async def test_key_that_is_not_trusted_starts_nothing(
    registry: Registry, keys: Path, tar: Path, tmp_path: Path
) -> None:
    publish(registry, Signer(tmp_path, "eve").signed(name="signed-eve", version="v1", file=pinned(tar)))
    message = await start_error(registry, "signed-eve", keys, tmp_path / "workspace")
    assert "it is signed with the key" in message
    assert "which trusted.json does not have" in message


@pytest.mark.parametrize("name", ["file", "custom_files.tags"])
async def test_file_altered_after_the_signature_is_not_unpacked(
    name: str, registry: Registry, ada: Signer, keys: Path, tar: Path, tmp_path: Path
) -> None:
    tags = tmp_path / "tags.csv"
    tags.write_text("0,zero")
    app = f"signed-{name.replace('_', '-')}"
    publish(registry, ada.signed(name=app, version="v1", file=pinned(tar), custom_files={"tags": pinned(tags)}))
    if name == "file":
        digits_tar(tar, **{"net.py": EVIL})
    else:
        tags.write_text("0,evil")
    message = await start_error(registry, app, keys, tmp_path / "workspace")
    assert message.startswith(f"{name} file://")
    assert ": its sha256 is " in message


async def test_signed_files_are_used_as_they_were_checked(tar: Path, tmp_path: Path) -> None:
    tags = tmp_path / "tags.csv"
    tags.write_text("0,zero")
    fields = {"name": "a", "version": "v1", "file": pinned(tar), "custom_files": {"tags": pinned(tags)}}
    (tmp_path / "workspace").mkdir()
    config = await fetch_release(validate(Release, fields), tmp_path / "workspace", copied=True)
    tags.write_text("0,evil")
    assert config.custom_files["tags"].read_text() == "0,zero"
