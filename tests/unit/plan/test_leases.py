"""Leases in flannel's words: golden texts (compat.md D1, D2), and nothing lost on the way there and back."""

import ipaddress
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.model.addr import Family, IPNetwork
from podwire.model.objects import Node
from podwire.plan.leases import (
    Lease,
    LeaseAttrs,
    decode_attrs,
    decode_lease,
    encode_annotations,
    encode_attrs,
    forced_addresses,
    lease_of_node,
    overlap,
    parse_subnet_key,
    subnet_key,
    told_addresses,
    vxlan_data,
    vxlan_peers,
)
from podwire.plan.overlay import Peer

MAC = "c6:d2:32:6f:8f:44"
V4 = IPv4Address("192.168.64.3")
V6 = IPv6Address("fd00::3")


def net(text: str) -> IPNetwork:
    return ipaddress.ip_network(text)


GOLDEN = {
    "vxlan": (
        LeaseAttrs(public_ip=V4, backend_type="vxlan", backend_data=vxlan_data(1, MAC)),
        '{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}',
    ),
    "vxlan, both families": (
        LeaseAttrs(
            public_ip=V4,
            public_ipv6=V6,
            backend_type="vxlan",
            backend_data=vxlan_data(1, MAC),
            backend_v6_data=vxlan_data(1, "0a:00:00:00:00:01"),
        ),
        (
            '{"PublicIP":"192.168.64.3","PublicIPv6":"fd00::3","BackendType":"vxlan",'
            '"BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"},"BackendV6Data":{"VNI":1,"VtepMAC":"0a:00:00:00:00:01"}}'
        ),
    ),
    "IPv6 alone": (
        LeaseAttrs(public_ipv6=V6, backend_type="vxlan", backend_v6_data=vxlan_data(1, MAC)),
        (
            '{"PublicIP":"0.0.0.0","PublicIPv6":"fd00::3","BackendType":"vxlan",'
            '"BackendV6Data":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}'
        ),
    ),
    "host-gw": (
        LeaseAttrs(public_ip=V4, backend_type="host-gw"),
        '{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"host-gw"}',
    ),
    "udp": (LeaseAttrs(public_ip=V4), '{"PublicIP":"192.168.64.3","PublicIPv6":null}'),
    "wireguard": (
        LeaseAttrs(public_ip=V4, backend_type="wireguard", backend_data='{"PublicKey":"qk+/=","Port":51820}'),
        '{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"wireguard","BackendData":{"PublicKey":"qk+/=","Port":51820}}',
    ),
    "fields from elsewhere": (
        LeaseAttrs(public_ip=V4, backend_type="ipip", extra=(("Zone", '{"a":[1,null]}'),)),
        '{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"ipip","Zone":{"a":[1,null]}}',
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_values_are_flannels_byte_for_byte(name: str) -> None:
    attrs, text = GOLDEN[name]
    assert encode_attrs(attrs).decode() == text
    assert decode_attrs(text.encode()) == attrs


def test_values_are_read_as_go_reads_them() -> None:
    """Any order, any case, any spaces, nulls."""
    text = (
        b'{ "backenddata": {"VNI": 1, "VtepMAC": "x"}, "publicip": "192.168.64.3", "BACKENDTYPE": "vxlan", "PublicIPv6": null }'
    )
    assert decode_attrs(text) == LeaseAttrs(public_ip=V4, backend_type="vxlan", backend_data='{"VNI":1,"VtepMAC":"x"}')


@pytest.mark.parametrize("text", [b"", b"no JSON", b"[]", b"1", b'{"PublicIP":"x"}', b'{"PublicIPv6":"1.2.3.4"}', b"\xff"])
def test_what_is_no_lease_is_skipped(text: bytes) -> None:
    assert decode_attrs(text) is None
    assert decode_lease("10.5.34.0-24", text) is None


@pytest.mark.parametrize(
    ("subnets", "key"),
    [
        (["10.5.34.0/24"], "10.5.34.0-24"),
        (["10.5.34.0/24", "fd00:5:34::/64"], "10.5.34.0-24&fd00:5:34::-64"),
        (["fd00:5:34::/64"], "0.0.0.0-0&fd00:5:34::-64"),
    ],
)
def test_keys(subnets: list[str], key: str) -> None:
    networks = tuple(map(net, subnets))
    assert subnet_key(networks) == key
    assert parse_subnet_key(key) == networks


@pytest.mark.parametrize(
    "key", ["", "config", "10.5.34.0", "10.5.34.1-24", "10.5.34.0-33", "300.1.1.0-24", "10.5.34.0-24&x-64"]
)
def test_keys_that_are_none(key: str) -> None:
    assert parse_subnet_key(key) == ()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=6).filter(lambda k: not k.lower().startswith(("public", "backend"))), json_values
    ),
    st.ip_addresses(v=4).filter(int),
    st.none() | st.ip_addresses(v=6).filter(int),
)
def test_what_others_wrote_comes_back_the_same(extra: dict[str, Any], v4: IPv4Address, v6: IPv6Address | None) -> None:
    document = {
        "PublicIP": str(v4),
        "PublicIPv6": str(v6) if v6 else None,
        "BackendType": "vxlan",
        "BackendData": {"N": 1},
    } | extra
    attrs = decode_attrs(msgspec.json.encode(document))
    assert attrs is not None
    assert msgspec.json.decode(encode_attrs(attrs)) == document | {}
    assert decode_attrs(encode_attrs(attrs)) == attrs


# --- annotations ----------------------------------------------------------------------------------------------------------


def node(annotations: dict[str, str], *cidrs: str) -> Node:
    metadata = {"name": "n1", "annotations": annotations}
    return msgspec.convert({"metadata": metadata, "spec": {"podCIDR": cidrs[0] if cidrs else "", "podCIDRs": cidrs}}, Node)


