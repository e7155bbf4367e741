"""What a net is to the evaluator: three functions over plain dicts (the contract, section 4).

They are those a release's own script may define::

    net_init(cfg) -> model                      # model["error"] non-empty: the release can't start
    net_preprocess(model, req) -> req           # optional; one request at a time, in several threads
    net_inference(model, args) -> [ret, ...]    # args = {"reqid", "reqs"}: a batch; one ret a request, in order

A built-in net's ``net_inference`` may be called from several threads at once, for one model, which it leaves as it is.
A script's gets one call at a time.

``cfg`` holds ``tar_files`` and ``custom_files`` (local paths by name), ``custom_values``, ``model_params``,
``use_device``, ``image_width`` and ``batch_size`` (None where the release leaves them open).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SCRIPT = "net.py"
"""The member of a tar that makes it a release with a script of its own, which knows itself what it needs."""

DEFAULT_NET = "classify"
"""The built-in net of a release that has no script and names none."""

Config = dict[str, Any]
Model = dict[str, Any]
Req = dict[str, Any]
Ret = dict[str, Any]


@dataclass(frozen=True)
class NetFunctions:
    """The three functions of one net."""

    net_init: Callable[[Config], Model]
    net_inference: Callable[[Model, dict[str, Any]], list[Ret]]
    net_preprocess: Callable[[Model, Req], Req] | None = None
