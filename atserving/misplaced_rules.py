"""Access rules under a key that nobody knows: they close the apps that the key names.

Such a key lies below ``/ava/serving/app/``, and it is misspelt, or one of a newer version. It may hold rules if a part
of it is like ``metadata``, if its value has a field like one of theirs, or if its value is no JSON object.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from itertools import islice

from atserving.config import (
    DEFAULT_APP_METADATA_KEY,
    PREFIX,
    MalformedConfig,
    app_metadata_key,
    fields_of,
    is_known,
    may_be_rule,
)

_BELOW = f"{PREFIX}app/"
_METADATA, _DEFAULT = ("metadata",), ("default",)
_KINDS = (*_METADATA, *_DEFAULT, "routing")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_NEAR = 0.8
# Comparing costs the square of the length.
_MAX_KEY_CHARS, _MAX_COMPARED_CHARS, _MAX_PARTS, _MAX_FIELDS = 300, 32, 8, 100


def may_hold(key: str, value: str | bytes) -> bool:
    """Return whether a key is unknown, and may hold access rules all the same."""
    if not key.startswith(_BELOW) or is_known(key):
        return False
    if any(_is_like(part, _METADATA) for part in _parts(key)):
        return True
    try:
        fields = fields_of(value)
    except MalformedConfig:
        return True
    return any(may_be_rule(name) for name in islice(fields, _MAX_FIELDS))


def apps_of(key: str) -> tuple[str, ...]:
    """Return the apps that an unknown key names; an empty name stands for those without rules of their own."""
    parts = _parts(key)
    named = [part for part in parts if not _is_like(part, _KINDS)]
    if any(_is_like(part, _DEFAULT) for part in (parts[:1] if named else parts)):
        return ("", *named)
    # An app may be named as a kind is.
    return tuple(named or parts[1:])


def consequence(key: str) -> str:
    """Return what an unknown key does that may hold access rules, and what to do about it."""
    apps = apps_of(key)
    is_one_app = len(apps) == 1 and bool(apps[0])
    right = DEFAULT_APP_METADATA_KEY if "" in apps else app_metadata_key(apps[0] if is_one_app else "<app>")
    if not apps:
        return f"access rules would be at {right}; delete the key, which closes no app"
    whose = " and ".join(f"app {app!r}" if app else "apps without rules of their own" for app in apps)
    return f"access rules would be at {right}; {whose} {'is' if is_one_app else 'are'} closed until you delete the key"


def _parts(key: str) -> list[str]:
    return _NAME.findall(key.removeprefix(_BELOW)[:_MAX_KEY_CHARS])[:_MAX_PARTS]


def _is_like(part: str, known: Collection[str]) -> bool:
    return len(part) <= _MAX_COMPARED_CHARS and bool(difflib.get_close_matches(part.lower(), known, 1, _NEAR))
