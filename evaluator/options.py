"""Reads typed values from the free-form objects of a release, ``custom_values`` and ``model_params``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from atserving.errors import StartError


class Options:
    """The fields of one object. Reading a wrong one raises a StartError that names it."""

    def __init__(self, name: str, fields: Mapping[str, Any]) -> None:
        self._name = name
        self.fields = fields
        """The object itself, as its writer wrote it."""

    def __contains__(self, key: str) -> bool:
        return key in self.fields

    def having(self, **fields: Any) -> Options:
        """Return these options with some fields set."""
        return Options(self._name, {**self.fields, **fields})

    def wrong(self, key: str, should_be: str) -> StartError:
        """Return the error for a field that is not what it should be."""
        return StartError(f"{self._name}.{key} is {self.fields.get(key)!r}, should be {should_be}")

    def positive_int(self, key: str, default: int | None = None) -> int:
        """Return the field, or ``default``; without a default the field is required."""
        return default if key not in self.fields and default is not None else self._positive_int(key)

    def optional_positive_int(self, key: str) -> int | None:
        return None if key not in self.fields else self._positive_int(key)

    def _positive_int(self, key: str) -> int:
        value = self.fields.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(key, "a positive integer")
        return value

    def integer(self, key: str, default: int) -> int:
        value = self.fields.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(key, "an integer")
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self.fields.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.fields.get(key, default)
        if not _is_number(value):
            raise self.wrong(key, "a finite number")
        return float(value)

    def positive_number(self, key: str, default: float) -> float:
        """Return the field, which must be finite, or ``default``, which need not be."""
        if key not in self.fields:
            return default
        value = self.fields[key]
        if not _is_number(value) or value <= 0:
            raise self.wrong(key, "a positive number")
        return float(value)

    def numbers(self, key: str) -> list[float] | None:
        """Return one number or a list of them as a list; None if the field is absent."""
        value = self.fields.get(key)
        if value is None:
            return None
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(_is_number(number) for number in numbers):
            raise self.wrong(key, "a finite number or a list of them")
        return [float(number) for number in numbers]

    def text(self, key: str, default: str) -> str:
        value = self.fields.get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a text")
        return value

    def texts(self, key: str) -> list[str]:
        """Return a list of texts; empty if the field is absent."""
        value = self.fields.get(key, [])
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self.wrong(key, "a list of texts")
        return value

    def choice(self, key: str, choices: Sequence[str]) -> str:
        """Return one of ``choices``; the field is required."""
        value = self.fields.get(key)
        if not isinstance(value, str) or value not in choices:
            raise self.wrong(key, f"one of: {', '.join(choices)}")
        return value

    def share(self, key: str, default: float) -> float:
        value = self.number(key, default)
        if not 0 <= value <= 1:
            raise self.wrong(key, "0 to 1")
        return value

    def sizes(self, key: str) -> list[tuple[float, float]]:
        """Return a list of one or more positive (width, height); the field is required."""
        value = self.fields.get(key)
        if not isinstance(value, list) or not value or not all(_is_size(each) for each in value):
            raise self.wrong(key, "a list of [width, height]")
        return [(float(width), float(height)) for width, height in value]

    def object(self, key: str) -> Options:
        """Return the options of a nested object; the field is required."""
        value = self.fields.get(key)
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Options(f"{self._name}.{key}", value)

    def objects(self, key: str) -> list[Options]:
        """Return the options of each object in a list of one or more; the field is required."""
        value = self.fields.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
            raise self.wrong(key, "a list of objects")
        return [Options(f"{self._name}.{key}[{index}]", each) for index, each in enumerate(value)]

    def only(self, *keys: str) -> None:
        """Raise StartError if there is a field of another name."""
        for key in self.fields:
            if key not in keys:
                raise StartError(f"{self._name}.{key} is not known; known are: {', '.join(keys)}")


def _is_number(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)


def _is_size(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_number(side) and side > 0 for side in value)
