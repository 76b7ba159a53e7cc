"""flannel's network configuration: defaults, and a clear word for each wrong thing (expected values: flannel 0.28's code)."""

import ipaddress
import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from podwire.model.addr import Family
from podwire.model.errors import InvalidInput
from podwire.model.netconf import (
    AllocBackend,
    HostGwBackend,
    IpipBackend,
    NetConfig,
    UdpBackend,
    VxlanBackend,
    WireguardBackend,
    parse_net_config,
)

VXLAN = {"Type": "vxlan"}


def parsed(**document: Any) -> NetConfig:
    return parse_net_config(json.dumps({"Network": "10.5.0.0/16", "Backend": VXLAN} | document))


@pytest.mark.parametrize(
    ("network", "given", "length", "first", "last"),
    [
        ("10.0.0.0/8", {}, 24, "10.0.1.0", "10.255.255.0"),
        ("10.5.0.0/16", {}, 24, "10.5.1.0", "10.5.255.0"),
        ("10.3.0.0/22", {}, 24, "10.3.1.0", "10.3.3.0"),
        ("10.3.0.0/23", {}, 25, "10.3.0.128", "10.3.1.128"),
        ("10.3.0.0/28", {}, 30, "10.3.0.4", "10.3.0.12"),
        ("10.3.0.0/16", {"SubnetLen": 28}, 28, "10.3.0.16", "10.3.255.240"),
        ("10.3.0.0/16", {"SubnetMin": "10.3.5.0", "SubnetMax": "10.3.8.0"}, 24, "10.3.5.0", "10.3.8.0"),
        ("10.3.7.9/16", {}, 24, "10.3.1.0", "10.3.255.0"),
    ],
)
def test_ranges_of_ipv4(network: str, given: dict[str, Any], length: int, first: str, last: str) -> None:
    found = parsed(Network=network, **given).ranges[Family.IPV4]
    assert (found.length, str(found.first), str(found.last)) == (length, first, last)


@pytest.mark.parametrize(
    ("network", "given", "length", "first", "last"),
    [
        ("fd00::/48", {}, 64, "fd00:0:0:1::", "fd00:0:0:ffff::"),
        ("fd00::/62", {}, 64, "fd00:0:0:1::", "fd00:0:0:3::"),
        ("fd00::/63", {}, 65, "fd00:0:0:0:8000::", "fd00:0:0:1:8000::"),
        ("fd00::/64", {"IPv6SubnetLen": 80}, 80, "fd00:0:0:0:1::", "fd00:0:0:0:ffff::"),
    ],
)
def test_ranges_of_ipv6(network: str, given: dict[str, Any], length: int, first: str, last: str) -> None:
    found = parsed(EnableIPv6=True, IPv6Network=network, **given).ranges[Family.IPV6]
    assert (found.length, found.first, found.last) == (length, ipaddress.ip_address(first), ipaddress.ip_address(last))


def test_a_range_counts_and_names_its_subnets() -> None:
    found = parsed(SubnetMin="10.5.10.0", SubnetMax="10.5.99.0").ranges[Family.IPV4]
    assert found.count == 90
    assert str(found.at(0)) == "10.5.10.0/24"
    assert str(found.at(89)) == "10.5.99.0/24"
    with pytest.raises(IndexError):
        found.at(90)
    assert ipaddress.ip_network("10.5.50.0/24") in found
    assert ipaddress.ip_network("10.5.50.0/25") not in found
    assert ipaddress.ip_network("10.5.9.0/24") not in found
    assert ipaddress.ip_network("fd00::/64") not in found


def test_keys_without_regard_to_case() -> None:
    config = parse_net_config('{"network":"10.5.0.0/16","SUBNETLEN":26,"enableipv4":true,"backend":{"TYPE":"VXLAN","vni":7}}')
    assert config.ranges[Family.IPV4].length == 26
    assert config.backend == VxlanBackend(vni=7)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"Type": "vxlan"}, VxlanBackend(vni=1, port=8472)),
        (
            {"Type": "vxlan", "VNI": 4096, "Port": 4789, "GBP": True, "DirectRouting": True, "MTU": 1400},
            VxlanBackend(vni=4096, port=4789, gbp=True, direct_routing=True, mtu=1400),
        ),
        ({"Type": "host-gw"}, HostGwBackend()),
        ({"Type": "alloc"}, AllocBackend()),
        ({"Type": "udp"}, UdpBackend(port=8285)),
        ({"Type": "udp", "Port": 9000}, UdpBackend(port=9000)),
        ({"Type": "ipip", "DirectRouting": True}, IpipBackend(direct_routing=True)),
        ({"Type": "wireguard"}, WireguardBackend(port=51820, port_v6=51821, mode="separate")),
        (
            {"Type": "wireguard", "PSK": "c2VjcmV0", "PersistentKeepaliveInterval": 25, "Mode": "auto", "ListenPort": 1},
            WireguardBackend(psk="c2VjcmV0", keepalive=25, mode="auto", port=1),
        ),
    ],
)
def test_backends(given: dict[str, Any], expected: object) -> None:
    assert parsed(Backend=given).backend == expected


