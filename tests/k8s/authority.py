"""Certificates for a mesh with TLS."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


class Authority:
    """Signs certificates, as the playbook does with openssl. Skips the test where openssl is not installed."""

    def __init__(self, folder: Path) -> None:
        if not shutil.which("openssl"):
            pytest.skip("openssl, which makes the keys, is not installed")
        self.certificate, self._key = folder / "ca.crt", folder / "ca.key"
        self._folder = folder
        self._make("etcd-authority", self.certificate, self._key)

    def certified(self, name: str, names: list[str]) -> dict[str, bytes]:
        """Return the files of a Secret: a certificate for these names, its key, and the authority's certificate."""
        certificate, key = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        named = ["-addext", f"subjectAltName={','.join(names)}"] if names else []
        signer = ["-CA", str(self.certificate), "-CAkey", str(self._key)]
        self._make(name, certificate, key, *signer, "-addext", "basicConstraints=critical,CA:FALSE", *named)
        files = {"tls.crt": certificate, "tls.key": key, "ca.crt": self.certificate}
        return {file: path.read_bytes() for file, path in files.items()}

    def _make(self, name: str, certificate: Path, key: Path, *flags: str) -> None:
        new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"]
        command = [*new, "-keyout", str(key), "-out", str(certificate), *flags]
        subprocess.run(command, check=True, capture_output=True)
