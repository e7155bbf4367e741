"""Confines this process, then runs the worker: ``python -m evaluator.worker <socket> <progress memory>``.

Standard input holds the policy of the sandbox in JSON, or null. Nothing that starts threads is imported before the
process is confined: threads that are there already would stay outside.
"""

from __future__ import annotations

import json
import os


def _confine() -> None:
    with os.fdopen(os.dup(0), "rb") as file:
        policy = json.load(file)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    if policy is not None:
        from evaluator.sandbox import enter
        from evaluator.sandbox.policy import Policy

        enter.enter(Policy(**policy))


if __name__ == "__main__":
    _confine()
    # Import it here: it imports libraries that start threads.
    from evaluator.worker.main import main

    main()
