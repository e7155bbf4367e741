"""Reads typed values out of a release's free-form objects, `custom_values` and `model_params`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from atserving.errors import StartError


class Values:
    """The fields of one object; each wrong one is a StartError that names it."""

    def __init__(self, name: str, fields: Mapping[str, Any]) -> None:
        self._name = name
        self._fields = fields

    def positive_int(self, key: str, default: int) -> int:
        return default if key not in self._fields else self._positive_int(key)

    def optional_positive_int(self, key: str) -> int | None:
        return None if key not in self._fields else self._positive_int(key)

    def _positive_int(self, key: str) -> int:
        value = self._fields[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(key, "a positive integer")
        return value

    def integer(self, key: str, default: int) -> int:
        value = self._fields.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, "an integer")
        return value

    def number(self, key: str, default: float) -> float:
        value = self._fields.get(key, default)
        if not _is_number(value):
            raise self._wrong(key, "a finite number")
        return float(value)

    def positive_number(self, key: str, default: float) -> float:
        """``default`` may be infinite; what is given may not."""
        if key not in self._fields:
            return default
        value = self._fields[key]
        if not _is_number(value) or value <= 0:
            raise self._wrong(key, "a positive number")
        return float(value)

    def numbers(self, key: str) -> list[float] | None:
        """One number, or a list of them; None where the field is absent."""
        value = self._fields.get(key)
        if value is None:
            return None
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(_is_number(number) for number in numbers):
            raise self._wrong(key, "a finite number or a list of them")
        return [float(number) for number in numbers]

    def text(self, key: str, default: str) -> str:
        value = self._fields.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a text")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts; empty where the field is absent."""
        value = self._fields.get(key, [])
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self._wrong(key, "a list of texts")
        return value

    def _wrong(self, key: str, should_be: str) -> StartError:
        return StartError(f"{self._name}.{key} is {self._fields.get(key)!r}, should be {should_be}")


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
