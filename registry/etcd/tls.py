"""The certificates with which a registry calls etcd."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from atserving.certificates import Certificates
from atserving.errors import StartError


class Tls:
    """TLS to etcd by files in PEM, which are read again once they have changed."""

    def __init__(self, ca: Path | None = None, cert: Path | None = None, key: Path | None = None) -> None:
        """``ca`` are the authorities to trust; None: the system's. ``cert`` is the client's. Raises StartError."""
        self._ca, self._cert, self._key = ca, cert, key
        self._files = [path for path in (ca, cert, key) if path]
        self._loaded = Certificates(self._files, self._load)

    @property
    def credentials(self) -> grpc.ChannelCredentials:
        """The credentials for a new channel; another object after the files have changed."""
        return self._loaded.now

    def _load(self) -> grpc.ChannelCredentials:
        try:
            # Check the files here: gRPC reads them only when it connects, and its error does not name the file.
            check = ssl.create_default_context(cafile=self._ca)
            if self._cert and self._key:
                check.load_cert_chain(self._cert, self._key, password="")
            ca, key, cert = (path.read_bytes() if path else None for path in (self._ca, self._key, self._cert))
        except (OSError, ValueError) as error:
            raise StartError(f"can't load {', '.join(map(str, self._files))}: {error}") from None
        return grpc.ssl_channel_credentials(ca, key, cert)
