"""The contract between the evaluator and a net, built in or scripted.

A release's ``net.py`` defines the functions of the seed (the contract, section 4)::

    net_init(cfg) -> model                      # a non-empty model["error"]: the release can't start
    net_preprocess(model, req) -> req           # optional; one request at a time, in several threads
    net_inference(model, args) -> [ret, ...]    # args = {"reqid", "reqs"}: a batch; one ret a request, in order

Inside the evaluator a net is a :class:`LoadedNet`. ``evaluator.worker.script`` makes one of a script's functions, and
each built-in net is one. A built-in net runs batches in several threads at once; a script gets one batch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from evaluator.net_config import NetConfig

Req = dict[str, Any]
"""One request: ``data``, an object with ``uri``, ``body`` and perhaps ``attribute``, or a list of them for a group; and
perhaps ``params``."""

Ret = dict[str, Any]
"""One result: ``code``, ``message``, and ``result`` (a JSON value) or ``result_file`` (bytes, or a path inside the
workspace)."""


class LoadedNet(Protocol):
    """A net that is loaded and answers requests."""

    @property
    def batch_size(self) -> int | None:
        """The largest batch it takes; None leaves that to the release."""

    def preprocess(self, req: Req) -> Any:
        """Prepare one request for :meth:`infer`. Safe in several threads. Raises a ServingError."""

    def infer(self, reqid: str, reqs: Sequence[Any]) -> list[Ret]:
        """Run a batch of prepared requests and return one ret for each, in order."""


@runtime_checkable
class Shrinkable(Protocol):
    """A net that can give memory back."""

    def shrink(self) -> None:
        """Give back what larger batches took than those to come."""


LoadNet = Callable[[NetConfig], LoadedNet]
"""Loads a net, which may take long. Raises StartError."""
