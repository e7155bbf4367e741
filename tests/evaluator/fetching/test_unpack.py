"""A release's tar can't write outside its folder, fill the disk, or hold links and devices."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from atserving.errors import StartError
from evaluator.fetching import unpack as module
from evaluator.fetching.unpack import unpack

Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, data: bytes = b"data", kind: bytes = tarfile.REGTYPE, link: str = "") -> Entry:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.size = len(data) if kind == tarfile.REGTYPE else 0
    return info, data


def write(path: Path, *entries: Entry, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "inner" / "release"
    folder.mkdir(parents=True)
    return folder


def test_programs_are_executable_and_have_no_other_right(tmp_path: Path, folder: Path) -> None:
    entries = {mode: entry(f"of-{mode:o}") for mode in (0o644, 0o755, 0o6777)}
    for mode, (info, _) in entries.items():
        info.mode = mode
    files = unpack(write(tmp_path / "release.tar", *entries.values()), folder)
    assert [files[f"of-{mode:o}"].stat().st_mode & 0o6111 for mode in entries] == [0, 0o111, 0o111]


def test_files_are_unpacked_and_listed_by_name(tmp_path: Path, folder: Path) -> None:
    tar = write(
        tmp_path / "release.tar",
        entry("./deploy.prototxt", b"net"),
        entry("more", kind=tarfile.DIRTYPE),
        entry("more/file.txt", b"x"),
    )
    files = unpack(tar, folder)
    assert files == {"deploy.prototxt": folder / "deploy.prototxt", "more/file.txt": folder / "more" / "file.txt"}
    assert files["deploy.prototxt"].read_bytes() == b"net"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (entry("../evil"), "'../evil' leads outside"),
        (entry("a/../../evil"), "leads outside"),
        (entry("/evil"), "'/evil' leads outside"),
        (entry("..\\evil"), "leads outside"),
        (entry("link", kind=tarfile.SYMTYPE, link="/etc/passwd"), "'link' is neither a file nor a folder"),
        (entry("link", kind=tarfile.SYMTYPE, link="ok.txt"), "'link' is neither a file nor a folder"),
        (entry("link", kind=tarfile.LNKTYPE, link="ok.txt"), "'link' is neither a file nor a folder"),
        (entry("null", kind=tarfile.CHRTYPE), "'null' is neither a file nor a folder"),
        (entry("disk", kind=tarfile.BLKTYPE), "'disk' is neither a file nor a folder"),
        (entry("pipe", kind=tarfile.FIFOTYPE), "'pipe' is neither a file nor a folder"),
        (entry("ok.txt"), "it holds 'ok.txt' twice"),
        (entry("./ok.txt"), "it holds 'ok.txt' twice"),
        (entry("big", bytes(2000)), "its members hold more than 1000 bytes"),
    ],
)
def test_hostile_members_are_refused(bad: Entry, message: str, tmp_path: Path, folder: Path) -> None:
    tar = write(tmp_path / "release.tar", entry("ok.txt"), bad)
    with pytest.raises(StartError, match="the release's tar is refused") as error:
        unpack(tar, folder, max_bytes=1000)
    assert message in str(error.value)
    assert str(tmp_path) not in str(error.value)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()} <= {
        "release.tar",
        "inner/release/ok.txt",
    }


def test_too_many_members_are_refused(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_MEMBERS", 3)
    tar = write(tmp_path / "release.tar", *(entry(f"{number}") for number in range(4)))
    with pytest.raises(StartError, match="more than 3 members"):
        unpack(tar, folder)


def _cut(data: bytes) -> bytes:
    return data[:700]


@pytest.mark.parametrize("spoil", [lambda _: b"", lambda _: b"no tar" * 1000, _cut], ids=["empty", "no tar", "cut"])
def test_a_damaged_tar_is_refused(spoil: Callable[[bytes], bytes], tmp_path: Path, folder: Path) -> None:
    tar = write(tmp_path / "release.tar", entry("weight.caffemodel", bytes(5000)))
    tar.write_bytes(spoil(tar.read_bytes()))
    with pytest.raises(StartError, match="not an uncompressed tar, or cut short"):
        unpack(tar, folder)


def test_a_compressed_tar_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(StartError, match="not an uncompressed tar"):
        unpack(write(tmp_path / "release.tar.gz", entry("x"), mode="w:gz"), folder)


def test_a_file_below_another_file_is_refused(tmp_path: Path, folder: Path) -> None:
    tar = write(tmp_path / "release.tar", entry("a"), entry("a/b"))
    with pytest.raises(StartError, match="can't be unpacked"):
        unpack(tar, folder)
