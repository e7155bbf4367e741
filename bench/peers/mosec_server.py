"""The peer mosec: workers in processes of their own behind its Rust server, with dynamic batches.

    BENCH_NET=... BENCH_MOSEC='{"num": 2, "max_batch_size": 8, "max_wait_time": 2}' \\
        python -m bench.peers.mosec_server --port 8000
"""

from __future__ import annotations

import json
import os
from typing import Any

from mosec import Server, Worker

from bench.peers.picture_net import PictureNet, PictureNetFile

_SETTINGS: dict[str, Any] = json.loads(os.environ["BENCH_MOSEC"])


class Classifier(Worker):
    """Decodes and runs batches of pictures."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._net = PictureNet(PictureNetFile.from_environment())

    def deserialize(self, data: bytes) -> Any:
        return data

    def serialize(self, data: Any) -> bytes:
        answer: bytes = data
        return answer

    def forward(self, data: Any) -> Any:
        if _SETTINGS["max_batch_size"] == 1:
            return self._net.answers([data])[0]
        return self._net.answers(data)


if __name__ == "__main__":
    server = Server()  # type: ignore[no-untyped-call]
    server.append_worker(Classifier, **_SETTINGS)
    server.run()  # type: ignore[no-untyped-call]
