"""The types of the fields of config values, and what reads those that need more than a type.

Readers raise ValueError.
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Annotated, Literal

from msgspec import Meta

from atserving import hosts

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z"
"""The pattern of the name of an app or a version."""

_MAX_FILES, _MAX_ALIASES, _MAX_HOSTS = 1000, 100, 1000
_MAX_DURATION_CHARS = 64
_GO_UNITS_NS = {"ns": 1, "us": 1e3, "µs": 1e3, "ms": 1e6, "s": 1e9, "m": 60e9, "h": 3600e9}
_GO_PART = r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)"
_MAX_DURATION = timedelta(hours=1)
_LEAST_TIMEOUT = timedelta(milliseconds=1)


class WrongField(ValueError):  # noqa: N818
    """A value inside a field is wrong; ``where`` continues the field's name."""

    def __init__(self, where: str, message: str) -> None:
        super().__init__(message)
        self.where = where


def is_name(text: str) -> bool:
    """Return whether ``text`` is a valid name of an app or a version."""
    return re.fullmatch(NAME_PATTERN, text) is not None


def parse_duration(value: object) -> timedelta:
    """Parse nanoseconds, or Go's notation such as ``"100ms"`` or ``"1m30s"``; the result is exact to a microsecond.

    Raises ValueError.
    """
    if isinstance(value, timedelta):
        return value
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError('should be nanoseconds or a duration such as "100ms"')
    if isinstance(value, int):
        nanoseconds = float(value)
    elif len(value) <= _MAX_DURATION_CHARS and re.fullmatch(f"(?:{_GO_PART})+", value):
        nanoseconds = sum(float(number) * _GO_UNITS_NS[unit] for number, unit in re.findall(_GO_PART, value))
    else:
        raise ValueError('should be nanoseconds or a duration such as "100ms"')
    if not 0 <= nanoseconds <= _MAX_DURATION / timedelta(microseconds=1) * 1e3:
        raise ValueError("should be between 0 and 1h")
    return timedelta(microseconds=nanoseconds / 1e3)


def parse_timeout(value: object) -> timedelta:
    """Parse a duration of at least 1 ms: with a shorter one, every eval would end as soon as it begins."""
    timeout = parse_duration(value)
    if timeout < _LEAST_TIMEOUT:
        microseconds = timeout // timedelta(microseconds=1)
        raise ValueError(f"is {microseconds} µs, should be at least 1 ms; a number means nanoseconds")
    return timeout


def nanoseconds_of(value: timedelta) -> int:
    """Return a duration in nanoseconds."""
    return value // timedelta(microseconds=1) * 1000


def check_port(address: object) -> object:
    """Check the port of an address."""
    if (
        isinstance(address, str)
        and (found := re.search(r":(\d{1,5})\Z", address[-6:]))
        and not 0 < int(found[1]) <= 65535
    ):
        raise ValueError("the port should be between 1 and 65535")
    return address


_FILE_URI = r"^(file|https?|qiniu)://.+\Z"
_WRONG_DIGEST = re.compile(r"#sha256=(?![0-9A-Fa-f]{64}\Z)")

Name = Annotated[str, Meta(pattern=NAME_PATTERN)]
Device = Annotated[str, Meta(pattern=r"^(CPU|GPU(:\d{1,3})?)\Z")]
FileUri = Annotated[str, Meta(pattern=_FILE_URI)]
Address = Annotated[str, Meta(pattern=r"^(\[[0-9A-Fa-f:.%\w]+\]|[^\[\]\s/:]+):\d{1,5}\Z", max_length=300)]
Group = Annotated[str, Meta(pattern=r"^[^\s,]{1,200}\Z")]
Phase = Literal["staging", "production"]


def check_file(uri: object) -> object:
    """Check the URI of a file, and the digest in it."""
    if isinstance(uri, str) and (wrong := _wrong_uri(uri)):
        raise ValueError(wrong)
    return uri


def _wrong_uri(uri: str) -> str:
    """Return what is wrong with the URI of a file; empty if nothing is."""
    if not re.search(_FILE_URI, uri):
        return "should be a file, http, https or qiniu URI"
    return "#sha256= should be followed by 64 hexadecimal digits" if _WRONG_DIGEST.search(uri) else ""


def check_hosts(patterns: object) -> object:
    """Check patterns of hosts, see :mod:`atserving.hosts`."""
    if isinstance(patterns, list | tuple) and len(patterns) > _MAX_HOSTS:
        raise ValueError(f"{len(patterns)} hosts exceed the limit of {_MAX_HOSTS}")
    for place, each in enumerate(patterns if isinstance(patterns, list | tuple) else ()):
        if isinstance(each, str) and each != hosts.ALL:
            try:
                hosts.parse(each)
            except ValueError as error:
                raise WrongField(f"[{place}]", str(error)) from None
    return patterns


def check_files(files: object) -> object:
    """Check the URIs of files by name, since msgspec's error would not name the file."""
    if isinstance(files, dict) and len(files) > _MAX_FILES:
        raise ValueError(f"{len(files)} files exceed the limit of {_MAX_FILES}")
    for name, uri in files.items() if isinstance(files, dict) else ():
        if wrong := _wrong_uri(uri if isinstance(uri, str) else ""):
            raise WrongField(f".{name}", wrong)
    return files


def check_aliases(aliases: object) -> object:
    """Check aliases by name, as :func:`check_files` does."""
    if isinstance(aliases, dict) and len(aliases) > _MAX_ALIASES:
        raise ValueError(f"{len(aliases)} aliases exceed the limit of {_MAX_ALIASES}")
    for name, version in aliases.items() if isinstance(aliases, dict) else ():
        if not is_name(name):
            raise WrongField(f".{name[:80]}", "is no name that an alias can have")
        if not isinstance(version, str) or not is_name(version):
            raise WrongField(f".{name}", "should be a version")
    return aliases
