"""Break the processes of a mesh under load, one fault after the other, and count what its callers lose.

python -m reliability.chaos [--only PATTERN ...] [--scale 0.5] [--pod-limits] [--markdown]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reliability import releases
from reliability.command import main
from reliability.faults.config import config_faults
from reliability.faults.load import load_faults
from reliability.faults.outages import outages
from reliability.faults.processes import process_faults
from reliability.releases import Served
from reliability.scenario import Scenario


def scenarios() -> list[Scenario]:
    """Return every scenario, in the order of the table."""
    return [*process_faults(), *outages(), *config_faults(), *load_faults()]


def serves(folder: Path) -> Sequence[Served]:
    """Return the releases: an app in two versions, another fast one, and the drill's net."""
    return [releases.digits("v1", 3), releases.digits("v2", 2), releases.quick(1), releases.drill(folder, 2)]


if __name__ == "__main__":
    main(__doc__.splitlines()[0] if __doc__ else "", scenarios(), serves)
