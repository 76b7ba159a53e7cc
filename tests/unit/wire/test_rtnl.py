"""rtnetlink: requests in bytes, and round trips request → value as the kernel would echo it."""

import contextlib
import ipaddress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.model.addr import IPAddress, IPNetwork
from podwire.model.kernelstate import Address, Bridge, Device, FdbEntry, Link, Neighbour, NextHop, Route, Veth, Vxlan
from podwire.wire import netlink, rtnl, rtnlread
from podwire.wire.netlink import Message, NetlinkError

NAMES = {3: "br0", 7: "flannel.1", 9: "eth0"}
INDICES = {name: index for index, name in NAMES.items()}

v4 = st.ip_addresses(v=4)
v6 = st.ip_addresses(v=6)
macs = st.binary(min_size=6, max_size=6).map(lambda raw: raw.hex(":"))
devices = st.sampled_from(sorted(INDICES))


def message(raw: bytes) -> Message:
    (parsed,) = netlink.parse_messages(raw)
    return parsed


def network(address: IPAddress, length: int) -> IPNetwork:
    bits = 32 if address.version == 4 else 128
    return ipaddress.ip_network((address, min(length, bits)), strict=False)


@st.composite
def routes(draw: st.DrawFn) -> Route:
    addresses: st.SearchStrategy[IPAddress] = draw(st.sampled_from([v4, v6]))
    dst = network(draw(addresses), draw(st.integers(0, 128)))
    src = draw(st.none() | addresses)
    onlink = draw(st.booleans())
    metric = draw(st.integers(0, 2**32 - 1).filter(lambda m: m != 1024))
    if draw(st.booleans()):
        return Route(dst, draw(devices), draw(st.none() | v4 | v6), src, onlink, metric)
    if draw(st.booleans()):
        return Route(dst, metric=metric, blackhole=True)
    legs = draw(st.lists(st.builds(NextHop, addresses, devices), min_size=1, max_size=4))
    return Route(dst, src=src, onlink=onlink, metric=metric, nexthops=tuple(legs))


@given(routes())
def test_routes_round_trip(route: Route) -> None:
    assert rtnlread.read_route(message(rtnl.set_route(route, INDICES)), NAMES) == route


@given(st.builds(Neighbour, devices, v4 | v6, macs))
def test_neighbours_round_trip(entry: Neighbour) -> None:
    assert rtnlread.read_neighbour(message(rtnl.set_neighbour(entry, INDICES[entry.dev])), NAMES) == entry


@given(st.builds(FdbEntry, devices, macs, v4 | v6))
def test_fdb_round_trip(entry: FdbEntry) -> None:
    for raw in (rtnl.set_fdb(entry, INDICES[entry.dev]), rtnl.del_fdb(entry, INDICES[entry.dev])):
        assert rtnlread.read_fdb(message(raw), NAMES) == entry
    assert rtnlread.read_neighbour(message(rtnl.set_fdb(entry, INDICES[entry.dev])), NAMES) is None


@given(devices, st.tuples(v4, st.integers(0, 32)) | st.tuples(v6, st.integers(0, 128)))
def test_addresses_round_trip(dev: str, parts: tuple[IPAddress, int]) -> None:
    address = Address(dev, ipaddress.ip_interface(parts))
    for raw in (rtnl.set_address(address, INDICES[dev]), rtnl.del_address(address, INDICES[dev])):
        assert rtnlread.read_address(message(raw), NAMES) == address


@given(
    st.integers(1, 2**24 - 1),
    st.integers(1, 65535),
    v4 | v6,
    st.booleans(),
    st.none() | st.integers(68, 9000),
    st.none() | macs,
)
def test_vxlan_round_trip(vni: int, port: int, local: IPAddress, learning: bool, mtu: int | None, mac: str | None) -> None:
    link = Link("vx", Vxlan(vni, port, local, "eth0", learning), mtu=mtu, mac=mac)
    raw = rtnlread.read_link(message(rtnl.new_link(link, indices=INDICES)))
    uplink = rtnlread.read_link(message(rtnl.new_link(Link("eth0", Bridge()), indices={})))
    read = rtnlread.links([raw, replace(uplink, index=INDICES["eth0"])])["vx"]
    assert (read.kind, read.mtu, read.mac) == (link.kind, mtu or 0, mac or "")


def test_route_in_bytes() -> None:
    """What `ip route replace 10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink proto 112` means (linux/rtnetlink.h)."""
    route = Route(ipaddress.ip_network("10.244.2.0/24"), "flannel.1", ipaddress.ip_address("10.244.2.0"), onlink=True)
    assert message(rtnl.set_route(route, INDICES)).payload == bytes.fromhex(
        "02180000fe70000104000000"  # family 2, /24, table main, protocol 112, scope universe, unicast, RTNH_F_ONLINK
        "080001000af40200"  # RTA_DST
        "0800040007000000"  # RTA_OIF
        "080005000af40200"  # RTA_GATEWAY
    )
    assert message(rtnl.set_route(route, INDICES)).flags == 0x501  # REQUEST | CREATE | REPLACE


