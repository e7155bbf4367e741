"""A workspace left by a killed process is removed by the next one; nothing else is."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from atserving.errors import StartError
from evaluator.serving.workspace import workspace

LOCK = ".atserving-workspace"


def left(parent: Path, name: str = "atserving-left") -> Path:
    """Make a folder as a killed process leaves it."""
    folder = parent / name
    (folder / "release" / "nested").mkdir(parents=True)
    for file in (folder / LOCK, folder / "config", folder / "release" / "nested" / "weights"):
        file.touch()
    return folder


def test_a_workspace_is_empty_but_for_its_lock_and_removed_at_the_end(tmp_path: Path) -> None:
    with workspace(tmp_path / "made", "digits-v1") as folder:
        assert folder.parent == tmp_path / "made"
        assert os.listdir(folder) == [LOCK]
        (folder / "release").mkdir()
    assert os.listdir(tmp_path / "made") == []


def test_a_left_workspace_is_removed(tmp_path: Path) -> None:
    folder = left(tmp_path)
    with workspace(tmp_path, "digits-v1") as own:
        assert os.listdir(tmp_path) == [own.name]
    assert not folder.exists()


def test_a_living_workspace_is_kept(tmp_path: Path) -> None:
    with workspace(tmp_path, "digits-v1") as first, workspace(tmp_path, "digits-v1") as second:
        assert {*os.listdir(tmp_path)} == {first.name, second.name}


def test_what_is_no_workspace_of_ours_is_kept(tmp_path: Path) -> None:
    elsewhere = left(tmp_path, "elsewhere")
    parent = tmp_path / "parent"
    parent.mkdir()
    (parent / "atserving-file").touch()
    (parent / "atserving-link").symlink_to(elsewhere)
    left(parent, "of-another-program")
    (left(parent, "atserving-unlocked") / LOCK).unlink()
    for name, make in (
        ("atserving-folder", Path.mkdir),
        ("atserving-pipe", os.mkfifo),
        ("atserving-symlink", lambda lock: lock.symlink_to(elsewhere / LOCK)),
    ):
        lock = left(parent, name) / LOCK
        lock.unlink()
        make(lock)
    before = sorted(parent.rglob("*"))
    with workspace(parent, "digits-v1"):
        pass
    assert sorted(parent.rglob("*")) == before
    assert sorted(each.name for each in elsewhere.iterdir()) == [LOCK, "config", "release"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's files")
@pytest.mark.parametrize("of", ["folder", "lock"])
def test_another_users_workspace_is_kept(of: str, tmp_path: Path) -> None:
    folder = left(tmp_path)
    os.chown(folder if of == "folder" else folder / LOCK, 12345, 12345)
    with workspace(tmp_path, "digits-v1"):
        assert (folder / "release").exists()


def test_a_symlink_in_a_left_workspace_is_not_followed(tmp_path: Path) -> None:
    target = left(tmp_path, "target")
    parent = tmp_path / "parent"
    (left(parent) / "link").symlink_to(target)
    with workspace(parent, "digits-v1") as own:
        assert os.listdir(parent) == [own.name]
    assert (target / "release").exists()


def test_processes_that_start_at_once_keep_their_workspaces(tmp_path: Path) -> None:
    def start(_: int) -> bool:
        # Locks belong to open files, so threads stand for processes.
        with workspace(tmp_path, "digits-v1") as folder:
            return all(os.listdir(folder) == [LOCK] for _ in range(20))

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(start, range(400)))


def test_an_interrupted_removal_leaves_the_lock_for_the_next_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = left(tmp_path)
    remove = shutil.rmtree

    def interrupted(path: str | Path, *, ignore_errors: bool) -> None:
        if Path(path) == folder:
            raise KeyboardInterrupt
        remove(path, ignore_errors=ignore_errors)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            workspace(tmp_path, "digits-v1").__enter__()
    assert os.listdir(folder) == [LOCK]
    with workspace(tmp_path, "digits-v1"):
        assert not folder.exists()


def test_a_folder_that_can_not_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(StartError, match="can't make a workspace: Not a directory"),
        workspace(tmp_path / "file/x", "a"),
    ):
        pass
