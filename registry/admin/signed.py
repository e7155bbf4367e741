"""Refuses releases without a signature that counts, and names those that etcd has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from atserving.config import Release
from atserving.errors import FailedPrecondition, InvalidArgument, StartError
from atserving.signatures import TrustedKeys, Untrusted
from registry.admin.state import AppState


class Signatures:
    """What the file of ``--trusted-keys`` wants of releases; without one, nothing.

    The file is read for each question: it is small, publications are rare, and so its last state counts.
    """

    def __init__(self, path: Path | None) -> None:
        """Read the file once. Raises StartError."""
        self._path = path
        if path:
            TrustedKeys(path)

    def check(self, before: AppState, after: AppState) -> None:
        """Refuse new contents and new signatures that do not count. Raises InvalidArgument, FailedPrecondition."""
        if not self._path:
            return
        known = before.releases
        new = [each for version, each in after.releases.items() if _signed(known.get(version)) != _signed(each)]
        if not new:
            return
        try:
            keys = TrustedKeys(self._path)
        except StartError as error:
            raise FailedPrecondition(f"no signature can be checked: {error}") from None
        for each in new:
            if reason := _refusal(keys, each):
                reason = f"{each.name} {each.version}: {reason}, see --trusted-keys of the registry"
                raise InvalidArgument(f"signature: {reason}", fields={"signature": reason})

    def judge(self) -> Callable[[Release], str]:
        """Return a function that says why evaluators with the same keys do not start a release; empty: they do."""
        if not self._path:
            return lambda _: ""
        try:
            keys = TrustedKeys(self._path)
        except StartError as error:
            reason = f"no signature can be checked: {error}"
            return lambda _: reason
        return lambda release: _refusal(keys, release)


def _signed(release: Release | None) -> tuple[str, str] | None:
    return (release.digest, release.signature) if release else None


def _refusal(keys: TrustedKeys, release: Release) -> str:
    try:
        keys.signer(release)
    except Untrusted as error:
        return str(error)
    return ""
