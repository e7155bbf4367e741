"""A test authority: certificates for each role of a mesh, in folders that look like Kubernetes' Secrets of TLS.

    python -m atserving.local.authority FOLDER

Run it again to renew all certificates: the processes follow. The key of the authority lies beside them, so this is for
tests and for one machine.
"""

from __future__ import annotations

import ipaddress
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from atserving.cli import service
from atserving.config import is_name
from atserving.errors import StartError
from atserving.tls import DEFAULT_DOMAIN, ENVOY, EVALUATOR, GATE, OPERATOR, REGISTRY, TlsFiles

try:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ModuleNotFoundError:
    raise StartError("cryptography is not installed: pip install '.[local]' in a checkout") from None

ETCD = "etcd"
"""The role of etcd, whom clients ask by its address."""

LOCAL = ("localhost", "127.0.0.1")
"""The names of this machine."""

_DAYS = 90
_SKEW = timedelta(minutes=5)
# Where Kubernetes has the files of a volume; it swaps this link to replace them all at once.
_NOW = "..data"


class Authority:
    """Signs certificates, and keeps its own key in a folder from one run to the next."""

    def __init__(self, folder: Path, *, domain: str = DEFAULT_DOMAIN, renew: bool = False) -> None:
        """``renew`` makes a new key; those who trust this authority go on to trust the one before it, too."""
        self.folder, self._domain = folder, domain
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        known, key = folder / "ca.crt", folder / "ca.key"
        self._trusted = x509.load_pem_x509_certificates(known.read_bytes())[:1] if known.exists() else []
        if not self._trusted or renew:
            self._key = ec.generate_private_key(ec.SECP256R1())
            name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"test authority of {domain}")])
            own = self._signed(name, name, self._key, timedelta(days=10 * 365), x509.BasicConstraints(True, 0))
            self._trusted.insert(0, own)
            _write(key, _pem_of(self._key))
            _write(known, b"".join(map(_pem, self._trusted)))
        else:
            loaded = serialization.load_pem_private_key(key.read_bytes(), None)
            assert isinstance(loaded, ec.EllipticCurvePrivateKey)
            self._key = loaded

    def issue(self, role: str, names: Sequence[str] = (), *, valid: timedelta = timedelta(days=_DAYS)) -> TlsFiles:
        """Write the certificate of a role, its key and the authorities; all replace older ones at once.

        ``names`` are DNS names and addresses beside those of the role. The folder is named after the role.
        """
        files = self.files(role)
        self.sign(files.cert.parent, role, [files.uri(role)], [files.dns_name(role), *names], valid=valid)
        return files

    def sign(
        self,
        folder: Path,
        title: str,
        uris: Sequence[str],
        names: Sequence[str],
        *,
        valid: timedelta = timedelta(days=_DAYS),
    ) -> None:
        """Write a certificate with these URIs, DNS names and addresses, its key and the authorities into a folder."""
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives: list[x509.GeneralName] = [x509.UniformResourceIdentifier(each) for each in uris]
        alternatives += [_general(each) for each in names]
        cert = self._signed(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, title[:64])]),
            self._trusted[0].subject,
            key,
            valid,
            x509.BasicConstraints(False, None),
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
            x509.SubjectAlternativeName(alternatives),
        )
        ca = b"".join(map(_pem, self._trusted))
        _replace(folder, {"tls.crt": _pem(cert), "tls.key": _pem_of(key), "ca.crt": ca})

    def issue_all(self, apps: Iterable[str], operators: Iterable[str], etcd: Iterable[str] = ()) -> None:
        """Issue a certificate for each role of a mesh, anew if there is one.

        ``etcd`` are the names of etcd's members on other machines than this one.
        """
        roles = [ENVOY, GATE, REGISTRY]
        roles += [f"{EVALUATOR}/{each}" for each in apps] + [f"{OPERATOR}/{each}" for each in operators]
        for role in roles:
            self.issue(role)
        self.issue(ETCD, [*LOCAL, *etcd])

    def files(self, role: str) -> TlsFiles:
        """Return the files of a role."""
        folder = self.folder / role.replace("/", "-")
        return TlsFiles(folder / "tls.crt", folder / "tls.key", folder / "ca.crt", self._domain)

    def _signed(
        self,
        subject: x509.Name,
        issuer: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        valid: timedelta,
        *extensions: x509.ExtensionType,
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
            # One that has expired was valid before.
            .not_valid_before(min(now, now + valid) - _SKEW)
            .not_valid_after(now + valid)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        for each in extensions:
            builder = builder.add_extension(each, critical=isinstance(each, x509.BasicConstraints))
        return builder.sign(self._key, hashes.SHA256())


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(content)


def _replace(folder: Path, files: dict[str, bytes]) -> None:
    """Replace the files of a folder all at once, as Kubernetes does."""
    folder.mkdir(exist_ok=True, mode=0o700)
    now = folder / _NOW
    before = now.resolve() if now.is_symlink() else None
    new = Path(tempfile.mkdtemp(prefix="..", dir=folder))
    for name, content in files.items():
        _write(new / name, content)
    link = folder / "..new"
    link.symlink_to(new.name)
    link.replace(now)
    for name in files:
        if not (folder / name).is_symlink():
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(f"{_NOW}/{name}")
    if before:
        shutil.rmtree(before, ignore_errors=True)


_BETWEEN = re.compile(r"[\s,]+")


def _names(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    names = [each for each in _BETWEEN.split(value) if each]
    for each in names:
        if not is_name(each):
            raise click.BadParameter(f"{each!r} is no name", context, parameter)
    return names


@click.command(help="Make a test authority in FOLDER, and a certificate for each role; again, to renew them.")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--apps", default="", callback=_names, metavar="APP,...", help="The apps of evaluators.")
@click.option(
    "--operators", default="local", show_default=True, callback=_names, metavar="NAME,...", help="The operators."
)
@click.option("--etcd", default="", callback=_names, metavar="HOST,...", help="The members of etcd elsewhere.")
@click.option("--domain", default=DEFAULT_DOMAIN, show_default=True, help="The domain of the names.")
@click.option("--renew-authority", is_flag=True, help="Give the authority a new key; the old one stays trusted.")
def main(
    folder: Path, apps: list[str], operators: list[str], etcd: list[str], domain: str, renew_authority: bool
) -> None:
    authority = Authority(folder, domain=domain, renew=renew_authority)
    authority.issue_all(apps, operators, etcd)
    for path in sorted(folder.glob("*/tls.crt")):
        click.echo(path.parent)


if __name__ == "__main__":
    service.run(main, "authority")
