"""Marked secrets, one at each place that takes one, are in no output of any process."""

from __future__ import annotations

import json
import os
import resource
import secrets
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import pytest_asyncio

from atserving.local import commands, examples
from atserving.local.examples import FOLDER, ROOT
from atserving.local.mesh import Mesh
from registry.etcd import User
from tests.e2e.callers import documented
from tests.processes import Evaluator, Process, Registry, cluster
from tests.registry import etcd_users
from tests.registry.test_operators import add
from tests.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

SEVEN = (FOLDER / "digits" / "images" / "7.png").read_bytes()
DEBUG = ("--log-level", "debug")


class Secrets:
    """Secrets by name, which a search finds again wherever they are."""

    def __init__(self) -> None:
        self._by_name: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        """Return a secret of 40 characters, the same one for the same name."""
        return self._by_name.setdefault(name, "mark" + secrets.token_hex(18))

    def add(self, name: str, secret: str) -> None:
        """Search for a secret that a process has made."""
        self._by_name[name] = secret

    def found_in(self, output: str) -> list[str]:
        """Return the names of the secrets in an output."""
        return [name for name, secret in self._by_name.items() if secret in output]


class Whole:
    """A mesh with a secret wherever one can be, and all that it says."""

    def __init__(self, mesh: Mesh, registry: Registry, own: list[Process], marked: Secrets, home: Path) -> None:
        self.mesh = mesh
        self.registry = registry
        self.marked = marked
        self.own = own
        self._environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(home)}
        self.said: dict[str, str] = {}

    async def ask(self, path: str = "/v1/eval/digits", body: bytes | str = SEVEN, /, **headers: str) -> int:
        """Call the edge; keep the answer."""
        sent = {name.replace("_", "-"): each for name, each in headers.items()}
        sent.setdefault("content-type", "application/octet-stream" if isinstance(body, bytes) else "application/json")
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.mesh.url + path, data=body, headers=sent) as got,
        ):
            self.said[f"answer {len(self.said)}"] = f"{got.headers} {await got.text()}"
            return got.status

    async def page(self, url: str) -> None:
        """Read a page; keep it."""
        async with aiohttp.ClientSession() as session, session.get(url) as got:
            assert got.status == 200
            self.said[f"page {url}"] = await got.text()

    def run(self, *arguments: str, token: str = "", typed: str = "") -> int:
        """Run `atserving` at the registry that knows its operators; keep its output."""
        environment = {**self._environment, "ATSERVING_SERVER": self.registry.address}
        if token:
            environment["ATSERVING_TOKEN"] = token
        done = subprocess.run(
            [str(commands.BIN / "atserving"), *arguments],
            env=environment,
            input=typed,
            capture_output=True,
            text=True,
            check=False,
        )
        self.said[f"atserving {len(self.said)}"] = done.stdout + done.stderr
        return done.returncode

    def everything(self) -> dict[str, str]:
        """Return all output: what was kept, the logs, and the command lines of all processes."""
        logs = {f"log of {name}": self.mesh.log(name) for name in self.mesh.pids()}
        logs |= {f"log {number}": each.log_text() for number, each in enumerate(self.own)}
        lines = {}
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                lines[str(path)] = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
        return self.said | logs | lines


def private(path: Path, text: str) -> str:
    path.touch(mode=0o600)
    path.write_text(text)
    return str(path)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def whole(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Whole]:
    folder = tmp_path_factory.mktemp("secrets")
    marked = Secrets()
    callers = folder / "callers"
    callers.mkdir()
    keys = documented("callers-keys").replace("a long random text", marked("api key"))
    (callers / "callers-keys.yaml").write_text(keys)
    (callers / "callers-qiniu.yaml").write_text(documented("callers-qiniu"))
    signing = {"access_key": "caller", "secret_key": marked("secret key of a caller"), "uid": 42}
    private(callers / "caller-keys.json", json.dumps({"keys": [signing]}))
    qiniu = {
        **{"access_key": marked("access key"), "secret_key": marked("secret key"), "buckets": ["photos"]},
        # Nobody listens there.
        "domains": {"photos": "http://127.0.0.1:1"},
    }
    files = private(folder / "qiniu.json", json.dumps(qiniu))
    own: list[Process] = []
    extra = {
        "gate": DEBUG,
        "registry": DEBUG,
        "evaluator-digits-v1": [*DEBUG, "--qiniu", files, "--allow-network", "127.0.0.1:1"],
    }
    (etcd,) = cluster(folder, ["one"])
    user = User(etcd_users.USER.name, marked("etcd password"))
    operators = folder / "operators.json"
    marked.add("operator token", add(operators, "ada", "--role", "admin"))
    try:
        etcd.start()
        own.append(etcd)
        await etcd.ready()
        etcd_users.enable_rights(etcd, user)
        registry = Registry(
            folder,
            [etcd.address],
            *DEBUG,
            *("--etcd-user", user.name, "--operators", str(operators)),
            ATSERVING_ETCD_PASSWORD=user.password,
        )
        registry.start()
        own.append(registry)
        registry.wait_serving()
        async with Mesh(serves=examples.DIGITS, callers=callers, extra=extra) as mesh:
            key = (mesh.directory / "envoy" / "edge.key").read_text().strip()
            marked.add("edge key", key)
            yield Whole(mesh, registry, own, marked, folder)
    finally:
        for each in reversed(own):
            each.kill()


