"""``atserving release put`` refuses what can't work, and publishes the content that it has checked."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from atserving.local.examples import FOLDER
from tests.evaluator.digits import digits_tar
from tests.processes import Registry
from tests.registry.cli import PUT, Cli

pytestmark = pytest.mark.slow

DIGITS = FOLDER / "digits" / "digits-v1.tar"


def stored(cli: Cli, version: str = "v1") -> dict[str, object]:
    found: dict[str, object] = cli.run("release", "show", cli.app, version, "-o", "json").json
    return found


def test_a_release_gets_the_digest_of_what_was_checked(cli: Cli, tmp_path: Path) -> None:
    tar = tmp_path / "digits.tar"
    shutil.copy(DIGITS, tar)
    put = ("release", "put", cli.app, "v1", tar.as_uri(), "--custom-values", '{"net": "classify", "inputscale": 1}')
    ended = cli.run(*put)
    assert (ended.status, ended.out) == (0, f"{cli.app} v1 is published, in staging\n")
    assert ended.err == ("warning: custom_values: unknown field 'inputscale', did you mean 'input_scale'?\n")
    digest = hashlib.sha256(DIGITS.read_bytes()).hexdigest()
    assert stored(cli)["file"] == f"{tar.as_uri()}#sha256={digest}"
    # The same again, and its phase alone, without the file.
    assert cli.run(*put).status == 0
    digits_tar(tar, **{"labels.csv": b"0,nil"})
    other = cli.run(*put)
    assert (other.status, "exists with a different file" in other.err) == (4, True)
    tar.unlink()
    assert cli.run(*put).status == 6
    assert cli.run(*put, "--no-check", "--desc", "text").status == 0
    assert stored(cli)["desc"] == "text"


def test_what_is_published_without_a_digest_stays_so(cli: Cli, lasting: Registry) -> None:
    lasting.publish(cli.app, "v1")
    assert cli.run("release", "put", cli.app, "v1", DIGITS.as_uri(), "--desc", "text").status == 0
    assert stored(cli)["file"] == DIGITS.as_uri()


@pytest.mark.parametrize(
    ("file", "flags", "error"),
    [
        ("file:///none.tar", [], "file file:///none.tar: there is no such file"),
        (DIGITS.as_uri(), ["--custom-values", '{"net": "klassify"}'], "is 'klassify', did you mean 'classify'?"),
    ],
)
def test_what_can_not_work_is_not_published(cli: Cli, file: str, flags: list[str], error: str) -> None:
    ended = cli.run("release", "put", cli.app, "v1", file, *flags)
    assert (ended.status, ended.out, ended.err.count("\n")) == (6, "", 1)
    assert error in ended.err
    assert ended.err.endswith(" (--no-check publishes it as it is)\n")
    assert cli.run("release", "show", cli.app, "v1").status == 3
    assert cli.run(*PUT, cli.app, "v1", file, *flags).status == 0


def test_what_only_its_owner_can_read_is_published_with_a_warning(cli: Cli) -> None:
    ended = cli.run("release", "put", cli.app, "v1", "qiniu://z0/bucket/a.tar")
    assert (ended.status, ended.err) == (
        0,
        "warning: the release is not checked: qiniu://z0/bucket/a.tar can't be read from here\n",
    )