def test_veth_peer_goes_to_its_namespace() -> None:
    link, peer = Link("veth1", Veth("eth0")), Link("eth0", Veth("veth1"), mtu=1450, mac="0a:58:0a:f4:01:02")
    parsed = message(rtnl.new_link(link, indices={}, peer=peer, peer_ns_fd=42))
    assert parsed.flags == 0x601  # REQUEST | CREATE | EXCL
    attrs = netlink.parse_attrs(parsed.payload, rtnl.IFINFOMSG.size)
    info = netlink.parse_attrs(attrs[rtnl.IFLA_LINKINFO])
    assert netlink.as_str(info[rtnl.IFLA_INFO_KIND]) == "veth"
    end = netlink.parse_attrs(netlink.parse_attrs(info[rtnl.IFLA_INFO_DATA])[rtnl.VETH_INFO_PEER], rtnl.IFINFOMSG.size)
    assert netlink.as_str(end[rtnl.IFLA_IFNAME]) == "eth0"
    assert netlink.as_u32(end[rtnl.IFLA_NET_NS_FD]) == 42
    assert netlink.as_u32(end[rtnl.IFLA_MTU]) == 1450
    assert end[rtnl.IFLA_ADDRESS].hex(":") == "0a:58:0a:f4:01:02"


def test_settling_a_port_sets_master_alias_hairpin_then_up() -> None:
    link = Link("veth1", Veth("eth0"), master="br0", hairpin=True, alias="podwire:x")
    first, second, third = (message(raw) for raw in rtnl.settle_link(link, indices=INDICES))
    attrs = netlink.parse_attrs(first.payload, rtnl.IFINFOMSG.size)
    assert netlink.as_u32(attrs[rtnl.IFLA_MASTER]) == INDICES["br0"]
    assert attrs[rtnl.IFLA_IFALIAS] == b"podwire:x"
    info = netlink.parse_attrs(netlink.parse_attrs(second.payload, rtnl.IFINFOMSG.size)[rtnl.IFLA_LINKINFO])
    assert netlink.as_str(info[rtnl.IFLA_INFO_SLAVE_KIND]) == "bridge"
    assert netlink.parse_attrs(info[rtnl.IFLA_INFO_SLAVE_DATA]) == {rtnl.IFLA_BRPORT_MODE: b"\x01"}
    _, _, _, flags, change = rtnl.IFINFOMSG.unpack_from(third.payload)
    assert (flags, change) == (rtnl.IFF_UP, rtnl.IFF_UP)


def test_a_link_without_settings_needs_only_up() -> None:
    assert len(rtnl.settle_link(Link("br0", Bridge()), indices={})) == 1
    assert rtnl.settle_link(Link("br0", Bridge(), up=False), indices={}) == []


def test_a_device_is_never_made() -> None:
    with pytest.raises(ValueError, match="eth0"):
        rtnl.new_link(Link("eth0", Device()), indices={})


@pytest.mark.parametrize("mac", ["", "0a:58", "0a:58:00:00:00:00:00", "hello"])
def test_malformed_macs(mac: str) -> None:
    with pytest.raises(ValueError, match=r"MAC|hex"):
        rtnl.mac_bytes(mac)


def test_other_peoples_routes_are_not_read() -> None:
    route = Route(ipaddress.ip_network("10.0.0.0/8"), "br0")
    raw = bytearray(rtnl.set_route(route, INDICES))
    for at, value in ((21, 3), (20, 255), (23, 7)):  # protocol boot; table local; type unreachable
        other = bytearray(raw)
        other[at] = value
        assert rtnlread.read_route(message(bytes(other)), NAMES) is None
    assert rtnlread.read_route(message(bytes(raw)), NAMES) == route


def test_learnt_neighbours_are_not_read() -> None:
    header = rtnl.NDMSG.pack(rtnl.AF_INET, 3, 0x02, 0, 0)  # NUD_REACHABLE
    attrs = netlink.attr(rtnl.NDA_DST, bytes(4)) + netlink.attr(rtnl.NDA_LLADDR, bytes(6))
    assert rtnlread.read_neighbour(message(netlink.message(rtnl.RTM_NEWNEIGH, 0, 0, header, attrs)), NAMES) is None


def test_notices() -> None:
    route = Route(ipaddress.ip_network("10.244.2.0/24"), "flannel.1", ipaddress.ip_address("10.244.2.0"))
    assert rtnlread.read_notice(message(rtnl.set_route(route, INDICES)), NAMES) == (
        "route",
        "10.244.2.0/24 via 10.244.2.0 dev flannel.1",
        False,
    )
    assert rtnlread.read_notice(message(rtnl.del_link("br0")), NAMES) == ("link", "br0", True)
    multicast = Neighbour("br0", ipaddress.ip_address("ff02::16"), "33:33:00:00:00:16")
    assert rtnlread.read_notice(message(rtnl.del_neighbour(multicast, 3)), NAMES) is None
    assert rtnlread.read_notice(Message(99, 0, 0, 0, b""), NAMES) is None


@given(st.sampled_from([16, 20, 24, 28]), st.binary(max_size=80))
def test_broken_messages_are_named(type_: int, payload: bytes) -> None:
    with contextlib.suppress(NetlinkError):
        rtnlread.read_notice(Message(type_, 0, 0, 0, payload), NAMES)
