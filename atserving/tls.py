"""Mutual TLS between the processes of the mesh: the files, the names in certificates, and what each end makes of both.

The name of a process is a URI in its certificate, as SPIFFE has it: ``spiffe://<domain>/<role>``. Servers tell
their peers apart by it. gRPC's own client compares no URIs, so those who serve such clients also have the DNS name
``<role>.<domain>``, which no other role has.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from atserving.certificates import Certificates
from atserving.errors import StartError

ENVOY, GATE, REGISTRY, EVALUATOR, OPERATOR = "envoy", "gate", "registry", "evaluator", "operator"
"""The roles. An evaluator's goes on with its app, an operator's with a name: ``evaluator/digits``, ``operator/ada``."""

DEFAULT_DOMAIN = "atserving"

HANDSHAKE_S = 5.0
"""A peer that does not finish its handshake within this time is refused."""
CLOSE_S = 10.0
"""A connection that is closed gets this time to send the rest and to part."""

_DOMAIN = re.compile(r"[a-z0-9][a-z0-9._-]{0,200}")
# Clients of gRPC ask them by a DNS name.
_ASKED_BY_GRPC = (REGISTRY, EVALUATOR)
_HANDSHAKE_TURNS = 4


@dataclass(frozen=True)
class TlsFiles:
    """The files of a process in PEM: its certificate with the chain, its key, and the authorities that it trusts."""

    cert: Path
    key: Path
    ca: Path
    domain: str = DEFAULT_DOMAIN

    def uri(self, role: str) -> str:
        """Return the name of a role."""
        return f"spiffe://{self.domain}/{role}"

    def dns_name(self, role: str) -> str:
        """Return the DNS name of a role; all evaluators share one."""
        return f"{role.partition('/')[0]}.{self.domain}"


class _Loaded(NamedTuple):
    """The contexts and credentials made of the files."""

    server: ssl.SSLContext
    client: ssl.SSLContext
    credentials: grpc.ChannelCredentials
    begins_s: int
    expires_s: int


class Tls:
    """The certificates of a process. It reads the files again once they have changed.

    New connections use the new files, and open ones go on. Wrong new files change nothing.
    """

    def __init__(self, files: TlsFiles, role: str | None = None) -> None:
        """``role`` is what the certificate should be for; None: for any. Raises StartError."""
        if not _DOMAIN.fullmatch(files.domain):
            raise StartError(f"--tls-domain {files.domain!r} should match {_DOMAIN.pattern}")
        self.files = files
        self._role = role
        self._loaded = Certificates((files.cert, files.key, files.ca), self._load)

    @property
    def server(self) -> ssl.SSLContext:
        """The context for a new connection of a client."""
        return self._loaded.now.server

    @property
    def client(self) -> ssl.SSLContext:
        """The context for a new connection to a server. It checks no name."""
        return self._loaded.now.client

    @property
    def credentials(self) -> grpc.ChannelCredentials:
        """The credentials for a new channel; another object after the files have changed."""
        return self._loaded.now.credentials

    @property
    def begins_s(self) -> int:
        """The Unix time from which on the certificate is valid."""
        return self._loaded.now.begins_s

    @property
    def expires_s(self) -> int:
        """The Unix time at which the certificate expires."""
        return self._loaded.now.expires_s

    def uri(self, role: str) -> str:
        """Return the name of a role."""
        return self.files.uri(role)

    def options(self, role: str) -> list[tuple[str, str]]:
        """Return the options of a channel to a role: it takes the certificate of no other, at whatever address."""
        return [("grpc.ssl_target_name_override", self.files.dns_name(role))]

    def _load(self) -> _Loaded:
        """Read the files, and check that they fit together. Raises StartError."""
        files = self.files
        try:
            pem = {path: path.read_bytes() for path in (files.ca, files.key, files.cert)}
        except OSError as error:
            raise StartError(f"can't read {error.filename} for TLS: {error.strerror}") from None
        server, client = (self._context(each) for each in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT))
        server.set_alpn_protocols(["h2"])
        # A peer that comes again shows its certificate again.
        server.num_tickets = 0
        server.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
        try:
            own = _seen_by_peers(server, client)
        except ssl.SSLError as error:
            raise StartError(
                f"--tls-cert {files.cert} is none that a peer with --tls-ca {files.ca} takes: {why(error)}"
            ) from None
        self._check(own)
        credentials = grpc.ssl_channel_credentials(pem[files.ca], pem[files.key], pem[files.cert])
        begins_s, expires_s = (ssl.cert_time_to_seconds(str(own[each])) for each in ("notBefore", "notAfter"))
        return _Loaded(server, client, credentials, begins_s, expires_s)

    def _context(self, protocol: ssl._SSLMethod) -> ssl.SSLContext:
        files = self.files
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(files.ca)
        except (OSError, ValueError):
            raise StartError(f"--tls-ca {files.ca} has no certificate of an authority (PEM)") from None
        try:
            # A key under a password would ask for it at the terminal.
            context.load_cert_chain(files.cert, files.key, password="")
        except (OSError, ValueError) as error:
            reason = why(error) if isinstance(error, OSError) else str(error)
            raise StartError(
                f"--tls-cert {files.cert} and --tls-key {files.key} are no certificate and its key (PEM): {reason}"
            ) from None
        return context

    def _check(self, own: dict[str, Any]) -> None:
        """Check the names of the own certificate. Raises StartError."""
        if self._role is None:
            return
        wanted = [("URI", self.uri(self._role))]
        if self._role.partition("/")[0] in _ASKED_BY_GRPC:
            wanted.append(("DNS", self.files.dns_name(self._role)))
        for kind, name in wanted:
            if (kind, name) not in own.get("subjectAltName", ()):
                found = ", ".join(name for _, name in own.get("subjectAltName", ())) or "no name"
                raise StartError(
                    f"--tls-cert {self.files.cert} is for {found[:300]}; this process needs the {kind} {name} in it"
                )


def _seen_by_peers(server: ssl.SSLContext, client: ssl.SSLContext) -> dict[str, Any]:
    """Return the own certificate as a peer with the same files sees it. Raises ssl.SSLError if a peer refuses it."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(to_client, to_server)
    asked = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(_HANDSHAKE_TURNS):
        for each in (asking, asked):
            try:
                each.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return asking.getpeercert() or {}


def peer_names(transport: asyncio.BaseTransport) -> tuple[str, ...]:
    """Return the URIs in the verified certificate of a connection's peer; none without TLS."""
    found = transport.get_extra_info("peercert")
    return tuple(name for kind, name in found.get("subjectAltName", ()) if kind == "URI") if found else ()


_REASONS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it shows no certificate",
    "HTTP_REQUEST": "it speaks plain text, and this port TLS",
    "WRONG_VERSION_NUMBER": "it speaks plain text, and this port TLS",
    "UNSUPPORTED_PROTOCOL": "its TLS is older than 1.2",
    "TLSV1_ALERT_UNKNOWN_CA": "it does not trust the authority of this process's certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it refuses this process's certificate",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "it refuses this process's certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "this process's certificate has expired for it",
    "KEY_VALUES_MISMATCH": "the key is another's",
}


def why(error: OSError) -> str:
    """Return why a handshake has failed, in words for an operator."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return _REASONS.get(error.reason or "", (error.reason or str(error)).replace("_", " ").lower())
    return error.strerror or str(error)
