"""The command lines of the mesh's processes, on the loopback address of this machine."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from atserving.loopback import HOSTS
from atserving.tls import TlsFiles

BIN = Path(sys.executable).parent
"""The programs of this Python environment: etcd, etcdctl, envoy, atserving."""


def etcd(
    data: Path,
    client_url: str,
    peer_urls: Mapping[str, str],
    *flags: str,
    name: str = "default",
) -> list[str]:
    """Return the command of one member; ``peer_urls`` has those of all members of its cluster, by name.

    It takes gRPC alone, which no web page can send: etcd's JSON API would take a page's request without a question.
    """
    peer_url = peer_urls[name]
    return [
        *(str(BIN / "etcd"), "--name", name, "--data-dir", str(data)),
        *("--listen-client-urls", client_url, "--advertise-client-urls", client_url),
        *("--listen-peer-urls", peer_url, "--initial-advertise-peer-urls", peer_url),
        *("--initial-cluster", ",".join(f"{each}={url}" for each, url in peer_urls.items())),
        *("--enable-grpc-gateway=false", "--host-whitelist", ",".join(HOSTS)),
        *flags,
    ]


def registry(etcd: Sequence[str], listen: str, *flags: str) -> list[str]:
    """Return the command of a registry; ``etcd`` has the addresses of etcd's members."""
    return [sys.executable, "-m", "registry", "--etcd", ",".join(etcd), "--listen", listen, *flags]


def gate(registry: str, listen: str, *flags: str) -> list[str]:
    """Return the command of a gate."""
    return [sys.executable, "-m", "gate", "--registry", registry, "--listen", listen, *flags]


def evaluator(registry: str, app: str, version: str, *flags: str) -> list[str]:
    """Return the command of an evaluator, which listens on any free port."""
    release = ["--app", app, "--version", version]
    return [sys.executable, "-m", "evaluator", *release, "--registry", registry, "--listen", "127.0.0.1:0", *flags]


def tls(files: TlsFiles) -> list[str]:
    """Return the flags of a service for TLS."""
    paths = ["--tls-cert", str(files.cert), "--tls-key", str(files.key), "--tls-ca", str(files.ca)]
    return [*paths, "--tls-domain", files.domain]


def etcd_tls(files: TlsFiles, client: str) -> list[str]:
    """Return the flags of etcd for TLS. It takes certificates with the DNS name ``client`` alone."""
    paths = ["--cert-file", str(files.cert), "--key-file", str(files.key), "--trusted-ca-file", str(files.ca)]
    # Its gateway would call it with its own certificate, again and again.
    paths += ["--enable-grpc-gateway=false"]
    return [*paths, "--client-cert-auth", "--client-cert-allowed-hostname", client]


def etcd_client_tls(files: TlsFiles) -> list[str]:
    """Return the flags of a registry for TLS with etcd."""
    return ["--etcd-cert", str(files.cert), "--etcd-key", str(files.key), "--etcd-ca", str(files.ca)]


def envoy(config: Path, *flags: str) -> list[str]:
    """Return the command of the edge, with one worker thread."""
    options = ["--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warning"]
    # A misspelt condition of a callers' file would let everybody pass.
    options.append("--reject-unknown-dynamic-fields")
    return [str(BIN / "envoy"), "-c", str(config), *options, *flags]


def file_server(folder: Path, port: int, *flags: str) -> list[str]:
    """Return the command of an HTTP server of a folder's files."""
    return [sys.executable, "-m", "atserving.local.files", str(folder), str(port), *flags]
