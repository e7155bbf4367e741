"""A signature counts for the content, app and version that it was made for, with a key that is trusted for the app."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from atserving.config import Release, validate
from atserving.errors import StartError
from atserving.signatures import SigningKey, TrustedKeys, Untrusted, generate
from tests.signing import ZEROS, Signer, trusted

FILE = f"file:///m.tar#sha256={ZEROS}"
FIELDS: dict[str, Any] = {
    "name": "digits",
    "version": "v1",
    "file": FILE,
    "custom_files": {"tags": f"https://host/tags?x=1#sha256={ZEROS}"},
    "custom_values": {"net": "detect", "threshold": 0.5, "more": [1, {"b": None, "a": "ü"}]},
    "model_params": {"engines": 2},
    "image_width": 30,
    "batch_size": 4,
}


@pytest.fixture
def ada(tmp_path: Path) -> Signer:
    return Signer(tmp_path, "ada")


@pytest.fixture
def keys(ada: Signer, tmp_path: Path) -> TrustedKeys:
    return TrustedKeys(trusted(tmp_path / "trusted.json", ada.entry("digits", "team-*")))


def release(fields: dict[str, Any]) -> Release:
    return validate(Release, fields)


def test_signature_of_a_trusted_key_counts_whatever_may_change(keys: TrustedKeys, ada: Signer) -> None:
    signed = ada.signed(**FIELDS)
    assert keys.signer(release(signed)) == "ada"
    assert keys.signer(release({**signed, "phase": "production", "weight": 2, "desc": "d", "lastmodified": "now"}))
    assert keys.signer(release(ada.signed(**{**FIELDS, "name": "team-a"}))) == "ada"


@pytest.mark.parametrize(
    "change",
    [
        {"name": "team-a"},
        {"version": "v2"},
        {"file": FILE.replace("0", "1")},
        {"file": FILE.replace("/m.tar", "/n.tar")},
        {"custom_files": {}},
        {"custom_files": {"tags": f"https://host/tags?x=1#sha256={'1' * 64}"}},
        {"custom_files": {"tag": FIELDS["custom_files"]["tags"]}},
        {"custom_values": {}},
        {"custom_values": {**FIELDS["custom_values"], "threshold": 0.6}},
        {"custom_values": {**FIELDS["custom_values"], "more": [True, {"b": None, "a": "ü"}]}},
        {"model_params": {"engines": "2"}},
        {"use_device": "GPU"},
        {"image_width": 31},
        {"batch_size": None},
    ],
    ids=str,
)
def test_signature_does_not_count_for_other_content(keys: TrustedKeys, ada: Signer, change: dict[str, Any]) -> None:
    with pytest.raises(Untrusted, match="its signature with the key of ada is one of other content"):
        keys.signer(release({**ada.signed(**FIELDS), **change}))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda text: "", "it has no signature"),
        (lambda text: text[:-1], "its signature should be <id of a key>:<Ed25519 signature in base64>"),
        (lambda text: text[:40], "its signature should be"),
        (lambda text: text + "\n", "its signature should be"),
        (lambda text: text.partition(":")[2], "its signature should be"),
        (lambda text: "ü" * 100, "its signature should be"),
        (lambda text: f"{'0' * 16}{text[16:]}", f"it is signed with the key {'0' * 16}, which trusted.json does not"),
        (lambda text: f"{text[:17]}{'A' * 86}==", "is one of other content"),
    ],
)
def test_spoilt_signature_does_not_count(
    keys: TrustedKeys, ada: Signer, spoil: Callable[[str], str], reason: str
) -> None:
    signed = ada.signed(**FIELDS)
    with pytest.raises(Untrusted, match=reason):
        keys.signer(release({**signed, "signature": spoil(signed["signature"])}))


def test_other_keys_and_keys_of_other_apps_do_not_count(keys: TrustedKeys, ada: Signer, tmp_path: Path) -> None:
    eve = Signer(tmp_path, "eve")
    signed = eve.signed(**FIELDS)
    with pytest.raises(Untrusted, match=r"it is signed with the key [0-9a-f]{16}, which trusted.json does not have"):
        keys.signer(release(signed))
    # Nor under the id of a trusted key.
    forged = ada.signed(**FIELDS)["signature"].partition(":")[0] + ":" + signed["signature"].partition(":")[2]
    with pytest.raises(Untrusted, match="other content"):
        keys.signer(release({**signed, "signature": forged}))
    for app in ("digits2", "team", "Digits"):
        with pytest.raises(Untrusted, match=f"the key of ada may not sign for app '{app}'"):
            keys.signer(release(ada.signed(**{**FIELDS, "name": app})))


def test_file_without_a_digest_is_covered_by_no_signature(keys: TrustedKeys, ada: Signer) -> None:
    for change in ({"file": "file:///m.tar"}, {"custom_files": {"tags": "file:///tags"}}):
        with pytest.raises(StartError, match="only a release whose files all have #sha256= can be signed"):
            ada.signed(**{**FIELDS, **change})
        with pytest.raises(Untrusted, match="one of its files has no #sha256="):
            keys.signer(release({**ada.signed(**FIELDS), **change}))


def test_apps_that_need_no_signature(ada: Signer, tmp_path: Path) -> None:
    keys = TrustedKeys(trusted(tmp_path / "t", ada.entry("*"), required=["digits", "team-*"]))
    assert keys.signer(release({**FIELDS, "name": "free"})) == ""
    for app in ("digits", "team-a"):
        with pytest.raises(Untrusted, match="it has no signature"):
            keys.signer(release({**FIELDS, "name": app}))


def test_key_of_ssh_keygen_signs(tmp_path: Path) -> None:
    path = tmp_path / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    entry = {"name": "ssh", "public_key": path.with_suffix(".pub").read_text(), "apps": ["*"]}
    signature = SigningKey(path).sign(release(FIELDS))
    keys = TrustedKeys(trusted(tmp_path / "t", entry))
    assert keys.signer(release({**FIELDS, "signature": signature})) == "ssh"
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "secret", "-f", str(path)], check=True, stdout=subprocess.DEVNULL)
    with pytest.raises(StartError, match="has a passphrase"):
        SigningKey(path)


def test_private_key_is_for_its_owner_alone(ada: Signer, tmp_path: Path) -> None:
    assert ada.path.stat().st_mode & 0o777 == 0o600
    before = ada.path.read_bytes()
    with pytest.raises(StartError, match="File exists"):
        generate(ada.path, "ada")
    assert ada.path.read_bytes() == before
    os.chmod(ada.path, 0o640)
    with pytest.raises(StartError, match=f"others can read {ada.path}: chmod 600 {ada.path}"):
        SigningKey(ada.path)


def test_wrong_private_key_is_named_without_its_text(tmp_path: Path) -> None:
    path = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-f", str(path)], check=True)
    with pytest.raises(StartError, match="is no Ed25519 key"):
        SigningKey(path)
    for text in ("", "secret", "-----BEGIN OPENSSH PRIVATE KEY-----\nsecret\n-----END OPENSSH PRIVATE KEY-----\n"):
        path.write_text(text)
        with pytest.raises(StartError, match="is no private key") as error:
            SigningKey(path)
        assert "secret" not in str(error.value)
    path.unlink()
    with pytest.raises(StartError, match="can't read"):
        SigningKey(path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"public_key": "ssh-rsa AAAA"}, 'the key of ada: should be "ssh-ed25519 AAAA..."'),
        ({"public_key": "ssh-ed25519 AAAA"}, 'the key of ada: should be "ssh-ed25519 AAAA..."'),
        ({"apps": []}, r"\$.keys\[0\].apps"),
        ({"apps": ["*a"]}, r"\$.keys\[0\].apps"),
        ({"app": ["a"]}, "app"),
    ],
    ids=str,
)
def test_wrong_file_of_trusted_keys_is_named(ada: Signer, tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = trusted(tmp_path / "wrong.json", {**ada.entry("*"), **change})
    with pytest.raises(StartError, match=f"{path} of --trusted-keys: .*{reason}"):
        TrustedKeys(path)


def test_missing_file_and_a_key_twice(ada: Signer, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"can't read .*/none for --trusted-keys: No such file"):
        TrustedKeys(tmp_path / "none")
    with pytest.raises(StartError, match="two entries have the same key"):
        TrustedKeys(trusted(tmp_path / "twice", ada.entry("a"), {**ada.entry("b"), "name": "bob"}))
