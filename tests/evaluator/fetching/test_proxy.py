"""With a proxy, resources and releases come through it alone, and what is refused without it is refused, too."""

from __future__ import annotations

import asyncio
import os
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from atserving.errors import InvalidArgument, ResourceUnreachable, StartError
from atserving.hosts import Hosts
from evaluator.fetching import http_fetcher
from evaluator.fetching.addresses import AddressPolicy, AllowedNetwork
from evaluator.fetching.download import download
from evaluator.fetching.host_rules import HostRules
from evaluator.fetching.proxy import Proxy, checked_url, read_proxy
from evaluator.fetching.resources import ResourceFetcher
from tests.evaluator.fetching.http_proxy import HttpProxy, http_proxy
from tests.evaluator.fetching.site import ALLOWED, FORBIDDEN, MAX_BYTES, Site
from tests.name_server import ScriptedNames

CREDENTIALS = "me@home:se:c/ret@%41 x"
PUBLIC = "93.184.216.34"
FETCH = """
import asyncio, sys, uvloop
from evaluator.fetching.addresses import AddressPolicy
from evaluator.fetching.proxy import Proxy
from evaluator.fetching.resources import ResourceFetcher

async def fetch():
    for _ in range(2):
        async with ResourceFetcher(100, AddressPolicy(), proxy=Proxy(*sys.argv[2:])) as fetcher:
            sys.stdout.buffer.write(await fetcher.fetch(sys.argv[1]))

uvloop.run(fetch())
"""


@pytest.fixture
async def proxy() -> AsyncIterator[HttpProxy]:
    """A proxy that knows more names than the evaluator, and other addresses of them."""
    names = {"good.test": ALLOWED, "bad.test": FORBIDDEN, "far.test": FORBIDDEN, "public.test": FORBIDDEN}
    async with http_proxy({**names, PUBLIC: FORBIDDEN}, CREDENTIALS) as proxy:
        yield proxy


@asynccontextmanager
async def fetching(
    proxy: HttpProxy, names: ScriptedNames, *direct: str, credentials: str = CREDENTIALS
) -> AsyncIterator[ResourceFetcher]:
    names.addresses |= {"public.test": [[PUBLIC]]}
    policy = AddressPolicy([AllowedNetwork.parse(f"{ALLOWED}/32")])
    settings = Proxy(proxy.url, credentials, Hosts(direct))
    async with ResourceFetcher(MAX_BYTES, policy, resolver=names.resolver(), proxy=settings) as fetcher:
        yield fetcher


async def test_resources_come_through_the_proxy_alone(proxy: HttpProxy, names: ScriptedNames, site: Site) -> None:
    async with fetching(proxy, names) as fetcher:
        # The proxy alone knows the second name, and connects to its own address for the third.
        for host in ("good.test", "far.test", "public.test", PUBLIC):
            url = site.url("/bytes/5", host)
            assert await fetcher.fetch(url) == bytes(5)
            assert proxy.asked[-1] == f"GET {url}"
    assert len(proxy.asked) == len(site.hits) == 4
    # The host does not get the proxy's credentials.
    assert not any("Proxy-Authorization" in headers for headers in site.headers)


async def test_redirects_go_through_the_proxy_too(proxy: HttpProxy, names: ScriptedNames, site: Site) -> None:
    target = site.url("/bytes/5", "far.test")
    async with fetching(proxy, names) as fetcher:
        assert await fetcher.fetch(f"{site.url('/to', 'good.test')}?url={target}") == bytes(5)
    assert proxy.asked[-1] == f"GET {target}"


