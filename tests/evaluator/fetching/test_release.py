"""A release's files are fetched and checked; any failure stops the start with one line."""

import asyncio
import hashlib
import io
import tarfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
from aiohttp import web

from atserving.config import Release, validate
from atserving.errors import StartError
from evaluator.fetching import release as module
from evaluator.fetching.release import fetch_release

MEMBERS = {"deploy.prototxt": b"net", "weight.caffemodel": b"weights", "labels.csv": b"0,zero\n"}


def tar_bytes(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


TAR = tar_bytes(MEMBERS)
SHA256 = hashlib.sha256(TAR).hexdigest()


def contents(files: Mapping[str, Path | str]) -> dict[str, bytes]:
    return {name: Path(path).read_bytes() for name, path in files.items()}


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    path = tmp_path / "a release.tar"
    path.write_bytes(TAR)
    return path


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "workspace"
    folder.mkdir()
    return folder


@pytest.fixture
async def host() -> AsyncIterator[str]:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=TAR, status=200 if request.path == "/release.tar" else 404)

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


def release(file: str, **fields: object) -> Release:
    return validate(Release, {"name": "app", "version": "v1", "file": file, **fields})


async def test_a_local_tar_is_unpacked_where_it_is(tar: Path, workspace: Path) -> None:
    local = await fetch_release(release(f"file://{tar.as_posix().replace(' ', '%20')}#sha256={SHA256}"), workspace)
    assert contents(local.tar_files) == MEMBERS
    assert all(path.is_relative_to(workspace) for path in local.tar_files.values())


async def test_a_remote_tar_and_custom_files_are_downloaded(host: str, tar: Path, workspace: Path) -> None:
    uri = f"{host}/release.tar#sha256={SHA256.upper()}"
    local = await fetch_release(
        release(uri, custom_files={"tags": uri, "more": f"file://{tar}"}, custom_values={"threshold": 0.5}), workspace
    )
    cfg = local.to_cfg()
    assert set(cfg["tar_files"]) == set(MEMBERS)
    assert contents(cfg["custom_files"]) == {"tags": TAR, "more": TAR}
    assert cfg["custom_values"] == {"threshold": 0.5, "workspace": str(workspace / "scratch")}
    assert (cfg["image_width"], cfg["batch_size"], cfg["use_device"]) == (None, None, "CPU")


@pytest.mark.parametrize("scheme", ["file", "http"])
async def test_a_wrong_digest_stops_the_start(scheme: str, host: str, tar: Path, workspace: Path) -> None:
    uri = f"file://{tar}" if scheme == "file" else f"{host}/release.tar"
    with pytest.raises(StartError, match=f"its sha256 is {SHA256}, not {'0' * 64}"):
        await fetch_release(release(f"{uri}#sha256={'0' * 64}"), workspace)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("file:///no/such.tar", "file file:///no/such.tar: there is no such file"),
        ("file://relative/x.tar", "should be file:// and an absolute path"),
        ("file:///tmp#md5=12", "#md5=12 should be #sha256= and 64 hex digits"),
        ("qiniu://z0/bucket/key", "file qiniu://z0/bucket/key: needs the keys of its owner, see --qiniu"),
        ("http://127.0.0.1:1/x?token=secret", "file http://127.0.0.1:1/x: can't be fetched"),
        ("http://[", "can't be fetched"),
    ],
)
async def test_an_unavailable_file_stops_the_start(file: str, message: str, workspace: Path) -> None:
    with pytest.raises(StartError) as error:
        await fetch_release(release(file), workspace)
    assert message in str(error.value)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


async def test_a_file_unknown_to_its_host_stops_the_start(host: str, workspace: Path) -> None:
    with pytest.raises(StartError, match="its host answered 404"):
        await fetch_release(release(f"{host}/other.tar"), workspace)


async def test_a_file_too_large_stops_the_start(
    host: str, tar: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 1000)
    for number, uri in enumerate((f"file://{tar}", f"{host}/release.tar")):
        folder = workspace / str(number)
        folder.mkdir()
        with pytest.raises(StartError, match="is larger than 1000 bytes"):
            await fetch_release(release(uri), folder)


@pytest.mark.parametrize("missing", ["deploy.prototxt", "weight.caffemodel"])
def test_a_tar_without_a_net_stops_the_start(missing: str, tar: Path, workspace: Path) -> None:
    tar.write_bytes(tar_bytes({name: data for name, data in MEMBERS.items() if name != missing}))
    with pytest.raises(StartError, match=f"the release's tar has no {missing}"):
        asyncio.run(fetch_release(release(f"file://{tar}"), workspace))


async def test_an_unavailable_custom_file_is_named(tar: Path, workspace: Path) -> None:
    with pytest.raises(StartError, match=r"custom_files\.tags file:///none: there is no such file"):
        await fetch_release(release(f"file://{tar}", custom_files={"tags": "file:///none"}), workspace)
