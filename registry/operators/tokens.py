"""Checks the tokens (JWTs) of the issuers that the file of operators names.

RFC 7519, with the advice of RFC 8725: the issuer's key decides which algorithms count, never the token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt

from atserving.errors import Unauthenticated, Unavailable
from atserving.operators import Issuer
from registry.operators.keys import KeySource, source_of

_LEEWAY_S = 30
_MOST_SUBJECT_CHARS = 100
_REASONS: dict[type[jwt.PyJWTError], str] = {
    jwt.ExpiredSignatureError: "has expired: get a new one",
    jwt.ImmatureSignatureError: "is not valid yet",
    jwt.InvalidAudienceError: "is for another audience",
    jwt.InvalidSignatureError: "has a wrong signature",
    jwt.InvalidAlgorithmError: "has an algorithm that its key is not for",
}


@dataclass(frozen=True)
class Bearer:
    """Who shows a token, as its issuer says."""

    issuer: str
    subject: str
    groups: tuple[str, ...]


class Tokens:
    """Checks tokens by the keys of their issuers."""

    def __init__(
        self, issuers: Sequence[Issuer], folder: Path, wake: Callable[[], None], earlier: Tokens | None = None
    ) -> None:
        """Take over the keys that ``earlier`` has of the same issuers. Raises StartError."""
        self._sources: dict[Issuer, KeySource] = {}
        for issuer in issuers:
            known = earlier._sources.get(issuer) if earlier else None
            self._sources[issuer] = known or source_of(issuer, folder, wake)
        self._by_claim = {each.issuer: each for each in issuers}

    def read(self, token: str) -> Bearer | None:
        """Return who shows a token; None if no issuer of the file has issued it.

        Raises Unauthenticated, and Unavailable while there are no keys.
        """
        try:
            unchecked = jwt.decode_complete(token, options={"verify_signature": False})
            issuer = self._by_claim.get(unchecked["payload"].get("iss"))
            if issuer is None:
                return None
            claims = self._check(token, issuer, unchecked["header"].get("kid", ""))
        except jwt.MissingRequiredClaimError as error:
            raise Unauthenticated(f"the token lacks {error.claim}") from None
        except jwt.PyJWTError as error:
            reason = next((text for kind, text in _REASONS.items() if isinstance(error, kind)), "is malformed")
            raise Unauthenticated(f"the token {reason}") from None
        except (ValueError, TypeError, OverflowError, RecursionError):
            # JSON that the library does not expect.
            raise Unauthenticated("the token is malformed") from None
        return _bearer(issuer, claims)

    def _check(self, token: str, issuer: Issuer, key_id: str) -> dict[str, Any]:
        source = self._sources[issuer]
        key = source.find(key_id)
        if key is None and not source.has_keys:
            raise Unavailable(f"the keys of the issuer {issuer.name} are not here yet", retry_after_s=1.0)
        if key is None:
            raise Unauthenticated(f"the issuer {issuer.name} has no such key: if it is new, try again soon")
        return jwt.decode(
            token,
            key.key,
            algorithms=key.algorithms,
            audience=issuer.audience,
            issuer=issuer.issuer,
            leeway=_LEEWAY_S,
            options={"require": ["exp", "iss", "aud", issuer.subject_claim]},
        )

    async def refresh(self) -> float | None:
        """Fetch the keys that are due, and return in how many seconds the next ones are; None: never."""
        now_s = time.monotonic()
        await asyncio.gather(*(each.fetch() for each in self._sources.values() if each.due_s <= now_s))
        next_s = min((each.due_s for each in self._sources.values()), default=float("inf"))
        return None if next_s == float("inf") else max(next_s - time.monotonic(), 0.0)


def _bearer(issuer: Issuer, claims: dict[str, Any]) -> Bearer:
    subject = claims[issuer.subject_claim]
    if not isinstance(subject, str) or not subject.isprintable() or not 0 < len(subject) <= _MOST_SUBJECT_CHARS:
        raise Unauthenticated(f"the token's {issuer.subject_claim} is no name of at most {_MOST_SUBJECT_CHARS} letters")
    named = claims.get(issuer.groups_claim)
    groups = named if isinstance(named, list) else [named]
    return Bearer(issuer.name, subject, tuple(each for each in groups if isinstance(each, str)))
