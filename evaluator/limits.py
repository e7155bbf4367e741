"""What an image of a request may measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evaluator.values import Values


@dataclass(frozen=True)
class Limits:
    """What an image may measure. The defaults are the contract's (section 4); a release may set its own."""

    max_bytes: int = 10 << 20
    max_width: int = 4999
    max_height: int = 4999

    @staticmethod
    def of_release(custom_values: Mapping[str, Any]) -> Limits:
        """Those that ``max_bytes``, ``max_width`` and ``max_height`` set. Raises StartError."""
        values = Values("custom_values", custom_values)
        return Limits(
            values.positive_int("max_bytes", Limits.max_bytes),
            values.positive_int("max_width", Limits.max_width),
            values.positive_int("max_height", Limits.max_height),
        )
