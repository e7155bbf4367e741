"""Resources are fetched from a real HTTP server on this machine."""

import asyncio
import base64
import os
import shutil
import ssl
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from atserving.errors import InvalidArgument, ResourceUnreachable
from evaluator.fetching import http_fetcher
from evaluator.fetching.addresses import AddressPolicy, AllowedNetwork
from evaluator.fetching.resources import ResourceFetcher
from evaluator.limits import Budget
from tests.evaluator.fetching.site import ALLOWED, FORBIDDEN, MAX_BYTES, Site
from tests.name_server import ScriptedNames

FETCH = """
import asyncio, sys
from evaluator.fetching.addresses import AddressPolicy, AllowedNetwork
from evaluator.fetching.resources import ResourceFetcher

async def fetch():
    async with ResourceFetcher(100, AddressPolicy([AllowedNetwork.parse("127.0.0.0/8")])) as fetcher:
        sys.stdout.buffer.write(await fetcher.fetch(sys.argv[1]))

asyncio.run(fetch())
"""


@pytest.fixture
async def fetcher(names: ScriptedNames) -> AsyncIterator[ResourceFetcher]:
    policy = AddressPolicy([AllowedNetwork.parse(f"{ALLOWED}/32")])
    async with ResourceFetcher(MAX_BYTES, policy, resolver=names.resolver()) as fetcher:
        yield fetcher


async def test_a_data_uri_is_decoded(fetcher: ResourceFetcher) -> None:
    uri = "data:image/png;base64," + base64.b64encode(b"\x00\xff").decode()
    assert await fetcher.fetch(uri) == b"\x00\xff"


async def test_a_resource_is_fetched(fetcher: ResourceFetcher, site: Site) -> None:
    assert await fetcher.fetch(site.url("/bytes/100000")) == bytes(100_000)


async def test_a_data_uri_has_the_same_limit(fetcher: ResourceFetcher) -> None:
    with pytest.raises(InvalidArgument, match="larger than 100000 bytes"):
        await fetcher.fetch("data:;base64," + base64.b64encode(bytes(MAX_BYTES + 1)).decode())


async def test_a_request_has_one_budget_for_all_its_resources(fetcher: ResourceFetcher, site: Site) -> None:
    budget = Budget(250_000)
    assert len(await fetcher.fetch(site.url("/bytes/100000"), budget)) == 100_000
    await fetcher.fetch("data:;base64," + base64.b64encode(bytes(90_000)).decode(), budget)
    with pytest.raises(InvalidArgument, match="the request's resources are larger than 250000 bytes together"):
        await fetcher.fetch(site.url("/bytes/60001"), budget)


async def test_the_number_of_chunks_is_bounded(
    fetcher: ResourceFetcher, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_fetcher, "_MAX_CHUNKS", 100)
    assert await fetcher.fetch(site.url("/chunks/99")) == b"1" * 99
    with pytest.raises(InvalidArgument, match="arrives in more than 100 chunks"):
        await fetcher.fetch(site.url("/chunks/1000"))


@pytest.mark.parametrize("path", ["/bytes/100001", "/endless"])
async def test_a_large_resource_is_not_read_to_its_end(fetcher: ResourceFetcher, site: Site, path: str) -> None:
    with pytest.raises(InvalidArgument, match="larger than 100000 bytes"):
        await fetcher.fetch(site.url(path))


@pytest.mark.parametrize(
    ("status", "kind"), [(404, InvalidArgument), (403, InvalidArgument), (500, ResourceUnreachable)]
)
async def test_a_4xx_blames_the_request_and_a_5xx_the_host(
    fetcher: ResourceFetcher, site: Site, status: int, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=f"its host answered {status}") as error:
        await fetcher.fetch(site.url(f"/status/{status}?token=secret"))
    assert "secret" not in str(error.value)
    assert "the response body" not in str(error.value)


