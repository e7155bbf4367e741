"""What a request's resources and images may measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from atserving.errors import InvalidArgument
from evaluator.options import Options


@dataclass(frozen=True)
class Limits:
    """What a request may bring. The defaults of an image's are the contract's (section 4); a release may set its own.

    ``max_bytes`` is for one resource, ``max_request_bytes`` for all of a request's together.
    """

    max_bytes: int = 10 << 20
    max_width: int = 4999
    max_height: int = 4999
    max_request_bytes: int = 64 << 20

    @staticmethod
    def of_release(custom_values: Mapping[str, Any]) -> Limits:
        """Those that ``max_bytes``, ``max_width`` and ``max_height`` set. Raises StartError."""
        values = Options("custom_values", custom_values)
        return Limits(
            values.positive_int("max_bytes", Limits.max_bytes),
            values.positive_int("max_width", Limits.max_width),
            values.positive_int("max_height", Limits.max_height),
            values.positive_int("max_request_bytes", Limits.max_request_bytes),
        )


class Budget:
    """The bytes that a request's resources may still have together."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = self._left = max_bytes

    def take(self, count: int) -> None:
        """Raises InvalidArgument where that is too much."""
        self._left -= count
        if self._left < 0:
            raise InvalidArgument(f"the request's resources are larger than {self._max_bytes} bytes together")
