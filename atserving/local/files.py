"""Serve the files of a folder to this machine's programs: ``python -m atserving.local.files FOLDER PORT``."""

from __future__ import annotations

import argparse
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from atserving.loopback import is_loopback


class _Handler(SimpleHTTPRequestHandler):
    def send_head(self) -> Any:
        """Refuse what a browser sends for a web page whose own host name leads here."""
        if not is_loopback(self.headers.get("Host", "")):
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST)
            return None
        return super().send_head()

    def list_directory(self, path: Any) -> None:
        self.send_error(HTTPStatus.NOT_FOUND)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("port", type=int)
    arguments = parser.parse_args()
    handler = partial(_Handler, directory=arguments.folder)
    ThreadingHTTPServer(("127.0.0.1", arguments.port), handler).serve_forever()


if __name__ == "__main__":
    main()
