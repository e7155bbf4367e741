"""Attack a mesh, one attack after the other, and count what one honest caller loses.

python -m reliability.attack [--only PATTERN ...] [--scale 0.5] [--pod-limits] [--markdown]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reliability import releases
from reliability.attacks.batches import batch_attacks
from reliability.attacks.connections import connection_attacks
from reliability.attacks.costly import costly_requests
from reliability.attacks.refusals import refusals
from reliability.command import main
from reliability.releases import Served
from reliability.scenario import Scenario


def scenarios() -> list[Scenario]:
    """Return every scenario, in the order of the table."""
    return [*costly_requests(), *connection_attacks(), *batch_attacks(), *refusals()]


def serves(folder: Path) -> Sequence[Served]:
    """Return the releases: an app in two versions, two others, and the drill's net."""
    return [
        releases.digits("v1", 2),
        releases.digits("v2", 1),
        releases.quick(1),
        releases.segment(1),
        releases.drill(folder, 2),
    ]


if __name__ == "__main__":
    main(__doc__.splitlines()[0] if __doc__ else "", scenarios(), serves)
