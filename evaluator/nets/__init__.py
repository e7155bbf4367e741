"""The built-in nets, by the name that a release's ``custom_values["net"]`` gives."""

from __future__ import annotations

from atserving.errors import StartError
from evaluator.net_contract import NetFunctions
from evaluator.nets import classify, detect, feature, segment

BUILT_IN = {
    "classify": NetFunctions(classify.net_init, classify.net_inference, classify.net_preprocess),
    "detect": NetFunctions(detect.net_init, detect.net_inference, detect.net_preprocess),
    "feature": NetFunctions(feature.net_init, feature.net_inference, feature.net_preprocess),
    "segment": NetFunctions(segment.net_init, segment.net_inference, segment.net_preprocess),
}


def built_in(name: object) -> NetFunctions:
    """The built-in net of that name. Raises StartError."""
    if not isinstance(name, str) or name not in BUILT_IN:
        raise StartError(f"custom_values.net is {name!r}; the built-in nets are: {', '.join(sorted(BUILT_IN))}")
    return BUILT_IN[name]
