"""Write every board to its file in monitoring/boards/."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder

from monitoring.grafana import app, instance, mesh, registry

FOLDER = Path(__file__).resolve().parents[1] / "boards"
"""The folder of the files."""

_BOARDS: dict[str, Callable[[], Dashboard]] = {
    "mesh": mesh.make,
    "app": app.make,
    "instance": instance.make,
    "registry": registry.make,
}


def files() -> dict[str, str]:
    """Return the text of each file by its name."""
    return {
        f"{name}.json": json.dumps(board().build(), cls=JSONEncoder, indent=1, ensure_ascii=False) + "\n"
        for name, board in _BOARDS.items()
    }


def _write() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in files().items():
        (FOLDER / name).write_text(text)


if __name__ == "__main__":
    _write()
