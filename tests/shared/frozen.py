"""A caller to freeze: `python -m tests.shared.frozen ADDRESS PATH BODY` calls, and waits for its answer."""

from __future__ import annotations

import sys

import grpc

from atserving import transport


def main(address: str, path: str, body: str) -> None:
    with grpc.insecure_channel(address, options=transport.CHANNEL_OPTIONS) as channel:
        print("answered", len(channel.unary_unary(path, None, None)(body.encode(), wait_for_ready=True)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
