"""Which addresses a resource may come from."""

import ipaddress

import pytest

from atserving.errors import InvalidArgument
from evaluator.addresses import AddressPolicy, PolicyResolver

PUBLIC = ["8.8.8.8", "151.101.1.140", "2606:4700::6810:85e5", "::ffff:8.8.8.8", "64:ff9b::808:808"]
REFUSED = {
    "loopback": ["127.0.0.1", "127.255.0.3", "::1", "::ffff:127.0.0.1"],
    "private": ["10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", "fc00::1", "fd12::1", "::ffff:10.0.0.1"],
    "link-local": ["169.254.0.1", "fe80::1", "fe80::1%2"],
    "metadata": ["169.254.169.254", "fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192"],
    "shared": ["100.64.0.1", "100.127.255.255"],
    "unspecified": ["0.0.0.0", "0.1.2.3", "::"],
    "multicast": ["224.0.0.1", "239.255.255.250", "ff02::1", "ff0e::1"],
    "reserved": ["240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "2001:db8::1", "fec0::1", "::8.8.8.8"],
    "6to4": ["2002:7f00:1::", "2002:a00:1::1"],
    "nat64": ["64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::8.8.8.8"],
    "teredo": ["2001:0:a00:1:0:0:f7f7:f7f7", "2001::1"],
    "no address": ["", "localhost", "127.1", "0x7f000001", "2130706433", "0177.0.0.1", "127.0.0.1 "],
}


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address: str) -> None:
    assert AddressPolicy().allows(address)


@pytest.mark.parametrize("address", [address for group in REFUSED.values() for address in group])
def test_what_only_this_machine_can_reach_is_refused(address: str) -> None:
    assert not AddressPolicy().allows(address)


@pytest.mark.parametrize("address", ["10.1.2.3", "::ffff:10.1.2.3", "64:ff9b::a01:203"])
def test_an_operator_may_allow_a_network_in_any_notation(address: str) -> None:
    assert AddressPolicy([ipaddress.ip_network("10.0.0.0/8")]).allows(address)
    assert not AddressPolicy([ipaddress.ip_network("10.2.0.0/16")]).allows(address)


async def test_a_name_is_refused_by_the_address_it_resolves_to() -> None:
    resolver = PolicyResolver(AddressPolicy())
    with pytest.raises(InvalidArgument, match="'localhost': not a public address"):
        await resolver.resolve("localhost", 80)
    allowed = PolicyResolver(AddressPolicy([ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128")]))
    assert {result["port"] for result in await allowed.resolve("localhost", 80)} == {80}
