"""The peer mosec: workers in processes of their own behind its Rust server, with dynamic batches.

BENCH_NET=... BENCH_SETTINGS=... python -m bench.peers.mosec_server --port 8000
"""

from __future__ import annotations

from typing import Any

from mosec import Server, Worker

from bench.peers.settings import Settings
from bench.picture_net import PictureNet, PictureNetFile

_settings = Settings.from_environment()


class Classifier(Worker):
    """Decodes and runs batches of pictures."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._net = PictureNet(PictureNetFile.from_environment(), _settings.threads)

    def deserialize(self, data: bytes) -> Any:
        return data

    def serialize(self, data: Any) -> bytes:
        answer: bytes = data
        return answer

    def forward(self, data: Any) -> Any:
        if _settings.batch == 1:
            return self._net.answers([data])[0]
        return self._net.answers(data)


if __name__ == "__main__":
    server = Server()  # type: ignore[no-untyped-call]
    server.append_worker(
        Classifier, num=_settings.processes, max_batch_size=_settings.batch, max_wait_time=_settings.wait_ms, timeout=60
    )
    server.run()  # type: ignore[no-untyped-call]
