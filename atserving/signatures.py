"""Signatures of releases, and the file of the keys that an evaluator or a registry trusts.

A signature is that of an Ed25519 key over the digest of a release (``Release.digest``). The release names the sha256 of
each of its files, so the signature covers all that decides what an instance runs: app, version, files, values. It does
not cover the phase, weight and description, which change while the release lives.

``cryptography`` is loaded when a key is: few processes have any.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from atserving.config import Release
from atserving.errors import StartError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

_STATEMENT = b"atserving: release signature, 1\n"
"""So that no other use of a key, such as that of ssh, yields a signature of a release, nor the other way round."""

_SIGNATURE = re.compile(r"([0-9a-f]{16}):([A-Za-z0-9+/]{86}==)")
_MOST_KEY_BYTES = 16 << 10

_Pattern = Annotated[str, msgspec.Meta(pattern=r"^(\*|[A-Za-z0-9][A-Za-z0-9._-]{0,62}\*?)\Z")]


class Untrusted(Exception):  # noqa: N818
    """A release has no signature that counts. The message says why."""


class _Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, msgspec.Meta(pattern=r"^[!-~]{1,100}\Z")]
    public_key: str
    """As OpenSSH has it: ``ssh-ed25519 AAAA... comment``."""
    apps: Annotated[tuple[_Pattern, ...], msgspec.Meta(min_length=1)]
    """The apps that it may sign for, by name; ``team-*`` stands for all names with this beginning."""


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: tuple[_Key, ...]
    required: tuple[_Pattern, ...] = ("*",)
    """The apps whose releases need a signature."""


class TrustedKeys:
    """The keys of who may sign releases, and the apps that they may sign for."""

    def __init__(self, path: Path) -> None:
        """Read the file. Raises StartError."""
        self._path = path
        try:
            self._file = msgspec.json.decode(path.read_bytes(), type=_File)
        except OSError as error:
            raise StartError(f"can't read {path} for --trusted-keys: {error.strerror}") from None
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise StartError(f"{path} of --trusted-keys: {error}") from None
        self._by_id: dict[str, tuple[_Key, Ed25519PublicKey]] = {}
        for each in self._file.keys:
            try:
                key = _public_key(each.public_key)
            except ValueError as error:
                raise StartError(f"{path} of --trusted-keys: the key of {each.name}: {error}") from None
            self._by_id[_id_of(key)] = each, key
        if len(self._by_id) < len(self._file.keys):
            raise StartError(f"{path} of --trusted-keys: two entries have the same key")

    def are_required(self, app: str) -> bool:
        """Return whether the releases of an app need a signature."""
        return _covers(self._file.required, app)

    def signer(self, release: Release) -> str:
        """Return the name of the key that has signed a release; empty if its app needs no signature.

        Raises Untrusted.
        """
        if not self.are_required(release.name):
            return ""
        if not release.signature:
            raise Untrusted("it has no signature")
        if not release.is_pinned:
            raise Untrusted("one of its files has no #sha256=, so no signature covers it")
        found = _SIGNATURE.fullmatch(release.signature)
        if not found:
            raise Untrusted("its signature should be <id of a key>:<Ed25519 signature in base64>")
        key_id, value = found[1], base64.b64decode(found[2])
        if key_id not in self._by_id:
            raise Untrusted(f"it is signed with the key {key_id}, which {self._path.name} does not have")
        entry, key = self._by_id[key_id]
        if not _covers(entry.apps, release.name):
            raise Untrusted(f"the key of {entry.name} may not sign for app {release.name!r}")
        from cryptography.exceptions import InvalidSignature

        try:
            key.verify(value, _statement(release))
        except InvalidSignature:
            raise Untrusted(f"its signature with the key of {entry.name} is one of other content") from None
        return entry.name


class SigningKey:
    """The private key of somebody who signs releases."""

    def __init__(self, path: Path) -> None:
        """Read an Ed25519 key in OpenSSH's format, or in PEM. Raises StartError."""
        text = _private_bytes(path)
        cryptography(f"to sign with {path}")
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        is_ssh = b"OPENSSH PRIVATE KEY" in text
        load = serialization.load_ssh_private_key if is_ssh else serialization.load_pem_private_key
        try:
            key = load(text, password=None)
        except TypeError:
            raise StartError(f"{path} has a passphrase: take a key without one") from None
        except (ValueError, UnsupportedAlgorithm):
            # The text of the error may hold parts of the key.
            raise StartError(f"{path} is no private key") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise StartError(f"{path} is no Ed25519 key: make one with atserving key generate")
        self._key = key

    def sign(self, release: Release) -> str:
        """Return the signature of a release. Raises StartError if it does not name the digest of each file."""
        if not release.is_pinned:
            raise StartError("only a release whose files all have #sha256= can be signed: see atserving release put")
        value = base64.b64encode(self._key.sign(_statement(release))).decode()
        return f"{_id_of(self._key.public_key())}:{value}"


def generate(path: Path, comment: str) -> str:
    """Write a new private key to ``path``, which only its owner can read; return the public one, as OpenSSH has it.

    Raises StartError, also if the file exists.
    """
    cryptography("to generate a key")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(private)
    except OSError as error:
        raise StartError(f"can't write {path}: {error.strerror}") from None
    return f"{_open_ssh(key.public_key())} {comment}"


def cryptography(why: str) -> None:
    """Raise StartError if the library ``cryptography`` is not installed."""
    try:
        import cryptography as _  # noqa: F401
    except ModuleNotFoundError:
        raise StartError(f"{why}, install cryptography: pip install '.[signatures]' in a checkout") from None


def _statement(release: Release) -> bytes:
    return _STATEMENT + release.digest.encode()


def _covers(patterns: tuple[str, ...], app: str) -> bool:
    return any(app.startswith(each[:-1]) if each.endswith("*") else app == each for each in patterns)


def _public_key(text: str) -> Ed25519PublicKey:
    """Return the key of a line of OpenSSH. Raises ValueError, StartError."""
    cryptography("to check signatures")
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = serialization.load_ssh_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm, binascii.Error):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError('should be "ssh-ed25519 AAAA..."')
    return key


def _open_ssh(key: Ed25519PublicKey) -> str:
    from cryptography.hazmat.primitives import serialization

    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def _id_of(key: Ed25519PublicKey) -> str:
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def _private_bytes(path: Path) -> bytes:
    """Read the file of a private key. Raises StartError, also if others can read it."""
    try:
        with path.open("rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise StartError(f"others can read {path}: chmod 600 {path}")
            return file.read(_MOST_KEY_BYTES)
    except OSError as error:
        raise StartError(f"can't read {path}: {error.strerror}") from None