def test_a_missing_backend_is_udp_with_a_warning() -> None:
    config = parse_net_config('{"Network":"10.5.0.0/16"}')
    assert config.backend == UdpBackend()
    assert "means udp" in config.warnings[0]


def test_unknown_keys_are_told() -> None:
    config = parsed(SubnetLenght=24, Backend={"Type": "host-gw", "Vni": 3})
    assert ["SubnetLenght" in config.warnings[1], "Vni" in config.warnings[0]] == [True, True]


def test_the_kube_manager_does_not_divide_the_network() -> None:
    config = parse_net_config(
        '{"Network":"10.5.0.0/30","SubnetLen":99999,"Backend":{"Type":"vxlan"}}'.replace("99999", "31"), leased=False
    )
    assert config.ranges == {}
    assert config.network(Family.IPV4) == ipaddress.ip_network("10.5.0.0/30")


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("nonsense", "is not JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "Network is missing"),
        ('{"Network":"10.5.0.0/16","EnableIPv4":false}', "both false"),
        ('{"Network":"10.5.0.0/16","EnableIPv6":true}', "IPv6Network is missing"),
        ('{"Network":"10.5.0.0/16","EnableIPv4":"yes"}', "EnableIPv4 must be true or false"),
        ('{"Network":"10.5.0.0"}', "no prefix length"),
        ('{"Network":"10.5.0.0/99"}', "is no network"),
        ('{"Network":5}', "must be a string"),
        ('{"Network":"fd00::/48"}', "must be an IPv4 network"),
        ('{"Network":"10.5.0.0/29"}', "too small"),
        ('{"Network":"10.5.0.0/16","SubnetLen":17}', "fewer than four"),
        ('{"Network":"10.5.0.0/16","SubnetLen":31}', "no room for pods"),
        ('{"Network":"10.5.0.0/16","SubnetLen":33}', "between 1 and 32"),
        ('{"Network":"10.5.0.0/16","SubnetLen":"24"}', "whole number"),
        ('{"Network":"10.5.0.0/16","SubnetMin":"10.6.0.0"}', "lies outside"),
        ('{"Network":"10.5.0.0/16","SubnetMax":"10.5.1.128"}', "not the first address"),
        ('{"Network":"10.5.0.0/16","SubnetMin":"10.5.9.0","SubnetMax":"10.5.3.0"}', "lies above"),
        ('{"Network":"10.5.0.0/16","SubnetMin":"x"}', "no IP address"),
        ('{"Network":"10.5.0.0/16","Backend":7}', "Backend must be"),
        ('{"Network":"10.5.0.0/16","Backend":{}}', "no Type"),
        ('{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":16777216}}', "VNI is 16777216"),
        ('{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","MTU":68}}', "MTU is 68"),
        ('{"Network":"10.5.0.0/16","Backend":{"Type":"wireguard","Mode":"both"}}', "Mode 'both'"),
        (
            '{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48","Backend":{"Type":"ipip"}}',
            "carries IPv4 only",
        ),
    ],
)
def test_what_is_wrong_is_said(document: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=r"^cluster\.json") as caught:
        parse_net_config(document, source="cluster.json")
    assert words in str(caught.value)


def test_an_unknown_backend_names_the_choice() -> None:
    with pytest.raises(
        InvalidInput, match=r"podwire has no back end 'ipsec'; use vxlan, host-gw, alloc, udp, ipip or wireguard"
    ):
        parsed(Backend={"Type": "ipsec"})


def test_a_preshared_key_is_not_shown() -> None:
    assert "c2VjcmV0" not in repr(parsed(Backend={"Type": "wireguard", "PSK": "c2VjcmV0"}))


@given(st.integers(4, 28), st.data())
def test_every_subnet_of_a_range_is_in_it_and_in_the_network(prefix: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(1 << 24, (224 << 24) - 1), label="below multicast")
    network = ipaddress.ip_network((first >> (32 - prefix) << (32 - prefix), prefix))
    assume(not network.is_loopback and not network.is_link_local)
    found = parsed(Network=str(network)).ranges[Family.IPV4]
    subnet = found.at(data.draw(st.integers(0, found.count - 1)))
    assert subnet in found
    assert subnet.subnet_of(network)  # type: ignore[arg-type]  # both are IPv4
    assert subnet.network_address != network.network_address


@pytest.mark.parametrize("network", ["0.0.0.0/0", "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/8"])
def test_networks_that_no_host_can_route_are_refused(network: str) -> None:
    with pytest.raises(InvalidInput, match=f"pods cannot have addresses of Network {network}"):
        parse_net_config(f'{{"Network": "{network}", "Backend": {{"Type": "vxlan"}}}}')
