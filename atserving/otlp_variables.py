"""The variables of an exporter of traces, ``OTEL_EXPORTER_OTLP_*`` and ``OTEL_BSP_*``, checked.

OpenTelemetry's own readers ignore wrong values, and log them with the secrets in them. Everything here raises a
StartError with the name of the variable, and without its value where that may be a secret.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from atserving.errors import StartError
from atserving.tracing import variable

PORTS = {"grpc": 4317, "http/protobuf": 4318}
"""The protocols, with their usual ports."""

_MOST = (1 << 31) - 1
_HEADER_NAME = re.compile(r"[0-9a-z!#$%&'*+.^_`|~-]+")
_HEADER_VALUE = re.compile(r"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")


def setting(name: str, environ: Mapping[str, str] = os.environ) -> tuple[str, str]:
    """Return the variable that holds a setting of the exporter, and its value; empty if it is not set.

    The variable for traces alone counts before that for all signals.
    """
    own, general = f"OTEL_EXPORTER_OTLP_TRACES_{name}", f"OTEL_EXPORTER_OTLP_{name}"
    value = variable(own, environ)
    return (own, value) if value else (general, variable(general, environ))


def protocol(environ: Mapping[str, str] = os.environ) -> str:
    """Return the protocol, one of :data:`PORTS`."""
    name, value = setting("PROTOCOL", environ)
    if value and value not in PORTS:
        raise StartError(f"{name} is {value!r}, should be {' or '.join(PORTS)}")
    return value or "grpc"


def endpoint(environ: Mapping[str, str] = os.environ) -> str:
    """Return the URL of the collector, with the path for HTTP."""
    used = protocol(environ)
    name, value = setting("ENDPOINT", environ)
    url = value or f"http://localhost:{PORTS[used]}"
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if "@" in url:
        raise StartError(f"{name} should have no credentials: put them into OTEL_EXPORTER_OTLP_HEADERS")
    if not is_url or not url.isascii() or any(each.isspace() for each in url):
        raise StartError(f"{name} is {url!r}, should be a URL such as http://collector:{PORTS[used]}")
    return url if used == "grpc" or "_TRACES_" in name else f"{url.rstrip('/')}/v1/traces"


def headers(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the headers for the collector; names are in lower case."""
    name, value = setting("HEADERS", environ)
    found = {}
    for each in filter(str.strip, value.split(",")):
        key, _, content = (unquote(part).strip() for part in each.partition("="))
        if not (_HEADER_NAME.fullmatch(key.lower()) and _HEADER_VALUE.fullmatch(content)):
            # The value is a secret.
            raise StartError(
                f"{name} should have the form name=value,name=value, in ASCII, with a comma or a percent sign "
                "in a value as %2C or %25"
            )
        found[key.lower()] = content
    return found


def number(name: str, default: int, environ: Mapping[str, str] = os.environ) -> int:
    """Return a variable that is a whole number above 0."""
    text = variable(name, environ)
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(_MOST)) and 0 < int(text) <= _MOST):
        raise StartError(f"{name} is {text!r}, should be a whole number from 1 to {_MOST}")
    return int(text)


def own_certificate(environ: Mapping[str, str] = os.environ) -> tuple[str, str] | None:
    """Return the files with the certificate and the key to show the collector; None without."""
    name, certificate = setting("CLIENT_CERTIFICATE", environ)
    key_name, key = setting("CLIENT_KEY", environ)
    if bool(certificate) != bool(key):
        given, missing = (name, key_name) if certificate else (key_name, name)
        raise StartError(f"{given} is set, but {missing} is not")
    return (certificate, key) if certificate else None


def check(environ: Mapping[str, str] = os.environ) -> None:
    """Check what the exporters of gates and evaluators read themselves, and that they will take the rest."""
    used = protocol(environ)
    endpoint(environ)
    headers(environ)
    name, value = setting("COMPRESSION", environ)
    if value.lower() not in ("", "none", "gzip", "deflate")[: 3 if used == "grpc" else 4]:
        raise StartError(f"{name} is {value!r}, should be gzip or none")
    name, value = setting("TIMEOUT", environ)
    try:
        is_time = not value or 0 < float(value) <= _MOST
    except ValueError:
        is_time = False
    if not is_time:
        raise StartError(f"{name} is {value!r}, should be a number of seconds above 0")
    name = "OTEL_RESOURCE_ATTRIBUTES"
    if not all("=" in each for each in filter(str.strip, variable(name, environ).split(","))):
        raise StartError(f"{name} should have the form name=value,name=value")
    _check_files(environ)


def _check_files(environ: Mapping[str, str]) -> None:
    context = ssl.create_default_context()
    own = own_certificate(environ)
    for kind in ("CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY"):
        name, path = setting(kind, environ)
        if path and not Path(path).is_file():
            raise StartError(f"{name} is {path!r}, which is no file")
    name, authorities = setting("CERTIFICATE", environ)
    try:
        if authorities:
            context.load_verify_locations(authorities)
        name = setting("CLIENT_CERTIFICATE", environ)[0]
        if own:
            # Without a terminal, nobody could give a password.
            context.load_cert_chain(*own, password="")
    except OSError as error:
        raise StartError(f"{name} has no usable certificate, or not that of its key: {error}") from None
