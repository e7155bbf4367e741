"""The test authority of `make certs`: what it writes, and what a second run replaces."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cryptography import x509

from atserving.local.authority import Authority
from atserving.tls import EVALUATOR, GATE, Tls


def run(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-m", "atserving.local.authority", str(folder), *flags]
    return subprocess.run(program, capture_output=True, text=True, check=False, timeout=60)


def test_each_role_gets_a_folder_and_a_second_run_renews_it(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    done = run(folder, "--apps", "digits, faces", "--operators", "ada")
    assert done.returncode == 0, done.stderr
    roles = {"envoy", "gate", "registry", "etcd", "operator-ada", "evaluator-digits", "evaluator-faces"}
    assert {Path(line).name for line in done.stdout.splitlines()} == roles
    assert {path.name for path in folder.iterdir()} == {*roles, "ca.crt", "ca.key"}
    authority = Authority(folder)
    Tls(authority.files(f"{EVALUATOR}/faces"), f"{EVALUATOR}/faces")

    before = [(authority.files(GATE).cert.read_bytes(), authority.files(GATE).ca.read_bytes())]
    assert run(folder).returncode == 0
    before.append((authority.files(GATE).cert.read_bytes(), authority.files(GATE).ca.read_bytes()))
    assert before[0][0] != before[1][0]
    assert before[0][1] == before[1][1] == (folder / "ca.crt").read_bytes()
    # A new authority stands before the old one.
    assert run(folder, "--renew-authority").returncode == 0
    both = (folder / "ca.crt").read_bytes()
    assert both.endswith(before[0][1])
    assert both != before[0][1]
    Tls(authority.files(GATE), GATE)
    # What was replaced is gone.
    assert len(list((folder / "gate").glob("..*"))) == 2


def test_other_domains_and_wrong_names(tmp_path: Path) -> None:
    assert run(tmp_path, "--domain", "mesh.example").returncode == 0
    Tls(Authority(tmp_path, domain="mesh.example").files(GATE), GATE)
    done = run(tmp_path, "--apps", "a/b")
    assert (done.returncode, "'a/b' is no name" in done.stderr) == (2, True)


def test_etcd_has_the_names_of_its_members(tmp_path: Path) -> None:
    assert run(tmp_path, "--etcd", "etcd-0.etcd,etcd-1.etcd").returncode == 0
    certificate = x509.load_pem_x509_certificate((tmp_path / "etcd" / "tls.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["etcd.atserving", "localhost", "etcd-0.etcd", "etcd-1.etcd"]


def test_keys_are_for_their_user_alone(tmp_path: Path) -> None:
    files = Authority(tmp_path / "certs").issue(GATE)
    for path in (files.key, tmp_path / "certs" / "ca.key"):
        assert path.stat().st_mode & 0o077 == 0
