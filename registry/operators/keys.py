"""The public keys of an issuer, by the ids that its tokens name: from a file, or fetched now and then from a URL."""

from __future__ import annotations

import asyncio
import http.client
import random
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import jwt
import orjson
import structlog

from atserving import __version__
from atserving.errors import StartError
from atserving.followed_files import FollowedFiles
from atserving.operators import Issuer

log = structlog.get_logger()

# No algorithm with a shared secret, and none without a signature.
_RSA = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
_ALGORITHMS = frozenset({*_RSA, "ES256", "ES384", "ES512", "EdDSA"})
# Larger keys cost more for each token.
_RSA_BITS = range(2048, 8193)

_MOST_BYTES = 256 << 10
_MOST_KEYS = 100
_STEP_S, _FETCH_S = 5.0, 10.0
_EVERY_S = 300.0
_LEAST_S = 2.0
_REMIND_S = 60.0


@dataclass(frozen=True)
class PublicKey:
    """A key, and the algorithms that its issuer may use with it."""

    key: Any
    algorithms: tuple[str, ...]


Keys = dict[str, PublicKey]


class KeySource(Protocol):
    """Where the keys of an issuer come from."""

    @property
    def due_s(self) -> float:
        """When to fetch the keys again, in seconds of time.monotonic()."""

    @property
    def has_keys(self) -> bool:
        """Whether there are any."""

    def find(self, key_id: str) -> PublicKey | None:
        """Return a key, at once."""

    async def fetch(self) -> None:
        """Fetch the keys. A failure leaves those that there are."""


def source_of(issuer: Issuer, folder: Path, wake: Callable[[], None]) -> KeySource:
    """Return the keys of an issuer; it calls ``wake`` when they should be fetched earlier. Raises StartError."""
    if not issuer.jwks.startswith("https://"):
        return FileKeys(issuer, folder / issuer.jwks)
    try:
        trusted = ssl.create_default_context(cafile=folder / issuer.ca if issuer.ca else None)
        _ = urlsplit(issuer.jwks).port
    except (OSError, ssl.SSLError) as error:
        raise StartError(f"issuer {issuer.name!r}: can't load its ca {issuer.ca}: {error}") from None
    except ValueError as error:
        raise StartError(f"issuer {issuer.name!r}: jwks: {error}") from None
    return FetchedKeys(issuer, trusted, wake)


class FileKeys:
    """Keys in a file, which is read again when it changes. One that is wrong changes nothing."""

    due_s = float("inf")
    has_keys = True

    def __init__(self, issuer: Issuer, path: Path) -> None:
        """Raises StartError."""
        self._issuer = issuer
        self._file = FollowedFiles(path)
        self._keys = self._read()

    def find(self, key_id: str) -> PublicKey | None:
        if self._file.changed():
            try:
                self._keys = self._read()
                log.info("issuer keys changed", issuer=self._issuer.name, count=len(self._keys))
            except StartError as error:
                log.error("operators unchanged", reason=str(error))
        return self._keys.get(key_id)

    async def fetch(self) -> None:
        """Do nothing: the file is followed."""

    def _read(self) -> Keys:
        try:
            return parse(self._file.paths[0].read_bytes())
        except OSError as error:
            reason = error.strerror
        except ValueError as error:
            reason = str(error)
        raise StartError(f"issuer {self._issuer.name!r}: jwks: {self._file.paths[0]}: {reason}")


