"""``qiniu://`` objects come from a fake Kodo on this machine, which checks every signature itself."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import aiohttp
import orjson
import pytest
from aiohttp import web

from atserving.config import Release, validate
from atserving.errors import InvalidArgument, ResourceUnreachable, ServingError, StartError
from atserving.local.examples import ROOT
from atserving.v1.evaluator_pb2 import InferRequest
from atserving.v1.serving_pb2 import Resource
from evaluator.fetching import buckets, qiniu
from evaluator.fetching.addresses import AddressPolicy, AllowedNetwork
from evaluator.fetching.qiniu import QiniuConfig, read_config
from evaluator.fetching.release import fetch_release
from evaluator.fetching.resources import ResourceFetcher
from tests.evaluator.calling import ask, connected
from tests.evaluator.digits import DIGITS
from tests.name_server import ScriptedNames, scripted_names
from tests.processes import Registry, evaluator

ACCESS_KEY, SECRET_KEY = "the-access-key", "the-secret-key"
HOST, FORBIDDEN = "127.0.0.2", "127.0.0.3"
MAX_BYTES = 100_000


@dataclass
class Kodo:
    """A fake Kodo: the bucket service, and a host name for each bucket with its private objects."""

    objects: dict[tuple[str, str], bytes] = field(default_factory=dict)
    regions: dict[str, list[str]] = field(default_factory=lambda: {"photos": ["z0"], "models": ["z0"]})
    io_src: list[str] | None = None
    """The domains of every bucket. None: <bucket>.kodo.test."""
    answer: web.Response | None = None
    """Replaces the response of the bucket service."""
    port: int = 0
    ahead_s: int = 0
    """By how many seconds its clock is ahead."""
    lookups: list[str] = field(default_factory=list)
    downloads: list[str] = field(default_factory=list)
    elsewhere: list[web.Request] = field(default_factory=list)
    moved_to: str = ""
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.go_on.set()

    @property
    def service(self) -> str:
        return f"http://{HOST}:{self.port}"

    async def handle(self, request: web.Request) -> web.StreamResponse:
        bucket, _, domain = request.host.partition(":")[0].partition(".")
        if domain == "kodo.test":
            return self._download(request, bucket)
        if request.path == "/v4/query":
            return await self._query(request)
        if request.host.startswith("other.test"):
            self.elsewhere.append(request)
            return web.Response(body=b"moved")
        # Under its bare address it serves one bucket.
        return self._download(request, "photos")

    async def _query(self, request: web.Request) -> web.StreamResponse:
        bucket = request.query["bucket"]
        self.lookups.append(bucket)
        await self.go_on.wait()
        if self.answer:
            return web.Response(status=self.answer.status, headers=self.answer.headers, body=self.answer.body)
        if request.query["ak"] != ACCESS_KEY:
            return web.json_response({"error": "app/accesskey is not found"}, status=612)
        if bucket not in self.regions:
            return web.json_response({"error": "no such bucket"}, status=631)
        domains = [f"{bucket}.kodo.test:{self.port}"] if self.io_src is None else self.io_src
        hosts = [
            {"region": region, "ttl": 86400, "io": {"domains": ["127.0.0.1"]}, "io_src": {"domains": domains}}
            for region in self.regions[bucket]
        ]
        return web.json_response({"hosts": hosts})

    def _download(self, request: web.Request, bucket: str) -> web.StreamResponse:
        signed, _, token = request.raw_path.partition("&token=")
        self.downloads.append(signed.partition("?")[0])
        digest = hmac.digest(SECRET_KEY.encode(), f"http://{request.host}{signed}".encode(), "sha1")
        if unquote(token) != f"{ACCESS_KEY}:{base64.urlsafe_b64encode(digest).decode()}":
            return web.json_response({"error": "download token auth failed"}, status=401)
        path, _, query = signed.partition("?")
        if int(parse_qs(query)["e"][0]) < time.time() + self.ahead_s:
            return web.json_response({"error": "token expired"}, status=401)
        if self.moved_to:
            return web.Response(status=302, headers={"Location": self.moved_to})
        key = unquote(path[1:])
        if key == "612":
            return web.json_response({"error": "no such file or directory"}, status=612)
        if (bucket, key) not in self.objects:
            return web.json_response({"error": "Document not found"}, status=404)
        return web.Response(body=self.objects[bucket, key])


@pytest.fixture
async def kodo() -> AsyncIterator[Kodo]:
    kodo = Kodo()
    app = web.Application()
    app.router.add_get("/{path:(?s:.*)}", kodo.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, HOST, 0).start()
    kodo.port = runner.addresses[0][1]
    await web.TCPSite(runner, FORBIDDEN, kodo.port).start()
    yield kodo
    kodo.go_on.set()
    await runner.cleanup()


@pytest.fixture
def names() -> Iterator[ScriptedNames]:
    with scripted_names() as names:
        names.addresses = {f"{name}.test": [[HOST]] for name in ("photos.kodo", "models.kodo", "other")}
        names.addresses["inner.test"] = [[FORBIDDEN]]
        yield names


def config(kodo: Kodo, **fields: Any) -> QiniuConfig:
    given = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY, "buckets": ["photos", "gone"], "service": kodo.service}
    return QiniuConfig.model_validate({**given, **fields})


@asynccontextmanager
async def fetching(kodo: Kodo, names: ScriptedNames, **fields: Any) -> AsyncIterator[ResourceFetcher]:
    policy = AddressPolicy([AllowedNetwork.parse(f"{HOST}/32")])
    async with ResourceFetcher(MAX_BYTES, policy, config(kodo, **fields), names.resolver()) as fetcher:
        yield fetcher


@pytest.fixture
async def fetcher(kodo: Kodo, names: ScriptedNames) -> AsyncIterator[ResourceFetcher]:
    async with fetching(kodo, names) as fetcher:
        yield fetcher


async def refused(fetcher: ResourceFetcher, uri: str, kind: type[ServingError], message: str) -> None:
    with pytest.raises(kind) as error:
        await fetcher.fetch(uri)
    assert error.value.message == f"resource {message}"
    # A logged traceback must not reveal more.
    assert error.value.__cause__ is None
    assert error.value.__context__ is None or error.value.__suppress_context__
    assert not {ACCESS_KEY, SECRET_KEY, "token"} & set(error.value.message.split())


async def test_a_private_object_is_read_with_the_owners_keys(kodo: Kodo, fetcher: ResourceFetcher) -> None:
    kodo.objects = {("photos", "7.png"): b"seven", ("photos", "large"): bytes(MAX_BYTES + 1)}
    async with aiohttp.ClientSession() as session, session.get(f"{kodo.service}/7.png") as response:
        assert response.status == 401
    for uri in ("qiniu://z0/photos/7.png", "qiniu://42@z0/photos/7.png"):
        assert await fetcher.fetch(uri) == b"seven"
    await refused(
        fetcher, "qiniu://z0/photos/large", InvalidArgument, "'qiniu://z0/photos/large' is larger than 100000 bytes"
    )


@pytest.mark.parametrize(
    "key",
    [
        "a/b.png",
        "a b+c",
        "图 片.jpg",
        "what?e=1&token=x",
        "a#b",
        "100%",
        "%2e%41",
        "../x",
        "a/../b",
        ".",
        "/x",
        "//x/",
        "a//b",
        "a\\b",
        "a:b@c",
        "'\"<>",
        "a\nb",
        "&token=",
        "~!$*(),;=",
    ],
)
async def test_a_key_needs_no_quoting(kodo: Kodo, fetcher: ResourceFetcher, key: str) -> None:
    kodo.objects["photos", key] = b"found"
    assert await fetcher.fetch(f"qiniu://z0/photos/{key}") == b"found"


async def test_requests_read_only_from_named_buckets(kodo: Kodo, names: ScriptedNames) -> None:
    kodo.objects["models", "release.tar"] = b"the owner's"
    uri = "qiniu://z0/models/release.tar"
    for others in (["photos"], []):
        async with fetching(kodo, names, buckets=others) as fetcher:
            await refused(fetcher, uri, InvalidArgument, f"'{uri}': requests may not read from this bucket")
    assert kodo.lookups == kodo.downloads == []
    async with fetching(kodo, names, buckets=["models"]) as fetcher:
        assert await fetcher.fetch(uri) == b"the owner's"


async def test_qiniu_uris_are_refused_without_keys(names: ScriptedNames) -> None:
    async with ResourceFetcher(MAX_BYTES, AddressPolicy(), resolver=names.resolver()) as fetcher:
        await refused(
            fetcher,
            "qiniu://1@z0/photos/x?token=y",
            InvalidArgument,
            "'qiniu://z0/photos/x': qiniu resources are not set up for this app",
        )


async def test_an_unavailable_object_blames_the_request(kodo: Kodo, names: ScriptedNames) -> None:
    kodo.objects["photos", "x"] = b"x"
    async with fetching(kodo, names) as fetcher:
        for uri, message in {
            "qiniu://z0/photos/none?e=1": "'qiniu://z0/photos/none': its host answered 404",
            "qiniu://z0/photos/612": "'qiniu://z0/photos/612': its host answered 612",
            "qiniu://z1/photos/x": "'qiniu://z1/photos/x': its bucket is not in that zone",
            "qiniu://z0/gone/x": "'qiniu://z0/gone/x': the bucket service answered 631",
        }.items():
            await refused(fetcher, uri, InvalidArgument, message)
        kodo.ahead_s = 3600
        await refused(fetcher, "qiniu://z0/photos/x", InvalidArgument, "'qiniu://z0/photos/x': its host answered 401")
    kodo.ahead_s = 0
    async with fetching(kodo, names, secret_key="another") as fetcher:
        await refused(fetcher, "qiniu://z0/photos/x", InvalidArgument, "'qiniu://z0/photos/x': its host answered 401")
    async with fetching(kodo, names, access_key="another") as fetcher:
        await refused(
            fetcher, "qiniu://z0/photos/x", InvalidArgument, "'qiniu://z0/photos/x': the bucket service answered 612"
        )


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (web.Response(status=503, text=SECRET_KEY), "the bucket service answered 503"),
        (web.Response(status=302, headers={"Location": "/"}), "the bucket service answered 302"),
        (web.Response(text="<html>"), "the bucket service's answer can't be read"),
        (web.Response(body=b"\xff"), "the bucket service's answer can't be read"),
        (web.Response(text='{"hosts": [{}]}'), "the bucket service's answer can't be read"),
        (web.Response(text='{"hosts": []}' + " " * (1 << 20)), "the bucket service's answer is too long"),
    ],
)
async def test_a_failing_bucket_service_does_not_blame_the_request(
    kodo: Kodo, fetcher: ResourceFetcher, answer: web.Response, reason: str
) -> None:
    kodo.answer = answer
    uri = "qiniu://z0/photos/x"
    await refused(fetcher, uri, ResourceUnreachable, f"'{uri}': {reason}")
    # Failures are not cached.
    kodo.answer, kodo.objects = None, {("photos", "x"): b"x"}
    assert await fetcher.fetch(uri) == b"x"


@pytest.mark.parametrize("domain", ["http://", "a/b", "a:b", "me@a", "a?b", ""])
async def test_a_malformed_domain_does_not_blame_the_request(kodo: Kodo, fetcher: ResourceFetcher, domain: str) -> None:
    kodo.io_src = [domain]
    uri = "qiniu://z0/photos/x"
    await refused(fetcher, uri, ResourceUnreachable, f"'{uri}': the bucket service's answer can't be read")


async def test_a_bucket_without_a_domain_does_not_blame_the_request(kodo: Kodo, fetcher: ResourceFetcher) -> None:
    kodo.io_src = []
    uri = "qiniu://z0/photos/x"
    message = f"'{uri}': the bucket service names no domain to download from"
    await refused(fetcher, uri, ResourceUnreachable, message)


async def test_an_unreachable_bucket_service_does_not_blame_the_request(
    kodo: Kodo, names: ScriptedNames, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = "qiniu://z0/photos/x"
    async with fetching(kodo, names, service=f"http://{HOST}:1") as fetcher:
        message = f"'{uri}': the bucket service could not be reached"
        await refused(fetcher, uri, ResourceUnreachable, message)
    monkeypatch.setattr(buckets, "_LOOKUP_S", 0.05)
    kodo.go_on.clear()
    async with fetching(kodo, names) as fetcher:
        message = f"'{uri}': the bucket service did not answer within 0.05 s"
        await refused(fetcher, uri, ResourceUnreachable, message)


@pytest.mark.parametrize("host", [FORBIDDEN, "inner.test", f"[::ffff:{FORBIDDEN}]"])
async def test_the_address_policy_covers_lookups_and_downloads(kodo: Kodo, names: ScriptedNames, host: str) -> None:
    uri = "qiniu://z0/photos/x"
    async with fetching(kodo, names, service=f"http://{host}:{kodo.port}") as fetcher:
        await refused(fetcher, uri, ResourceUnreachable, f"'{uri}': the bucket service has no public address")
    assert kodo.lookups == []
    kodo.io_src = [f"{host}:{kodo.port}"]
    async with fetching(kodo, names) as fetcher:
        with pytest.raises(InvalidArgument, match="is not a public address"):
            await fetcher.fetch(uri)
    assert kodo.downloads == []


async def test_concurrent_requests_for_a_bucket_share_a_lookup(kodo: Kodo, fetcher: ResourceFetcher) -> None:
    kodo.objects = {("photos", str(number)): str(number).encode() for number in range(50)}
    kodo.go_on.clear()
    sources = [f"qiniu://z0/photos/{number}" for number in range(50)]
    first = asyncio.create_task(fetcher.fetch(sources[0]))
    while not kodo.lookups:  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(0)
    tasks = [asyncio.create_task(fetcher.fetch(source)) for source in sources]
    await asyncio.sleep(0)
    # Cancelling the request that started the lookup must not fail the others.
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    kodo.go_on.set()
    assert await asyncio.gather(*tasks) == [str(number).encode() for number in range(50)]
    assert await fetcher.fetch(sources[0]) == b"0"
    assert kodo.lookups == ["photos"]


async def test_a_failed_lookup_fails_each_request_under_its_own_name(kodo: Kodo, fetcher: ResourceFetcher) -> None:
    kodo.go_on.clear()
    uris = [f"qiniu://z0/gone/{number}" for number in range(20)]
    tasks = [asyncio.create_task(fetcher.fetch(uri)) for uri in uris]
    while not kodo.lookups:  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(0)
    kodo.go_on.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == [
        f"resource '{uri}': the bucket service answered 631" for uri in uris
    ]
    assert kodo.lookups == ["gone"]


async def test_a_cached_lookup_expires(kodo: Kodo, names: ScriptedNames, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_CACHED_S", 0.05)
    kodo.objects["photos", "x"] = b"x"
    async with fetching(kodo, names) as fetcher:
        while len(kodo.lookups) < 2:
            assert await fetcher.fetch("qiniu://z0/photos/x") == b"x"


async def test_a_configured_domain_needs_no_lookup(kodo: Kodo, names: ScriptedNames) -> None:
    kodo.objects["photos", "x"] = b"x"
    domains = {"photos": f"http://photos.kodo.test:{kodo.port}/"}
    async with fetching(kodo, names, domains=domains, service="http://no.test") as fetcher:
        assert await fetcher.fetch("qiniu://any/photos/x") == b"x"
    assert kodo.lookups == []


async def test_redirects_do_not_leak_the_token(kodo: Kodo, fetcher: ResourceFetcher) -> None:
    kodo.moved_to = f"http://other.test:{kodo.port}/moved?a=b"
    assert await fetcher.fetch("qiniu://z0/photos/x") == b"moved"
    (request,) = kodo.elsewhere
    assert request.raw_path == "/moved?a=b"
    assert not {"Referer", "Authorization", "Cookie"} & set(request.headers)
    kodo.moved_to = f"http://inner.test:{kodo.port}/"
    uri = "qiniu://z0/photos/x"
    message = f"'{uri}' may not be fetched: 'inner.test' is not a public address"
    await refused(fetcher, uri, InvalidArgument, message)
    kodo.moved_to = "file:///etc/passwd?x"
    message = f"'{uri}' leads to 'file:///etc/passwd', which is not an http url"
    await refused(fetcher, uri, InvalidArgument, message)


# The signature


@pytest.mark.parametrize(
    ("url", "expires", "keys", "signature"),
    [
        (
            "http://photos.example.com/7.png",
            1700000600,
            ("the-access-key", "the-secret-key"),
            "gFXPT12jmeozC7Uh1sBhD3XZtOc=",
        ),
        (
            "https://models.example.com/a%20%231.tar",
            1451494800,
            ("MY_ACCESS_KEY", "MY_SECRET_KEY"),
            "CAC6uXC5NshHLfG8NpS405WLvPk=",
        ),
        ("http://h/a//b/..", 1, ("ak", "sk-ü"), "_5FVXIKGeI4JqGNcCCTS6KoirBc="),
    ],
)
def test_the_signature_matches_qinius_sdk(url: str, expires: int, keys: tuple[str, str], signature: str) -> None:
    """The signatures come from ``qiniu.Auth.private_download_url`` of qiniu 7.18.0."""
    config = QiniuConfig.model_validate({"access_key": keys[0], "secret_key": keys[1]})
    assert qiniu.sign(url, config, expires) == f"{url}?e={expires}&token={keys[0]}:{signature}"


# Releases


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "workspace"
    folder.mkdir()
    return folder


def release(file: str, **fields: object) -> Release:
    return validate(Release, {"name": "digits", "version": "v1", "file": file, **fields})


async def test_a_release_may_come_from_any_bucket_of_the_owner(kodo: Kodo, workspace: Path) -> None:
    tar = (DIGITS / "digits-v1.tar").read_bytes()
    kodo.objects = {("photos", "a #1.tar"): tar, ("photos", "tags.csv"): b"0,zero\n"}
    kodo.io_src = [f"{HOST}:{kodo.port}"]
    file = f"qiniu://z0/photos/a #1.tar#sha256={hashlib.sha256(tar).hexdigest()}"
    files = {"tags": "qiniu://z0/photos/tags.csv"}
    local = await fetch_release(release(file, custom_files=files), workspace, config(kodo, buckets=[]))
    assert "deploy.prototxt" in local.tar_files
    assert local.custom_files["tags"].read_bytes() == b"0,zero\n"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("qiniu://z0/photos/none.tar?x", "file qiniu://z0/photos/none.tar: its host answered 404"),
        ("qiniu://z0/gone/x.tar", "file qiniu://z0/gone/x.tar: the bucket service answered 631"),
        ("qiniu://z1/photos/x.tar", "file qiniu://z1/photos/x.tar: its bucket is not in that zone"),
        ("qiniu://z0/photos", "file qiniu://z0/photos: should be qiniu://[uid@]zone/bucket/key"),
        (f"qiniu://z0/photos/x.tar#sha256={'0' * 64}", "file qiniu://z0/photos/x.tar: its sha256 is "),
    ],
)
async def test_an_unavailable_release_stops_the_start(kodo: Kodo, workspace: Path, file: str, message: str) -> None:
    kodo.objects["photos", "x.tar"] = b"no tar"
    kodo.io_src = [f"{HOST}:{kodo.port}"]
    with pytest.raises(StartError) as error:
        await fetch_release(release(file), workspace, config(kodo))
    assert str(error.value).startswith(message)
    assert error.value.__cause__ is None


# The operator's file


def test_the_config_file_hides_its_keys(tmp_path: Path) -> None:
    file = tmp_path / "qiniu.json"
    file.write_text(f'{{"access_key": "{ACCESS_KEY}", "secret_key": "{SECRET_KEY}", "domains": {{"a": "http://b/"}}}}')
    config = read_config(file)
    assert (config.buckets, config.domains, config.service) == (
        frozenset(),
        {"a": "http://b"},
        "https://uc.qiniuapi.com",
    )
    assert ACCESS_KEY not in repr(config)
    assert SECRET_KEY not in repr(config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "can't be read: No such file or directory"),
        ("{", "Invalid JSON"),
        (f'"{SECRET_KEY}"', "Input should be an object"),
        (f'{{"secret_key": "{SECRET_KEY}"}}', "access_key: Field required"),
        (f'{{"access_key": "", "secret_key": "{SECRET_KEY}"}}', "access_key: "),
        (f'{{"access_key": ["{SECRET_KEY}"], "secret_key": "x"}}', "access_key: Input should be a valid string"),
        ('{"access_key": "a", "secret_key": "x", "bucket": ["photos"]}', "bucket: Extra inputs are not permitted"),
        ('{"access_key": "a", "secret_key": "x", "buckets": "photos"}', "buckets: Input should be a valid"),
        ('{"access_key": "a", "secret_key": "x", "service": "uc.test"}', "service: Value error, should be http(s)://"),
        ('{"access_key": "a", "secret_key": "x", "service": "http://a:b"}', "service: Value error"),
        ('{"access_key": "a", "secret_key": "x", "domains": {"b": "http://a/b"}}', "domains: b: Value error"),
    ],
)
def test_a_wrong_config_file_is_one_line_without_secrets(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "qiniu.json"
    if content is not None:
        file.write_text(content)
    command = [sys.executable, "-m", "evaluator", "--app", "digits", "--version", "v1", "--registry", "127.0.0.1:1"]
    ended = subprocess.run([*command, "--qiniu", str(file)], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"evaluator: --qiniu {file}: {message}")
    assert ended.stderr.count("\n") == 1
    assert SECRET_KEY not in ended.stderr


# A whole evaluator


async def test_an_evaluator_serves_from_kodo_and_logs_no_keys(kodo: Kodo, registry: Registry, tmp_path: Path) -> None:
    tar = (DIGITS / "digits-v1.tar").read_bytes()
    kodo.objects = {("photos", "7.png"): (DIGITS / "images" / "7.png").read_bytes(), ("photos", "digits.tar"): tar}
    kodo.io_src = [f"{HOST}:{kodo.port}"]
    file = tmp_path / "qiniu.json"
    given = {"access_key": ACCESS_KEY, "secret_key": SECRET_KEY, "buckets": ["photos"], "service": kodo.service}
    file.write_bytes(orjson.dumps(given))
    uri = f"qiniu://z0/photos/digits.tar#sha256={hashlib.sha256(tar).hexdigest()}"
    registry.publish("kodo", file=uri, custom_values={"net": "classify"})
    flags = ("--qiniu", str(file), "--allow-network", "127.0.0.0/8", "--log-level", "debug")

    # In a thread: the fake Kodo runs on this event loop.
    context = evaluator(registry, "kodo", "v1", *flags)
    process = await asyncio.to_thread(context.__enter__)
    try:
        async with connected(process) as connection:
            outcomes = [
                await ask(connection, InferRequest(data=[Resource(uri=uri)]))
                for uri in ("qiniu://z0/photos/7.png", "qiniu://z0/photos/none", "qiniu://z0/models/digits.tar")
            ]
        assert orjson.loads(outcomes[0].result_json)["confidences"][0]["class"] == "seven"
        assert [outcome.error.status for outcome in outcomes[1:]] == [400, 400]
        process.terminate()
        assert await asyncio.to_thread(process.wait) == 0
        output = "\n".join([*process.lines, *(str(outcome) for outcome in outcomes)])
        assert "qiniu://z0/photos/none" in output
        for secret in (ACCESS_KEY, SECRET_KEY, "token="):
            assert secret not in output
    finally:
        context.__exit__(None, None, None)