async def test_a_broken_connection_blames_the_host(fetcher: ResourceFetcher, site: Site) -> None:
    with pytest.raises(ResourceUnreachable, match="the connection broke"):
        await fetcher.fetch(site.url("/broken"))


async def test_a_host_without_a_listener_is_unreachable(fetcher: ResourceFetcher) -> None:
    with pytest.raises(ResourceUnreachable, match="cannot connect"):
        await fetcher.fetch(f"http://{ALLOWED}:1/")


async def test_an_unknown_host_is_unreachable(fetcher: ResourceFetcher) -> None:
    with pytest.raises(ResourceUnreachable, match="unknown host"):
        await fetcher.fetch("http://no-such-host.invalid/")


async def test_a_slow_host_is_unreachable(
    fetcher: ResourceFetcher, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_fetcher, "_TOTAL_S", 0.05)
    with pytest.raises(ResourceUnreachable, match=r"did not arrive within 0\.05 s"):
        await fetcher.fetch(site.url("/wait"))


async def test_the_callers_deadline_does_not_blame_the_host(fetcher: ResourceFetcher, site: Site) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await fetcher.fetch(site.url("/wait"))


async def test_up_to_three_redirects_are_followed(fetcher: ResourceFetcher, site: Site) -> None:
    assert await fetcher.fetch(site.url("/hops/3")) == bytes(7)
    for path in ("/hops/4", "/loop"):
        with pytest.raises(InvalidArgument, match="redirects more than 3 times"):
            await fetcher.fetch(site.url(path))


async def test_redirects_are_checked_like_requests(fetcher: ResourceFetcher, site: Site) -> None:
    targets = [
        site.url("/bytes/5", FORBIDDEN),
        f"http://[::ffff:{FORBIDDEN}]:{site.port}/bytes/5",
        f"http://localhost:{site.port}/bytes/5",
        f"http://bad.test:{site.port}/bytes/5",
        f"http://both.test:{site.port}/bytes/5",
        f"//{FORBIDDEN}:{site.port}/bytes/5",
        "http://169.254.169.254/latest/meta-data/",
        "file:///etc/passwd",
        "data:;base64,AAAA",
        "http://[::1",
        "http://host:99999/",
    ]
    for target in targets:
        with pytest.raises(InvalidArgument):
            await fetcher.fetch(site.url("/to") + f"?url={target}")
    assert set(site.hits) == {"/to"}


