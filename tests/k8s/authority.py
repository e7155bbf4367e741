"""A stand-in for cert-manager: makes the Secrets that Certificates ask for, under one authority."""

from __future__ import annotations

from pathlib import Path

from atserving.local.authority import Authority
from tests.k8s.checks.model import Document, at, list_at


class CertManager:
    """Makes Secrets as folders, whose files are replaced as a kubelet does it."""

    def __init__(self, folder: Path, documents: list[Document]) -> None:
        """``documents`` has the Certificates, among others."""
        self._authority = Authority(folder)
        self._specs = [each["spec"] for each in documents if each["kind"] == "Certificate"]

    def issue(self) -> dict[str, Path]:
        """Make all Secrets, anew if there are some, and return them by name. Only the authority has its own."""
        leaves = [each for each in self._specs if not at(each, "isCA")]
        for spec in leaves:
            folder = self._authority.folder / spec["secretName"]
            self._authority.sign(folder, spec["secretName"], list_at(spec, "uris"), list_at(spec, "dnsNames"))
        return {spec["secretName"]: self._authority.folder / spec["secretName"] for spec in leaves}