def test_annotations_are_flannels() -> None:
    attrs, _ = GOLDEN["vxlan, both families"]
    prefix = "flannel.alpha.coreos.com/"
    assert encode_annotations(attrs, [Family.IPV4, Family.IPV6]) == {
        prefix + "kube-subnet-manager": "true",
        prefix + "backend-type": "vxlan",
        prefix + "backend-data": '{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}',
        prefix + "backend-v6-data": '{"VNI":1,"VtepMAC":"0a:00:00:00:00:01"}',
        prefix + "public-ip": "192.168.64.3",
        prefix + "public-ipv6": "fd00::3",
    }
    host_gw, _ = GOLDEN["host-gw"]
    assert encode_annotations(host_gw, [Family.IPV4], "example.org") == {
        "example.org/kube-subnet-manager": "true",
        "example.org/backend-type": "host-gw",
        "example.org/backend-data": "null",
        "example.org/public-ip": "192.168.64.3",
    }


def test_flannel_finds_its_own_mac_in_what_we_wrote() -> None:
    """It cuts the annotation at `:"` and trims the rest (flannel 0.28, backend/vxlan): exactly one such place, at the MAC."""
    text = encode_annotations(GOLDEN["vxlan"][0], [Family.IPV4])["flannel.alpha.coreos.com/backend-data"]
    _, found = text.split(':"')
    assert found.strip('"}') == MAC


@pytest.mark.parametrize("name", ["vxlan", "vxlan, both families", "host-gw", "wireguard"])
def test_a_node_says_what_its_lease_is(name: str) -> None:
    attrs, _ = GOLDEN[name]
    cidrs = ["10.5.34.0/24", "fd00:5:34::/64"] if attrs.public_ipv6 else ["10.5.34.0/24"]
    subnets = tuple(map(net, cidrs))
    told = encode_annotations(attrs, [Family.IPV4, Family.IPV6][: len(subnets)])
    assert lease_of_node(node(told, *cidrs)) == Lease("n1", subnets, attrs)


def test_nodes_without_a_lease() -> None:
    told = encode_annotations(GOLDEN["vxlan"][0], [Family.IPV4])
    assert lease_of_node(node(told)) is None
    assert lease_of_node(node({}, "10.5.34.0/24")) is None
    assert lease_of_node(node(told | {"flannel.alpha.coreos.com/kube-subnet-manager": "false"}, "10.5.34.0/24")) is None


def test_an_operator_overrides_the_address_that_peers_use() -> None:
    attrs, _ = GOLDEN["vxlan"]
    told = encode_annotations(attrs, [Family.IPV4]) | {"flannel.alpha.coreos.com/public-ip-overwrite": "203.0.113.9"}
    behind_nat = node(told, "10.5.34.0/24")
    lease = lease_of_node(behind_nat)
    assert lease is not None
    assert lease.attrs.public_ip == IPv4Address("203.0.113.9")
    assert told_addresses(behind_nat, attrs).public_ip == IPv4Address("203.0.113.9")


def test_peers_through_vxlan() -> None:
    attrs, _ = GOLDEN["vxlan, both families"]
    lease = Lease("n1", (net("10.5.34.0/24"), net("fd00:5:34::/64")), attrs)
    assert vxlan_peers(lease, 1) == (
        Peer("n1", net("10.5.34.0/24"), V4, MAC, 1),
        Peer("n1", net("fd00:5:34::/64"), V6, "0a:00:00:00:00:01", 1),
    )
    assert vxlan_peers(lease, 2) == ()
    assert vxlan_peers(Lease("n1", (net("10.5.34.0/24"),), GOLDEN["host-gw"][0]), 1) == ()
    broken = LeaseAttrs(public_ip=V4, backend_type="vxlan", backend_data='{"VNI":1,"VtepMAC":"zz"}')
    assert vxlan_peers(Lease("n1", (net("10.5.34.0/24"),), broken), 1) == ()


networks = st.one_of(
    st.builds(lambda a, n: ipaddress.ip_network((a, n), strict=False), st.integers(0, 2**32 - 1), st.integers(0, 32)),
    st.builds(lambda a, n: ipaddress.ip_network((a, n), strict=False), st.integers(2**32, 2**128 - 1), st.integers(0, 128)),
)


@given(networks, networks)
def test_overlap_is_what_ipaddress_says(one: IPNetwork, other: IPNetwork) -> None:
    assert overlap(one, other) == (one.version == other.version and one.overlaps(other))
    assert overlap(one, one.supernet() if one.prefixlen else one)


@pytest.mark.parametrize(
    ("prefix", "key"),
    [
        ("example.org", "example.org/public-ip"),
        ("example.org/", "example.org/public-ip"),
        ("example.org/net", "example.org/net-public-ip"),
        ("example.org/net-", "example.org/net-public-ip"),
    ],
)
def test_a_prefix_may_have_a_slash_of_its_own(prefix: str, key: str) -> None:
    attrs = GOLDEN["vxlan"][0]
    told = encode_annotations(attrs, [Family.IPV4], prefix)
    assert told[key] == str(attrs.public_ip)
    read = lease_of_node(node(told, "10.5.34.0/24"), prefix)
    assert read is not None
    assert read.attrs == attrs


def test_a_node_is_told_its_public_addresses() -> None:
    four, six = "flannel.alpha.coreos.com/node-public-ip", "flannel.alpha.coreos.com/node-public-ipv6"
    told = {four: "203.0.113.9", six: "2001:db8::9"}
    assert forced_addresses(node(told)) == (IPv4Address("203.0.113.9"), IPv6Address("2001:db8::9"))
    assert forced_addresses(node({four: "?"})) == ()