@pytest.mark.parametrize(
    "host",
    [
        FORBIDDEN,
        "localhost",
        "[::1]",
        f"[::ffff:{FORBIDDEN}]",
        "0",
        "0.0.0.0",
        "127.1",
        "2130706435",
        "0x7f000003",
        "0177.0.0.3",
        "017700000003",
        "0x7f.0.0.3",
        f"{FORBIDDEN}.",
        "127。0。0。3",
        "①②⑦.0.0.3",
        "[::127.0.0.3]",
        "[::ffff:0:127.0.0.3]",
        "[64:ff9b::7f00:3]",
        "[2002:7f00:3::]",
        "[fe80::1%25lo]",
        "bad.test",
        "BAD.test.",
        "both.test",
    ],
)
async def test_forbidden_addresses_are_refused_in_every_notation(
    fetcher: ResourceFetcher, site: Site, host: str
) -> None:
    with pytest.raises((InvalidArgument, ResourceUnreachable)) as error:
        await fetcher.fetch(site.url("/bytes/5", host))
    assert isinstance(error.value, InvalidArgument) or "unknown host" in str(error.value)
    assert site.hits == []


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("qiniu://z0/bucket/key", "'qiniu://z0/bucket/key': qiniu resources are not set up"),
        ("file:///etc/passwd", "unsupported uri"),
        ("ftp://host/x", "unsupported uri"),
        ("", "unsupported uri"),
        ("http://", "not an http url"),
        ("http://host:port/", "bad url"),
        ("http://ho\0st/", "bad url"),
        ("http://ho%00st/", "bad url"),
        ("http://ho st/", "bad url"),
        ("http://&[]@/", "bad url"),
        ("http://é[]@/", "bad url"),
        ("http://ho\x7fst/", "bad url"),
        ("data:text/plain,abc", "a data uri should start with"),
    ],
)
async def test_unsupported_uris_are_refused(fetcher: ResourceFetcher, uri: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        await fetcher.fetch(uri)


async def test_cookies_are_not_kept(fetcher: ResourceFetcher, site: Site) -> None:
    # Use a name: clients keep no cookies from a bare address.
    for _ in range(2):
        assert await fetcher.fetch(site.url("/cookie", "good.test")) == b"none"


async def test_connections_to_one_host_are_bounded(fetcher: ResourceFetcher, site: Site) -> None:
    tasks = [asyncio.create_task(fetcher.fetch(site.url("/wait"))) for _ in range(40)]
    while site.running < 16:  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(0)
    site.gate.set()
    assert await asyncio.gather(*tasks) == [b"waited"] * 40
    assert site.most == 16


async def test_a_slow_host_does_not_delay_other_hosts(fetcher: ResourceFetcher, site: Site) -> None:
    tasks = [asyncio.create_task(fetcher.fetch(site.url("/wait"))) for _ in range(300)]
    while site.running < 16:  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(0)
    assert await fetcher.fetch(site.url("/bytes/5", "good.test")) == bytes(5)
    assert not any(task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_the_time_limit_includes_the_wait_for_a_connection(
    fetcher: ResourceFetcher, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [asyncio.create_task(fetcher.fetch(site.url("/wait"))) for _ in range(16)]
    while site.running < 16:  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(0)
    monkeypatch.setattr(http_fetcher, "_TOTAL_S", 0.05)
    with pytest.raises(ResourceUnreachable, match=r"did not arrive within 0\.05 s"):
        await fetcher.fetch(site.url("/bytes/5"))
    assert "/bytes/5" not in site.hits
    site.gate.set()
    assert await asyncio.gather(*tasks) == [b"waited"] * 16


async def test_a_dripping_host_gets_no_more_time(
    fetcher: ResourceFetcher, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_fetcher, "_TOTAL_S", 0.1)
    with pytest.raises(ResourceUnreachable, match=r"did not arrive within 0\.1 s"):
        await fetcher.fetch(site.url("/drip"))


async def test_a_name_is_resolved_once_for_each_fetch(
    fetcher: ResourceFetcher, site: Site, names: ScriptedNames
) -> None:
    names.addresses["rebound.test"] = [[ALLOWED], [FORBIDDEN]]
    names.addresses["late.test"] = [[FORBIDDEN], [ALLOWED]]
    assert await fetcher.fetch(site.url("/host", "rebound.test")) == f"rebound.test:{site.port}".encode()
    assert names.asked["rebound.test"] == 1
    with pytest.raises(InvalidArgument, match=r"'late\.test' is not a public address"):
        await fetcher.fetch(site.url("/bytes/5", "late.test"))
    assert names.asked["late.test"] == 1
    assert site.hits == ["/host"]


async def test_concurrent_fetches_fail_each_with_its_own_message(fetcher: ResourceFetcher, site: Site) -> None:
    hosts = ["bad.test", "unknown.test", "good.test"] * 10
    sources = [site.url(f"/bytes/{number}", host) for number, host in enumerate(hosts)]
    outcomes = await asyncio.gather(*(fetcher.fetch(source) for source in sources), return_exceptions=True)
    for number, (host, outcome) in enumerate(zip(hosts, outcomes, strict=True)):
        resource = f"resource '{site.url(f'/bytes/{number}', host)}'"
        match host:
            case "bad.test":
                assert isinstance(outcome, InvalidArgument)
                assert outcome.message == f"{resource} may not be fetched: 'bad.test' is not a public address"
            case "unknown.test":
                assert isinstance(outcome, ResourceUnreachable)
                assert outcome.message == f"{resource} could not be reached: unknown host"
            case _:
                assert outcome == bytes(number)


async def test_lookups_without_a_reply_do_not_delay_others(
    fetcher: ResourceFetcher, site: Site, names: ScriptedNames
) -> None:
    silent = [f"silent-{number}.test" for number in range(100)]
    names.addresses |= {name: [] for name in silent}
    tasks = [asyncio.create_task(fetcher.fetch(site.url("/", name))) for name in silent]
    assert await fetcher.fetch(site.url("/bytes/5", "good.test")) == bytes(5)
    assert not any(task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_another_port_of_an_allowed_address_is_never_connected_to(site: Site) -> None:
    connected: list[object] = []
    other = await asyncio.start_server(lambda *_: connected.append(1), ALLOWED, 0)
    url = f"http://{ALLOWED}:{other.sockets[0].getsockname()[1]}/"
    async with ResourceFetcher(MAX_BYTES, AddressPolicy([AllowedNetwork.parse(f"{ALLOWED}:{site.port}")])) as fetcher:
        assert await fetcher.fetch(site.url("/bytes/5")) == bytes(5)
        for uri in (url, site.url(f"/to?url={url}")):
            with pytest.raises(InvalidArgument, match=f"'{ALLOWED}' is not a public address"):
                await fetcher.fetch(uri)
    other.close()
    assert not connected


async def test_proxies_and_netrc_of_the_environment_are_ignored(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine {ALLOWED} login someone password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://{ALLOWED}:1")
    async with ResourceFetcher(MAX_BYTES, AddressPolicy([AllowedNetwork.parse("127.0.0.0/8")])) as fetcher:
        assert await fetcher.fetch(site.url("/host")) == f"{ALLOWED}:{site.port}".encode()
    assert "Authorization" not in site.headers[0]


async def test_credentials_reach_only_their_host_and_no_message(fetcher: ResourceFetcher, site: Site) -> None:
    target = site.url("/status/404", "good.test")
    for password in ("secret", "se@cret"):
        uri = site.url(f"/to?url={target}").replace("://", f"://me:{password}@", 1)
        with pytest.raises(InvalidArgument, match="answered 404") as error:
            await fetcher.fetch(uri)
        assert error.value.message == f"resource '{site.url('/to')}': its host answered 404"
    assert ["Authorization" in headers for headers in site.headers] == [True, False] * 2
    assert not any("Referer" in headers for headers in site.headers)


async def test_the_size_limit_applies_after_decompression(fetcher: ResourceFetcher, site: Site) -> None:
    assert await fetcher.fetch(site.url("/gzip/fair")) == bytes(MAX_BYTES)
    assert site.headers[0]["Accept-Encoding"] == "identity"
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgument, match="larger than 100000 bytes"):
            await fetcher.fetch(site.url("/gzip/bomb"))
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


async def test_https_requires_a_trusted_certificate(fetcher: ResourceFetcher, site: Site, tmp_path: Path) -> None:
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    request = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=good.test -days 2"
    files = ["-addext", f"subjectAltName=IP:{ALLOWED}", "-keyout", str(key), "-out", str(certificate)]
    made = await asyncio.create_subprocess_exec(*request.split(), *files, stderr=subprocess.DEVNULL)
    assert await made.wait() == 0
    secure = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    secure.load_cert_chain(certificate, key)
    await site.listen(ALLOWED, secure)
    url = site.url("/bytes/5").replace("http://", "https://")
    with pytest.raises(ResourceUnreachable, match="TLS failed"):
        await fetcher.fetch(url)
    assert site.hits == []
    # A process reads its trusted certificates once.
    trusting = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        FETCH,
        url,
        env={**os.environ, "SSL_CERT_FILE": str(certificate)},
        stdout=subprocess.PIPE,
    )
    assert (await trusting.communicate())[0] == bytes(5)
