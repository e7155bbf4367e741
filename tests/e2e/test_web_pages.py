"""No port of the local mesh takes orders from a web page, and callers reach none of them through the evaluators."""

from __future__ import annotations

import asyncio
import stat
from dataclasses import dataclass, field

import psutil
import pytest

from atserving.local import proc
from atserving.local.envoy import ADMIN_SOCKET
from atserving.local.mesh import Mesh
from tests.e2e.client import Client, image
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.asyncio(loop_scope="session")

PAGES = ("/", "/version", "/metrics", "/status", "/clusters", "/debug/vars", "/v2/keys", "/digits/images/7.png")
BODY = '{"key": "Zm9v"}'
"""Enough for etcd to read or to write a key."""
ORDERS = ("/", "/v3/kv/range", "/v3/kv/put", "/v3/auth/enable", "/quitquitquit", "/v1/eval/digits", "/v1/batch")


@dataclass(frozen=True)
class Request:
    """A request as a browser sends it for a web page."""

    method: str
    path: str
    host: str = ""
    """Empty: the address of the port."""
    headers: dict[str, str] = field(default_factory=dict)

    def to_bytes(self, port: int) -> bytes:
        host = f"{self.host or '127.0.0.1'}:{port}"
        headers = {"Host": host, "Connection": "close", "Content-Length": str(len(BODY)), **self.headers}
        lines = [f"{self.method} {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "", BODY]).encode()


# A browser asks first before it sends a page's JSON to another origin, but not before it sends text.
FOREIGN_ORIGIN = [
    Request("POST", path, headers={"Origin": "http://attacker.test", "Content-Type": "text/plain"}) for path in ORDERS
]
# The page's own name leads here. The browser then takes the port for the page's own origin.
REBOUND = [
    *(Request("GET", path, "attacker.test") for path in PAGES),
    *(Request("POST", path, "attacker.test", {"Content-Type": "application/json"}) for path in ORDERS),
]


def listeners(mesh: Mesh) -> list[tuple[str, int]]:
    """Return every TCP port on which a process of the mesh listens, with the process's name."""
    found = []
    for name, pid in mesh.pids().items():
        for each in (pid, *(child.pid for child in proc.descendants(pid))):
            sockets = psutil.Process(each).net_connections("inet")
            found += [(name, one.laddr.port) for one in sockets if one.status == psutil.CONN_LISTEN]
    return found


async def answer(port: int, request: Request) -> int | None:
    """Return the status of the answer over HTTP/1; None if there is none, such as from a gRPC server."""
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request.to_bytes(port))
            line = await reader.read(len(b"HTTP/1.1 200"))
        except ConnectionError:
            return None
        finally:
            writer.close()
    return int(line.split()[1]) if line.startswith(b"HTTP/1.") else None


async def test_no_port_takes_a_request_of_a_web_page(mesh: Mesh) -> None:
    ports = listeners(mesh)
    counts = {name: [each for each, _ in ports].count(name) for name, _ in ports}
    # Envoy: the edge, its metrics, and the operators' API. The services: a port for callers, and one for their pages.
    evaluators = {f"evaluator-{each.app}-{each.version}": 2 for each in mesh.serves}
    assert counts == {"etcd": 1, "registry": 2, "gate": 2, "envoy": 3, "files": 1, **evaluators}
    for name, port in ports:
        for request in (*FOREIGN_ORIGIN, *REBOUND):
            status = await answer(port, request)
            assert status is None or status >= 400, f"{name} answered {request} with {status}"


async def test_a_connect_to_another_host_is_refused(mesh: Mesh) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", mesh.ports.edge)
    writer.write(b"CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n\r\n")
    async with asyncio.timeout(PATIENCE_S):
        assert (await reader.readline()).startswith(b"HTTP/1.1 421 ")
    writer.close()


async def test_the_edge_evaluates_nothing_for_a_web_page(client: Client) -> None:
    for host in ("attacker.test", f"attacker.test:{client.mesh.ports.edge}", "127.0.0.1.attacker.test", "127.0.0.2"):
        refused = await client.bytes("/v1/eval/digits", image("7.png"), host=host)
        message = "this mesh answers only to 127.0.0.1, localhost, [::1]"
        assert (refused.status, refused.json) == (421, {"code": 421, "message": message})
    for host in ("localhost", "localhost:1", "127.0.0.1"):
        assert (await client.bytes("/v1/eval/digits", image("7.png"), host=host)).best == "seven"


async def test_the_same_ports_answer_to_programs_of_this_machine(mesh: Mesh) -> None:
    ports = mesh.ports
    for port, path in (
        (ports.etcd, "/version"),
        (ports.ops, "/metrics"),
        (ports.edge, "/health"),
        (ports.files, "/digits/images/7.png"),
    ):
        for host in ("127.0.0.1", "localhost"):
            assert await answer(port, Request("GET", path, host)) == 200, path


async def test_only_the_user_of_the_mesh_reaches_what_stops_or_changes_it(mesh: Mesh) -> None:
    assert stat.S_IMODE(mesh.directory.stat().st_mode) == 0o700
    assert stat.S_IMODE((mesh.directory / ADMIN_SOCKET).stat().st_mode) == 0o600


async def test_callers_reach_no_port_but_the_file_servers(client: Client) -> None:
    assert (await client.json("/v1/eval/digits", {"data": client.uri("7.png")})).status == 200
    others = {port for _, port in listeners(client.mesh)} - {client.mesh.ports.files}
    # A port that nothing listens on looks no different.
    for port in (*others, 2):
        for host in ("127.0.0.1", "localhost", "127.0.0.2"):
            response = await client.json("/v1/eval/digits", {"data": {"uri": f"http://{host}:{port}/metrics"}})
            assert (response.status, response.json["message"]) == (
                400,
                f"resource 'http://{host}:{port}/metrics' may not be fetched: '{host}' is not a public address",
            )
