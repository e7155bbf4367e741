"""Resources, fetched from a real server on this machine."""

import asyncio
import base64
import ipaddress
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from atserving.errors import InvalidArgument, ResourceUnreachable
from evaluator import resources
from evaluator.addresses import AddressPolicy
from evaluator.resources import ResourceFetcher, Source

MAX_BYTES = 100_000
# The server listens on both; only the first may be fetched from.
ALLOWED, FORBIDDEN = "127.0.0.2", "127.0.0.3"


@dataclass
class Site:
    """A host that answers as its path says, and counts."""

    port: int = 0
    hits: list[str] = field(default_factory=list)
    running: int = 0
    most: int = 0
    sent: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def url(self, path: str, host: str = ALLOWED) -> str:
        return f"http://{host}:{self.port}{path}"

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.hits.append(request.path)
        kind, _, rest = request.path.strip("/").partition("/")
        match kind:
            case "bytes":
                return web.Response(body=bytes(int(rest)))
            case "status":
                return web.Response(status=int(rest), body=b"what the host says")
            case "to":
                return web.Response(status=302, headers={"Location": request.query["url"]})
            case "loop":
                raise web.HTTPTemporaryRedirect("/loop")
            case "hops":
                raise web.HTTPMovedPermanently(f"/hops/{int(rest) - 1}" if int(rest) > 1 else "/bytes/7")
            case "cookie":
                response = web.Response(body=request.headers.get("Cookie", "none").encode())
                response.set_cookie("session", "secret")
                return response
            case "endless":
                return await self._endless(request)
            case "broken":
                assert request.transport
                request.transport.abort()
                return web.Response()
            case "wait":
                self.running += 1
                self.most = max(self.most, self.running)
                await self.gate.wait()
                self.running -= 1
                return web.Response(body=b"waited")
        raise web.HTTPNotFound

    async def _endless(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(bytes(10_000))
            self.sent += 10_000


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    app = web.Application()
    app.router.add_get("/{path:.*}", site.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, ALLOWED, 0).start()
    site.port = runner.addresses[0][1]
    await web.TCPSite(runner, FORBIDDEN, site.port).start()
    yield site
    site.gate.set()
    await runner.cleanup()


@pytest.fixture
async def fetcher() -> AsyncIterator[ResourceFetcher]:
    async with ResourceFetcher(MAX_BYTES, AddressPolicy([ipaddress.ip_network(f"{ALLOWED}/32")])) as fetcher:
        yield fetcher


async def test_bodies_and_data_uris_are_what_they_hold(fetcher: ResourceFetcher) -> None:
    assert await fetcher.fetch(Source(body=b"abc")) == b"abc"
    uri = "data:image/png;base64," + base64.b64encode(b"\x00\xff").decode()
    assert await fetcher.fetch(Source(uri=uri)) == b"\x00\xff"


async def test_a_resource_is_fetched(fetcher: ResourceFetcher, site: Site) -> None:
    assert await fetcher.fetch(Source(uri=site.url("/bytes/100000"))) == bytes(100_000)


@pytest.mark.parametrize(
    "source",
    [
        Source(body=bytes(MAX_BYTES + 1)),
        Source(uri="data:;base64," + base64.b64encode(bytes(MAX_BYTES + 1)).decode()),
    ],
)
async def test_given_bytes_have_the_same_limit(fetcher: ResourceFetcher, source: Source) -> None:
    with pytest.raises(InvalidArgument, match="larger than 100000 bytes"):
        await fetcher.fetch(source)


@pytest.mark.parametrize("path", ["/bytes/100001", "/endless"])
async def test_what_is_too_large_is_left_early(fetcher: ResourceFetcher, site: Site, path: str) -> None:
    with pytest.raises(InvalidArgument, match="larger than 100000 bytes"):
        await fetcher.fetch(Source(uri=site.url(path)))


@pytest.mark.parametrize(
    ("status", "kind"), [(404, InvalidArgument), (403, InvalidArgument), (500, ResourceUnreachable)]
)
async def test_a_hosts_refusal_is_the_requests_fault_its_failure_is_not(
    fetcher: ResourceFetcher, site: Site, status: int, kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=f"its host answered {status}") as error:
        await fetcher.fetch(Source(uri=site.url(f"/status/{status}?token=secret")))
    assert "secret" not in str(error.value)
    assert "what the host says" not in str(error.value)


async def test_a_connection_that_breaks_is_the_hosts_fault(fetcher: ResourceFetcher, site: Site) -> None:
    with pytest.raises(ResourceUnreachable, match="the connection broke"):
        await fetcher.fetch(Source(uri=site.url("/broken")))


async def test_a_host_that_does_not_listen_is_unreachable(fetcher: ResourceFetcher) -> None:
    with pytest.raises(ResourceUnreachable, match="cannot connect"):
        await fetcher.fetch(Source(uri=f"http://{ALLOWED}:1/"))


async def test_an_unknown_host_is_unreachable(fetcher: ResourceFetcher) -> None:
    with pytest.raises(ResourceUnreachable, match="unknown host"):
        await fetcher.fetch(Source(uri="http://no-such-host.invalid/"))


async def test_a_host_that_does_not_answer_in_time_is_unreachable(
    fetcher: ResourceFetcher, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "_TOTAL_S", 0.05)
    with pytest.raises(ResourceUnreachable, match=r"did not come within 0\.05 s"):
        await fetcher.fetch(Source(uri=site.url("/wait")))


async def test_the_callers_deadline_is_not_taken_for_the_hosts(fetcher: ResourceFetcher, site: Site) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await fetcher.fetch(Source(uri=site.url("/wait")))


async def test_up_to_three_redirects_are_followed(fetcher: ResourceFetcher, site: Site) -> None:
    assert await fetcher.fetch(Source(uri=site.url("/hops/3"))) == bytes(7)
    for path in ("/hops/4", "/loop"):
        with pytest.raises(InvalidArgument, match="redirects more than 3 times"):
            await fetcher.fetch(Source(uri=site.url(path)))


async def test_no_redirect_leads_where_a_request_may_not(fetcher: ResourceFetcher, site: Site) -> None:
    targets = [
        site.url("/bytes/5", FORBIDDEN),
        f"http://[::ffff:{FORBIDDEN}]:{site.port}/bytes/5",
        f"http://localhost:{site.port}/bytes/5",
        f"//{FORBIDDEN}:{site.port}/bytes/5",
        "http://169.254.169.254/latest/meta-data/",
        "file:///etc/passwd",
        "data:;base64,AAAA",
        "http://[::1",
        "http://host:99999/",
    ]
    for target in targets:
        with pytest.raises(InvalidArgument):
            await fetcher.fetch(Source(uri=site.url("/to") + f"?url={target}"))
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
    ],
)
async def test_forbidden_addresses_are_refused_in_every_notation(
    fetcher: ResourceFetcher, site: Site, host: str
) -> None:
    with pytest.raises((InvalidArgument, ResourceUnreachable)) as error:
        await fetcher.fetch(Source(uri=site.url("/bytes/5", host)))
    assert isinstance(error.value, InvalidArgument) or "unknown host" in str(error.value)
    assert site.hits == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Source(uri="qiniu://z0/bucket/key"), "qiniu resources are not supported yet"),
        (Source(uri="file:///etc/passwd"), "unsupported uri"),
        (Source(uri="ftp://host/x"), "unsupported uri"),
        (Source(uri=""), "unsupported uri"),
        (Source(uri="http://"), "no http url"),
        (Source(uri="http://host:port/"), "bad url"),
        (Source(uri="data:text/plain,abc"), "a data uri should start with"),
        (Source(), "neither a uri nor a body"),
    ],
)
async def test_what_is_no_resource_is_refused(fetcher: ResourceFetcher, source: Source, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        await fetcher.fetch(source)


async def test_cookies_are_not_kept(fetcher: ResourceFetcher, site: Site) -> None:
    for _ in range(2):
        assert await fetcher.fetch(Source(uri=site.url("/cookie"))) == b"none"


async def test_a_host_is_asked_for_only_so_many_at_once(fetcher: ResourceFetcher, site: Site) -> None:
    tasks = [asyncio.create_task(fetcher.fetch(Source(uri=site.url("/wait")))) for _ in range(40)]
    while site.running < 16:  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0)
    site.gate.set()
    assert await asyncio.gather(*tasks) == [b"waited"] * 40
    assert site.most == 16