async def test_callers_and_their_resources(whole: Whole) -> None:
    marked = whole.marked
    assert await whole.ask(x_api_key=marked("api key")) == 200
    assert await whole.ask(x_api_key=marked("wrong api key")) == 401
    assert await whole.ask(authorization=f"Bearer {marked('wrong token')}") in (200, 401)
    assert await whole.ask(authorization=f"Qiniu caller:{marked('wrong signature')}") == 401
    assert await whole.ask(x_serving_edge=marked("wrong edge key"), x_serving_uid="42") == 200
    for path in ("/v1/eval/digits", "/nowhere"):
        assert await whole.ask(f"{path}?token={marked('query of a call')}", x_api_key=marked("api key")) in (200, 404)
    await until(lambda: '"path":"/nowhere' in whole.mesh.log("envoy"))
    cookie, proxy = f"session={marked('cookie')}", f"Basic {marked('credentials for a proxy')}"
    assert await whole.ask(cookie=cookie, proxy_authorization=proxy, x_api_key=marked("api key")) == 200
    user, query, fragment = marked("password in a uri"), marked("query of a uri"), marked("fragment of a uri")
    for uri in (
        f"http://ada:{user}@127.0.0.1:1/x?token={query}#{fragment}",
        f"ftp://ada:{user}@h/x?token={query}#{fragment}",
        f"http://ada:{user}@h:bad/x?token={query}#{fragment}",
        f"http://ada:{user}@[::1/x?token={query}#{fragment}",
        f"http://ada:{user}@no-such-host.invalid/x?token={query}",
        "qiniu://z0/photos/a.png",
        "qiniu://z0/other/a.png",
    ):
        assert await whole.ask("/v1/eval/digits", json.dumps({"data": {"uri": uri}})) >= 400
        task = {"op": "/v1/eval/digits", "data": {"uri": uri}}
        assert await whole.ask("/v1/batch", json.dumps([task])) == 200
    check(whole)


async def test_operators_and_releases(whole: Whole, tmp_path: Path) -> None:
    marked = whole.marked
    token = marked("operator token")
    user, query = marked("password of a release"), marked("query of a release")
    file = f"http://ada:{user}@127.0.0.1:1/m.tar?token={query}"
    assert whole.run("release", "put", "--no-check", "own", "v1", file, token=token) == 0
    custom = f"weights=https://ada:{user}@127.0.0.1:1/w?token={query}"
    assert whole.run("release", "put", "own", "v2", file, "--custom-file", custom, token=token) != 0
    assert whole.run("release", "put", "--no-check", "own", "v1", file + "2", token=token) != 0
    key = tmp_path / "key"
    assert whole.run("key", "generate", str(key)) == 0
    # The lines before it have the public key, too.
    marked.add("signing key", key.read_text().splitlines()[3])
    signed = ("--no-check", "--sign-key", str(key))
    assert whole.run("release", "put", "own", "v3", f"{file}#sha256={'0' * 64}", *signed, token=token) == 0
    assert whole.run("release", "put", "own", "v4", file, *signed, token=token) != 0
    for words in (
        ("release", "list", "-o", "wide"),
        ("release", "show", "own", "v1"),
        ("app", "show", "own"),
        ("release", "history", "own"),
        ("access", "show", "own"),
        ("ps",),
        ("operator", "list"),
        ("doctor",),
        ("app", "list"),
        ("config", "check", str(tmp_path / "none")),
    ):
        whole.run(*words, token=token)
        whole.run(*words, token=marked("wrong operator token"))
    assert whole.run("context", "set", "here", "--server", whole.registry.address) == 0
    assert whole.run("login", "--context", "here", typed=marked("wrong token at login")) != 0
    assert whole.run("login", "--context", "here", typed=token) == 0
    assert whole.run("context", "list") == 0
    command = [str(commands.BIN / "atserving"), "release", "watch", "own", "--server", whole.registry.address]
    watching = Process(command, environment={"ATSERVING_TOKEN": token})
    auth = private(tmp_path / "auth", f"me:{marked('password of a proxy')}")
    proxy = ("--proxy", "http://127.0.0.1:1", "--proxy-auth", auth)
    failing = Evaluator(whole.registry.address, "own", "v1", *DEBUG, *proxy)
    whole.own += [watching, failing]
    watching.start()
    failing.start()
    assert failing.wait() == 1
    await until(lambda: "changes from here on" in watching.log_text())
    watching.send(signal.SIGTERM)
    watching.wait()
    check(whole)


async def test_pages_for_operators(whole: Whole) -> None:
    for name in ("gate", "evaluator-digits-v1"):
        events = [json.loads(line) for line in whole.mesh.log(name).splitlines() if line.startswith("{")]
        port = next(each["http_port"] for each in events if each.get("http_port"))
        await whole.page(f"http://127.0.0.1:{port}/metrics")
        if name != "gate":
            await whole.page(f"http://127.0.0.1:{port}/status")
    await whole.page(f"http://127.0.0.1:{whole.mesh.ports.ops}/metrics")
    connector = aiohttp.UnixConnector(str(whole.mesh.directory / "envoy-admin.sock"))
    async with aiohttp.ClientSession(connector=connector) as session:
        for page in ("config_dump?include_eds", "stats", "clusters", "server_info"):
            async with session.get(f"http://localhost/{page}") as got:
                whole.said[f"Envoy's {page}"] = await got.text()
    check(whole)


async def test_no_process_of_the_project_leaves_its_memory_in_a_file(whole: Whole) -> None:
    pids = whole.mesh.pids()
    for name in ("registry", "gate", "evaluator-digits-v1"):
        assert resource.prlimit(pids[name], resource.RLIMIT_CORE) == (0, 0)


def check(whole: Whole) -> None:
    everything = whole.everything()
    found = {where: names for where, text in everything.items() if (names := whole.marked.found_in(text))}
    assert found == {}