class FetchedKeys:
    """Keys of a URL: fetched every five minutes, and when a token names another one, but not all the time.

    The last known ones count while the issuer is away.
    """

    def __init__(self, issuer: Issuer, trusted: ssl.SSLContext, wake: Callable[[], None]) -> None:
        self.due_s = 0.0
        self._issuer = issuer
        self._trusted = trusted
        self._wake = wake
        self._keys: Keys = {}
        self._asked_s = 0.0
        self._failures = 0
        self._told_s = float("-inf")

    @property
    def has_keys(self) -> bool:
        return bool(self._keys)

    def find(self, key_id: str) -> PublicKey | None:
        found = self._keys.get(key_id)
        soon_s = self._asked_s + _LEAST_S
        if found is None and self.due_s > soon_s:
            # The issuer may have a new key, or be back.
            self.due_s = soon_s
            self._wake()
        return found

    async def fetch(self) -> None:
        self._asked_s = time.monotonic()
        try:
            keys = parse(await _get(self._issuer.jwks, self._trusted))
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._failures += 1
            self._tell(str(error) or "no answer in time")
            pause_s = min(2.0 ** min(self._failures - 1, 10), _REMIND_S)
        else:
            if keys.keys() != self._keys.keys():
                log.info("issuer keys changed", issuer=self._issuer.name, count=len(keys))
            self._keys = keys
            self._failures = 0
            self._told_s = float("-inf")
            pause_s = _EVERY_S
        # Spreads the registries.
        self.due_s = time.monotonic() + pause_s * random.uniform(0.8, 1.0)  # noqa: S311

    def _tell(self, reason: str) -> None:
        now_s = time.monotonic()
        if now_s - self._told_s >= _REMIND_S:
            self._told_s = now_s
            log.warning("issuer lost", issuer=self._issuer.name, reason=reason[:300], keys=len(self._keys))


def parse(text: bytes) -> Keys:
    """Return the keys of a JSON Web Key Set that can check signatures, by their ids. Raises ValueError."""
    found = orjson.loads(text)
    keys = found.get("keys") if isinstance(found, dict) else None
    if not isinstance(keys, list):
        raise ValueError("is no JSON Web Key Set: it has no list of keys")
    if len(keys) > _MOST_KEYS:
        raise ValueError(f"{len(keys)} keys exceed the limit of {_MOST_KEYS}")
    objects = [each for each in keys if isinstance(each, dict) and isinstance(each.get("kid", ""), str)]
    usable = {each.get("kid", ""): key for each in objects if (key := _key(each))}
    if not usable:
        raise ValueError("has no key for signatures: RSA of 2048 to 8192 bits, EC, or Ed25519")
    return usable


def _key(fields: dict[str, Any]) -> PublicKey | None:
    """Return a key; None if it is not for signatures, or of a kind that is not taken."""
    if fields.get("kty") not in ("RSA", "EC", "OKP") or fields.get("use", "sig") != "sig":
        return None
    try:
        known = jwt.PyJWK(fields)
    except Exception:
        # Of many kinds, for fields of wrong types.
        return None
    named = known.algorithm_name
    if named not in _ALGORITHMS or (named in _RSA and known.key.key_size not in _RSA_BITS):
        return None
    return PublicKey(known.key, (named,) if "alg" in fields or named not in _RSA else _RSA)


async def _get(url: str, trusted: ssl.SSLContext) -> bytes:
    """Return the body of a page. Raises OSError (TimeoutError, too), HTTPException, ValueError."""
    parts = urlsplit(url)
    # A thread, as the standard library's client waits; without proxies of the environment, and without redirects.
    client = http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=_STEP_S, context=trusted)
    path = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
    try:
        async with asyncio.timeout(_FETCH_S):
            return await asyncio.to_thread(_read, client, path)
    finally:
        # Ends a thread that still reads: each byte of a slow host gives it more time.
        with suppress(OSError):
            if client.sock:
                socket.socket.shutdown(client.sock, socket.SHUT_RDWR)


def _read(client: http.client.HTTPSConnection, path: str) -> bytes:
    try:
        client.request("GET", path, headers={"accept": "application/json", "user-agent": f"atserving/{__version__}"})
        response = client.getresponse()
        if response.status != 200:
            raise ValueError(f"it answers {response.status}")
        body = response.read(_MOST_BYTES + 1)
        if len(body) > _MOST_BYTES:
            raise ValueError(f"its answer exceeds the limit of {_MOST_BYTES} bytes")
        return body
    finally:
        client.close()