@pytest.mark.parametrize(
    "host",
    [
        *("bad.test", "BAD.test.", "both.test", FORBIDDEN, "169.254.169.254", "[::1]", f"[::ffff:{FORBIDDEN}]"),
        *("2130706435", "0x7f000003", "127.3", "0177.0.0.3", "127.0.0.3.", "127。0。0。3", "0"),
    ],
)
async def test_private_addresses_are_not_asked_for(
    proxy: HttpProxy, names: ScriptedNames, site: Site, host: str
) -> None:
    async with fetching(proxy, names) as fetcher:
        for url in (
            site.url("/bytes/5", host),
            site.url("/bytes/5", host).replace("http:", "https:"),
            f"{site.url('/to', 'good.test')}?url={site.url('/bytes/5', host)}",
        ):
            with pytest.raises(InvalidArgument):
                await fetcher.fetch(url)
    first_hop = f"GET {site.url('/to', 'good.test')}?"
    assert all(asked.startswith(first_hop) for asked in proxy.asked)


async def test_lists_of_an_app_count_for_the_proxy(proxy: HttpProxy, names: ScriptedNames, site: Site) -> None:
    async with fetching(proxy, names) as fetcher:
        fetcher.restrict(HostRules(Hosts(["*.test"]), Hosts(["good.test"])))
        assert await fetcher.fetch(site.url("/bytes/5", "far.test")) == bytes(5)
        for host in ("good.test", PUBLIC, "far.example"):
            with pytest.raises(InvalidArgument, match="is no host that this app may fetch from"):
                await fetcher.fetch(site.url("/bytes/5", host))
        # Of a name that the proxy alone knows, nobody here knows the network.
        for rules in (HostRules(Hosts(["93.184.0.0/16"])), HostRules(deny=Hosts(["127.0.0.0/8"]))):
            fetcher.restrict(rules)
            assert await fetcher.fetch(site.url("/bytes/5", "public.test")) == bytes(5)
            with pytest.raises(InvalidArgument, match="is no host that this app may fetch from"):
                await fetcher.fetch(site.url("/bytes/5", "far.test"))


async def test_name_that_no_server_answers_for_is_asked_of_the_proxy(
    proxy: HttpProxy, names: ScriptedNames, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    names.addresses["far.test"] = []
    monkeypatch.setattr(http_fetcher, "_LOOKUP_S", 0.05)
    async with fetching(proxy, names) as fetcher:
        assert await fetcher.fetch(site.url("/bytes/5", "far.test")) == bytes(5)


async def test_hosts_without_the_proxy(proxy: HttpProxy, names: ScriptedNames, site: Site) -> None:
    async with fetching(proxy, names, "*.test", "127.0.0.0/8") as fetcher:
        for host in ("good.test", ALLOWED):
            assert await fetcher.fetch(site.url("/bytes/5", host)) == bytes(5)
        for host in ("bad.test", FORBIDDEN):
            with pytest.raises(InvalidArgument, match="is not a public address"):
                await fetcher.fetch(site.url("/bytes/5", host))
    assert proxy.asked == []


async def test_wrong_credentials_blame_the_proxy(proxy: HttpProxy, names: ScriptedNames, site: Site) -> None:
    async with fetching(proxy, names, credentials="me:wrong") as fetcher:
        for scheme, message in (("http", "its host answered 407"), ("https", "the proxy answered 407")):
            url = site.url("/bytes/5", "good.test").replace("http", scheme, 1)
            with pytest.raises(ResourceUnreachable, match=message) as error:
                await fetcher.fetch(url)
            assert "wrong" not in str(error.value)


async def test_proxy_that_is_away_is_named(names: ScriptedNames, site: Site) -> None:
    for url in ("http://127.0.0.1:1", "http://unknown.invalid:3128"):
        policy = AddressPolicy([AllowedNetwork.parse("127.0.0.0/8")])
        async with ResourceFetcher(MAX_BYTES, policy, resolver=names.resolver(), proxy=Proxy(url)) as fetcher:
            for scheme in ("http", "https"):
                with pytest.raises(ResourceUnreachable, match="could not be reached: cannot connect to the proxy"):
                    await fetcher.fetch(site.url("/bytes/5", "good.test").replace("http", scheme, 1))


async def test_https_has_a_tunnel_of_its_own_to_the_host(
    proxy: HttpProxy, names: ScriptedNames, site: Site, tmp_path: Path
) -> None:
    certificate = await _certificate(tmp_path)
    secure = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    secure.load_cert_chain(*certificate)
    await site.listen(ALLOWED, secure)
    url = site.url("/bytes/5", "good.test").replace("http:", "https:")
    async with fetching(proxy, names) as fetcher:
        # The evaluator itself checks the certificate of the host, which nobody has signed.
        with pytest.raises(ResourceUnreachable, match="TLS failed"):
            await fetcher.fetch(url)
    assert proxy.asked == [f"CONNECT good.test:{site.port}"]
    assert site.hits == []
    # A process reads its trusted certificates once. An evaluator runs on uvloop.
    trusting = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", FETCH, url, proxy.url, CREDENTIALS),
        env={**os.environ, "SSL_CERT_FILE": str(certificate[0])},
        stdout=asyncio.subprocess.PIPE,
    )
    assert (await trusting.communicate())[0] == bytes(10)
    assert proxy.asked[1:] == [f"CONNECT good.test:{site.port}"] * 2
    assert len(site.hits) == 2


