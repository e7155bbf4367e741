"""Resources may come only from public and from allowed addresses."""

import socket

import pytest

from evaluator.fetching.addresses import AddressPolicy, AddressRefused, AllowedNetwork
from evaluator.fetching.http_fetcher import PolicyResolver
from tests.name_server import scripted_names

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
    "translated": ["::ffff:0:127.0.0.1", "::127.0.0.1", "64:ff9b:1::7f00:1"],
    "6to4": ["2002:7f00:1::", "2002:a00:1::1"],
    "nat64": ["64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::8.8.8.8"],
    "teredo": ["2001:0:a00:1:0:0:f7f7:f7f7", "2001::1"],
    "no address": ["", "localhost", "127.1", "0x7f000001", "2130706433", "0177.0.0.1", "127.0.0.1 "],
}


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address: str) -> None:
    assert AddressPolicy().allows(address, 80)


@pytest.mark.parametrize("address", [address for group in REFUSED.values() for address in group])
def test_internal_addresses_are_refused(address: str) -> None:
    assert not AddressPolicy().allows(address, 80)


@pytest.mark.parametrize("address", ["10.1.2.3", "::ffff:10.1.2.3", "64:ff9b::a01:203"])
def test_an_operator_may_allow_a_network_in_any_notation(address: str) -> None:
    assert AddressPolicy([AllowedNetwork.parse("10.0.0.0/8")]).allows(address, 80)
    assert not AddressPolicy([AllowedNetwork.parse("10.2.0.0/16")]).allows(address, 80)


@pytest.mark.parametrize(
    ("allowed", "address"),
    [
        ("127.0.0.1:8000", "127.0.0.1"),
        ("127.0.0.1:8000", "::ffff:127.0.0.1"),
        ("10.0.0.0/8:8000", "10.1.2.3"),
        ("[::1]:8000", "::1"),
        ("[fd00::/8]:8000", "fd12::1"),
    ],
)
def test_an_operator_may_allow_one_port_of_a_network(allowed: str, address: str) -> None:
    policy = AddressPolicy([AllowedNetwork.parse(allowed)])
    assert policy.allows(address, 8000)
    assert not policy.allows(address, 8001)
    assert not policy.allows("192.168.0.1", 8000)


@pytest.mark.parametrize("allowed", ["127.0.0.1", "127.0.0.0/8", "::1", "fd00::/8"])
def test_an_operator_may_allow_all_ports_of_a_network(allowed: str) -> None:
    address = allowed.partition("/")[0]
    policy = AddressPolicy([AllowedNetwork.parse(allowed)])
    assert policy.allows(address, 1)
    assert policy.allows(address, 65535)


@pytest.mark.parametrize(
    "text",
    ["", "10.0.0.1/8", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:", "10.0.0.1:a", "[::1]", "a.test:80", "[::1:80"],
)
def test_what_is_no_network_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"network|host bits|port"):
        AllowedNetwork.parse(text)


def test_no_socket_is_made_for_another_port_of_an_allowed_address() -> None:
    policy = AddressPolicy([AllowedNetwork.parse("127.0.0.1:8000")])
    policy.socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 8000))).close()
    with pytest.raises(AddressRefused):
        policy.socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 8001)))


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "169.254.169.254", "2130706433", "127.1"])
def test_no_socket_is_made_for_a_refused_address(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with pytest.raises(AddressRefused, match="is not a public address"):
        AddressPolicy().socket((family, socket.SOCK_STREAM, 0, "", (address, 80)))
    with AddressPolicy().socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", ("8.8.8.8", 80))) as made:
        assert made.family == socket.AF_INET


async def test_a_name_is_refused_by_the_addresses_it_resolves_to() -> None:
    with scripted_names() as names:
        names.addresses = {
            "public.test": [["8.8.8.8", "1.1.1.1"]],
            "private.test": [["10.0.0.1"]],
            "both.test": [["8.8.8.8", "10.0.0.1"]],
        }
        closed = PolicyResolver(AddressPolicy(), names.resolver())
        for name in ("private.test", "both.test", "localhost"):
            with pytest.raises(AddressRefused, match=f"'{name}' is not a public address"):
                await closed.resolve(name, 80)
        assert {each["host"] for each in await closed.resolve("public.test", 80)} == {"8.8.8.8", "1.1.1.1"}
        allowed = PolicyResolver(AddressPolicy([AllowedNetwork.parse("10.0.0.0/8")]), names.resolver())
        assert {each["host"] for each in await allowed.resolve("both.test", 80)} == {"8.8.8.8", "10.0.0.1"}
        one_port = PolicyResolver(AddressPolicy([AllowedNetwork.parse("10.0.0.0/8:80")]), names.resolver())
        assert {each["host"] for each in await one_port.resolve("private.test", 80)} == {"10.0.0.1"}
        with pytest.raises(AddressRefused):
            await one_port.resolve("private.test", 81)
        for resolver in (closed, allowed, one_port):
            await resolver.close()
