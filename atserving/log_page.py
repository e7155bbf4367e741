"""The page ``/log``: what a process logs, and how an operator changes it while the process runs."""

from __future__ import annotations

import math
from dataclasses import asdict
from urllib.parse import parse_qsl

import orjson

from atserving import telemetry
from atserving.telemetry import LogSettings

_HINT = "PUT /log?level=debug&requests=0.1&slow=0.5 changes what you name"


class SettingError(ValueError):
    """A setting that no process can have."""


def shown() -> bytes:
    """Return the settings as JSON."""
    return orjson.dumps(_names(telemetry.settings())) + b"\n"


def change(query: str, peer: str) -> None:
    """Apply the settings of a query, and log who did it. Raises SettingError."""
    before = telemetry.settings()
    wanted = asdict(before)
    given = parse_qsl(query, keep_blank_values=True)
    if not given:
        raise SettingError(_HINT)
    for name, text in given:
        match name:
            case "level":
                if text not in telemetry.LEVELS:
                    raise SettingError(f"level should be one of {', '.join(telemetry.LEVELS)}")
                wanted["level"] = text
            case "requests":
                wanted["requests"] = _number(name, text, 1)
            case "slow":
                wanted["slow_s"] = _number(name, text, math.inf)
            case _:
                raise SettingError(f"{name[:40]!r} is no setting; {_HINT}")
    telemetry.apply(LogSettings(**wanted))
    # Whatever the level: the next reader of the log has to know why lines are missing.
    now = _names(telemetry.settings())
    telemetry.write_always("log settings changed", {"now": now, "before": _names(before), "address": peer})


def _number(name: str, text: str, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= most or math.isinf(value):
        raise SettingError(f"{name} should be a number from 0{f' to {most}' if most < math.inf else ' on'}")
    return value


def _names(settings: LogSettings) -> dict[str, object]:
    return {"level": settings.level, "requests": settings.requests, "slow": settings.slow_s}