async def _certificate(folder: Path) -> tuple[Path, Path]:
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    request = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=good.test -days 2"
    files = ["-addext", "subjectAltName=DNS:good.test", "-keyout", str(key), "-out", str(certificate)]
    made = await asyncio.create_subprocess_exec(*request.split(), *files, stderr=asyncio.subprocess.DEVNULL)
    assert await made.wait() == 0
    return certificate, key


async def test_files_of_releases_come_through_the_proxy(proxy: HttpProxy, site: Site, tmp_path: Path) -> None:
    settings = Proxy(proxy.url, CREDENTIALS, Hosts(["127.0.0.0/8"]))
    for host in ("far.test", ALLOWED):
        await download(site.url("/bytes/5", host), tmp_path / host, "file", None, MAX_BYTES, settings)
        assert await asyncio.to_thread((tmp_path / host).read_bytes) == bytes(5)
    assert proxy.asked == [f"GET {site.url('/bytes/5', 'far.test')}"]
    # Each hop has its own way.
    target = site.url("/bytes/5", "far.test")
    await download(f"{site.url('/to')}?url={target}", tmp_path / "x", "file", None, MAX_BYTES, settings)
    assert proxy.asked == [f"GET {target}"] * 2
    with pytest.raises(StartError, match="redirects more than 10 times"):
        await download(site.url("/loop", "far.test"), tmp_path / "x", "file", None, MAX_BYTES, settings)
    url = site.url("/bytes/5", "far.test").replace("http:", "https:")
    with pytest.raises(StartError, match="the proxy answered 407"):
        await download(url, tmp_path / "x", "file", None, MAX_BYTES, Proxy(proxy.url, "me:wrong"))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://me:secret@proxy:3128", "should have no credentials"),
        ("http://me@proxy:3128", "should have no credentials"),
        ("https://proxy:3128", "should be http://host:port"),
        ("http://proxy", "should be http://host:port"),
        ("proxy:3128", "should be http://host:port"),
        ("http://proxy:3128/x", "should be http://host:port"),
        ("http://:3128", "should be http://host:port"),
    ],
)
def test_wrong_url_of_a_proxy(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        checked_url(url)
    assert "secret" not in str(error.value)
    assert checked_url("http://proxy.example:3128/") == "http://proxy.example:3128"


def test_wrong_file_of_credentials_is_named_without_them(tmp_path: Path) -> None:
    file = tmp_path / "auth"
    for text in ("", "secret", ":secret", "me:secret\nmore"):
        file.write_text(text)
        with pytest.raises(StartError, match=f"--proxy-auth {file}: should be one line, user:password") as error:
            read_proxy("http://proxy:1", file, [])
        assert "secret" not in str(error.value)
    file.write_text("me:secret\n")
    assert read_proxy("http://proxy:1", file, []).credentials == "me:secret"
    assert "secret" not in repr(read_proxy("http://proxy:1", file, []))
    file.unlink()
    with pytest.raises(StartError, match="can't be read"):
        read_proxy("http://proxy:1", file, [])
