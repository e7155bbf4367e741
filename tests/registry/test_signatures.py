"""A registry with trusted keys publishes signed releases alone, and names those in etcd that are not."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from atserving.admin.v1 import admin_pb2, admin_pb2_grpc
from atserving.cli.ops.put import release_from
from atserving.local.examples import FOLDER
from tests.processes import Registry, running_registry
from tests.registry.cli import PUT, Cli
from tests.signing import ZEROS, Signer, trusted

pytestmark = pytest.mark.slow

INVALID = 6
FILE = f"file:///m.tar#sha256={ZEROS}"
DIGITS = FOLDER / "digits" / "digits-v1.tar"


@dataclass
class Mesh:
    """A registry that trusts ada for digits and team apps, and bob for another; free apps need no signature."""

    registry: Registry
    keys: Path
    ada: Signer
    bob: Signer
    eve: Signer

    def trust(self, **changes: Any) -> None:
        """Write the file of trusted keys."""
        needs = ["digits", "team-*", "other"]
        entries = [self.ada.entry("digits", "team-*"), self.bob.entry("other")]
        trusted(self.keys, *entries, **{"required": needs, **changes})


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    folder = tmp_path_factory.mktemp("signatures")
    ada, bob, eve = (Signer(folder, name) for name in ("ada", "bob", "eve"))
    keys = folder / "trusted.json"
    # The tests delete what they publish.
    trusted(keys)
    flags = ("--trusted-keys", str(keys), "--hold-deletions", "0")
    with running_registry(folder / "registry", *flags) as registry:
        found = Mesh(registry, keys, ada, bob, eve)
        found.trust()
        yield found


@pytest.fixture
def cli(mesh: Mesh) -> Iterator[Cli]:
    yield Cli(mesh.registry.address, "digits")
    for app in ("digits", "other", "free"):
        mesh.registry.etcdctl("del", "--prefix", f"/ava/serving/eval/{app}/")


def problems(cli: Cli) -> list[str]:
    return cli.run("release", "list", "digits").err.splitlines()


def test_release_signed_by_the_command_is_published(mesh: Mesh, cli: Cli) -> None:
    values = ("--custom-values", '{"net": "classify", "raw_scale": 1.0}', "--model-params", '{"engines": 1}')
    put = ("release", "put", "digits", "v1", DIGITS.as_uri(), *values)
    assert cli(*put, "--sign-key", str(mesh.ada.path)) == "digits v1 is published, in staging\n"
    assert problems(cli) == []
    shown = cli.run("release", "show", "digits", "v1", "-o", "json").json
    assert shown["file"] == f"{DIGITS.as_uri()}#sha256={hashlib.sha256(DIGITS.read_bytes()).hexdigest()}"
    # The signature stays when something else changes, and does not need to be given again.
    cli(*put, "--desc", "text")
    cli("release", "promote", "digits", "v1", "--force")
    assert cli.run("release", "show", "digits", "v1", "-o", "json").json["signature"] == shown["signature"]


def test_release_signed_elsewhere_is_published(mesh: Mesh, cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "release.json"
    path.write_text(json.dumps({"name": "digits", "version": "v1", "file": FILE, "custom_values": {"a": [2.0, "ü"]}}))
    path.write_text(cli("release", "sign", "-f", str(path), "--sign-key", str(mesh.ada.path)))
    cli(*PUT, "-f", str(path))
    assert problems(cli) == []


def test_each_wrong_signature_is_refused_for_its_own_reason(mesh: Mesh, cli: Cli) -> None:
    fields = {"name": "digits", "version": "v1", "file": FILE, "custom_values": {"a": 1}}
    good = mesh.ada.signed(**fields)
    wrong: list[tuple[dict[str, Any], str]] = [
        (fields, "it has no signature"),
        (mesh.eve.signed(**fields), "it is signed with the key"),
        (mesh.bob.signed(**fields), "the key of bob may not sign for app 'digits'"),
        ({**good, "version": "v2"}, "is one of other content"),
        ({**good, "file": FILE.replace("0", "1")}, "is one of other content"),
        ({**good, "custom_values": {"a": 2}}, "is one of other content"),
        ({**good, "custom_files": {"a": FILE}}, "is one of other content"),
        ({**good, "name": "team-a"}, "is one of other content"),
        ({**good, "name": "other"}, "the key of ada may not sign for app 'other'"),
        ({**good, "signature": good["signature"][:50]}, "its signature should be"),
        ({**good, "signature": "x" * 1000}, "signature: Expected str of length <= 200"),
        ({**good, "file": "file:///m.tar"}, "one of its files has no #sha256="),
    ]
    with grpc.insecure_channel(mesh.registry.address) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        for fields, reason in wrong:
            # Force overrides what protects callers, not this.
            for flag in ("", "force", "validate_only"):
                request = admin_pb2.CreateReleaseRequest(release=release_from(fields))
                if flag:
                    setattr(request, flag, True)
                with pytest.raises(grpc.RpcError, match=re.escape(reason)) as error:
                    stub.CreateRelease(request, timeout=20)
                assert isinstance(error.value, grpc.Call)
                assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        stub.CreateRelease(admin_pb2.CreateReleaseRequest(release=release_from(good)), timeout=20)
    ended = cli.run(*PUT, "digits", "v2", FILE)
    assert (ended.status, ended.out, "it has no signature" in ended.err) == (INVALID, "", True)
    assert cli.run(*PUT, "free", "v1", "file:///m.tar").status == 0


def test_no_other_way_publishes_an_unsigned_release(mesh: Mesh, cli: Cli) -> None:
    good = mesh.ada.signed(name="digits", version="v1", file=FILE)
    bad = {**good, "version": "v2"}
    key = "/ava/serving/eval/digits/"
    with grpc.insecure_channel(mesh.registry.address) as channel:
        stub = admin_pb2_grpc.AdminServiceStub(channel)
        for fields in (bad, good):
            values = {f"{key}{fields['version']}": json.dumps(fields)}
            request = admin_pb2.ApplyConfigRequest(app="digits", values=values, force=True)
            if fields is good:
                stub.ApplyConfig(request, timeout=20)
                continue
            with pytest.raises(grpc.RpcError) as error:
                stub.ApplyConfig(request, timeout=20)
            assert "is one of other content" in str(error.value)
        release = admin_pb2.Release(app="digits", version="v1", signature=mesh.eve.signed(**good)["signature"])
        mask = FieldMask(paths=["signature"])
        with pytest.raises(grpc.RpcError) as error:
            stub.UpdateRelease(admin_pb2.UpdateReleaseRequest(release=release, update_mask=mask), timeout=20)
        assert "it is signed with the key" in str(error.value)
    # A rollback would publish again what a key has signed that is trusted no longer.
    cli("release", "delete", "digits", "v1", "--force")
    trusted(mesh.keys, mesh.bob.entry("*"))
    try:
        ended = cli.run("release", "rollback", "digits")
        assert (ended.status, "it is signed with the key" in ended.err) == (INVALID, True), ended.err
    finally:
        mesh.trust()
    cli("release", "rollback", "digits")


def test_untrusted_releases_in_etcd_are_named(mesh: Mesh, cli: Cli) -> None:
    mesh.registry.put("eval/digits/v1", {"name": "digits", "version": "v1", "file": FILE})
    mesh.registry.put("eval/digits/v2", mesh.eve.signed(name="digits", version="v2", file=FILE))
    mesh.registry.put("eval/free/v1", {"name": "free", "version": "v1", "file": FILE})
    # The registry has read them once it lists the last.
    while cli.run("release", "show", "free", "v1").status:
        pass
    first, second = named = problems(cli)
    assert first == "untrusted: /ava/serving/eval/digits/v1: it has no signature"
    assert second.startswith("untrusted: /ava/serving/eval/digits/v2: it is signed with the key ")
    assert cli.run("ps", "digits").err.splitlines() == named
    doctor = cli.run("doctor").out
    assert doctor.count("sign it: atserving release put --sign-key") == 2
    # Changes of what is there already are none of the content, and put nothing new into use.
    assert cli.run("release", "demote", "digits", "v1").status == 0
    cli(*PUT, "digits", "v1", FILE, "--sign-key", str(mesh.ada.path))
    cli("release", "delete", "digits", "v2")
    assert problems(cli) == []


def test_wrong_file_of_keys_refuses_everything_and_says_so(mesh: Mesh, cli: Cli) -> None:
    mesh.keys.write_text("{")
    try:
        ended = cli.run(*PUT, "free", "v1", FILE, "--sign-key", str(mesh.ada.path))
        assert ended.status != 0
        assert f"no signature can be checked: {mesh.keys} of --trusted-keys: " in ended.err
    finally:
        mesh.trust()
    assert cli.run(*PUT, "free", "v1", FILE).status == 0
