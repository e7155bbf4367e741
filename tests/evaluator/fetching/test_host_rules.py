"""The lists of an app narrow the hosts that it may fetch from: by names and networks, at every redirect."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import pytest

from atserving.errors import InvalidArgument, ResourceUnreachable
from atserving.hosts import Hosts
from evaluator.fetching.addresses import AddressPolicy, AllowedNetwork
from evaluator.fetching.host_rules import HostRefused, HostRules
from evaluator.fetching.resources import ResourceFetcher
from tests.evaluator.fetching.site import ALLOWED, FORBIDDEN, MAX_BYTES, Site
from tests.name_server import ScriptedNames

PUBLIC, OTHER = "93.184.216.34", "1.1.1.1"


def rules(allow: Sequence[str] = ("*",), deny: Sequence[str] = ()) -> HostRules:
    return HostRules(Hosts(allow), Hosts(deny))


ALLOWS = [
    (("*",), "a.example", [PUBLIC]),
    (("a.example",), "a.example", [PUBLIC]),
    (("A.Example",), "a.EXAMPLE.", [PUBLIC]),
    (("*.example",), "a.b.example", [PUBLIC]),
    (("*.xn--bcher-kva.example",), "a.xn--bcher-kva.example", [PUBLIC]),
    (("93.184.0.0/16",), "a.example", [PUBLIC]),
    ((PUBLIC,), PUBLIC, [PUBLIC]),
    (("2606:2800::/32",), "2606:2800::1", ["2606:2800::1"]),
    (("93.184.0.0/16",), "::ffff:5db8:d822", ["::ffff:5db8:d822"]),
]
REFUSES = [
    ((), "a.example", [PUBLIC]),
    (("a.example",), "b.example", [PUBLIC]),
    (("a.example",), "b.a.example", [PUBLIC]),
    (("*.example",), "example", [PUBLIC]),
    (("*.a.example",), "xa.example", [PUBLIC]),
    (("*.a.example",), "b.a.example.evil", [PUBLIC]),
    # A name with another address beside an allowed one.
    (("93.184.0.0/16",), "a.example", [PUBLIC, OTHER]),
    (("93.184.0.0/16",), OTHER, [OTHER]),
    (("a.example",), PUBLIC, [PUBLIC]),
    # 6to4: the packet goes to the address inside.
    (("2002::/16",), "2002:101:101::", ["2002:101:101::"]),
]


@pytest.mark.parametrize(("patterns", "host", "addresses"), ALLOWS)
def test_list_has_what_it_names_in_any_notation(patterns: Sequence[str], host: str, addresses: list[str]) -> None:
    rules(patterns).check(host, addresses)
    with pytest.raises(HostRefused):
        rules(deny=patterns).check(host, addresses)


@pytest.mark.parametrize(("patterns", "host", "addresses"), REFUSES)
def test_list_has_nothing_else(patterns: Sequence[str], host: str, addresses: list[str]) -> None:
    with pytest.raises(HostRefused):
        rules(patterns).check(host, addresses)


def test_host_is_denied_by_its_name_or_by_one_of_its_addresses() -> None:
    narrow = rules(["*.example"], ["bad.example", "1.1.1.0/24"])
    narrow.check("good.example", [PUBLIC])
    for host, addresses in (
        ("bad.example", [PUBLIC]),
        ("BAD.example.", [PUBLIC]),
        ("good.example", [PUBLIC, OTHER]),
        ("good.example", [f"::ffff:{OTHER}"]),
        ("good.example", ["64:ff9b::101:101"]),
        ("good.example", ["2002:101:101::"]),
    ):
        with pytest.raises(HostRefused):
            narrow.check(host, addresses)
    # An address that this machine does not know may be one of the denied network.
    with pytest.raises(HostRefused):
        narrow.check("good.example", [])
    rules(["*.example"], ["bad.example"]).check("good.example", [])


@pytest.mark.parametrize(
    "pattern",
    [
        *("", ".", "a..b", "*.*.example", "a.*", "*example", "http://a", "a:80", "bücher.example", "127.1", "0x7f.1"),
        *("10.0.0.1/8", "a/8", "300.1.1.1", "a b", "[::1]", "2130706433", "a." * 130 + "a"),
    ],
)
def test_pattern_that_can_match_nothing_is_wrong(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"should be a name such as|has host bits set|does not appear to be"):
        Hosts([pattern])


@pytest.fixture
async def fetcher(names: ScriptedNames) -> AsyncIterator[ResourceFetcher]:
    policy = AddressPolicy([AllowedNetwork.parse("127.0.0.0/8")])
    async with ResourceFetcher(MAX_BYTES, policy, resolver=names.resolver()) as fetcher:
        yield fetcher


async def refused(fetcher: ResourceFetcher, url: str) -> None:
    with pytest.raises(InvalidArgument, match="is no host that this app may fetch from"):
        await fetcher.fetch(url)


async def test_change_applies_to_connections_that_are_open(fetcher: ResourceFetcher, site: Site) -> None:
    good, bad, literal = (site.url("/bytes/5", host) for host in ("good.test", "bad.test", ALLOWED))
    for url in (good, bad, literal):
        assert await fetcher.fetch(url) == bytes(5)
    fetcher.restrict(rules(["good.test"]))
    assert await fetcher.fetch(good) == bytes(5)
    await refused(fetcher, bad)
    await refused(fetcher, literal)
    fetcher.restrict(rules(deny=[f"{ALLOWED}/32"]))
    await refused(fetcher, good)
    await refused(fetcher, literal)
    assert await fetcher.fetch(bad) == bytes(5)
    fetcher.restrict(rules())
    assert await fetcher.fetch(good) == bytes(5)
    assert len(site.hits) == 6


async def test_lists_open_nothing_that_is_closed(names: ScriptedNames, site: Site) -> None:
    policy = AddressPolicy([AllowedNetwork.parse(f"{ALLOWED}/32")])
    async with ResourceFetcher(MAX_BYTES, policy, resolver=names.resolver()) as fetcher:
        fetcher.restrict(rules(["good.test", "bad.test", "127.0.0.0/8"]))
        assert await fetcher.fetch(site.url("/bytes/5", "good.test")) == bytes(5)
        for host in ("bad.test", FORBIDDEN):
            with pytest.raises(InvalidArgument, match="is not a public address"):
                await fetcher.fetch(site.url("/bytes/5", host))


async def test_every_redirect_is_checked(fetcher: ResourceFetcher, site: Site) -> None:
    fetcher.restrict(rules(["*.test"], ["bad.test"]))
    target = site.url("/bytes/5", "good.test")
    assert await fetcher.fetch(f"{site.url('/to', 'good.test')}?url={target}") == bytes(5)
    site.hits.clear()
    for host in ("bad.test", "BAD.test.", FORBIDDEN, f"[::ffff:{FORBIDDEN}]", "good.test@bad.test"):
        with pytest.raises(InvalidArgument):
            await fetcher.fetch(f"{site.url('/to', 'good.test')}?url={site.url('/bytes/5', host)}")
    assert set(site.hits) == {"/to"}


@pytest.mark.parametrize(
    "host",
    [
        *("bad.test", "BAD.TEST", "bad.test.", "\uff42ad.test", "good.test@bad.test", "good.test:x@bad.test"),
        *("good.test%2f@bad.test", "good.test\\@bad.test", "bad.test%00.good.test"),
        *("2130706435", "0x7f000003", "0177.0.0.3", "127.3", f"[::ffff:{FORBIDDEN}]", FORBIDDEN, "127。0。0。3"),
    ],
)
async def test_no_notation_leads_to_a_denied_host(fetcher: ResourceFetcher, site: Site, host: str) -> None:
    fetcher.restrict(rules(["*.test"], ["bad.test"]))
    url = site.url("/bytes/5", host)
    with pytest.raises((InvalidArgument, ResourceUnreachable)):
        await fetcher.fetch(url)
    assert site.hits == []
