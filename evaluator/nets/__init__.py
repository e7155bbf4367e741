"""The built-in nets, by the name that a release gives in ``custom_values["net"]``."""

from __future__ import annotations

from atserving.errors import StartError
from evaluator.net_contract import LoadNet
from evaluator.nets.classify import Classify
from evaluator.nets.detect import Detect
from evaluator.nets.feature import Feature
from evaluator.nets.segment import Segment

BUILT_IN: dict[str, LoadNet] = {net.name: net for net in (Classify, Detect, Feature, Segment)}


def built_in(name: object) -> LoadNet:
    """Return the built-in net of that name. Raises StartError."""
    if not isinstance(name, str) or name not in BUILT_IN:
        raise StartError(f"custom_values.net is {name!r}; the built-in nets are: {', '.join(sorted(BUILT_IN))}")
    return BUILT_IN[name]
