"""Packets: bytes → values → bytes, real captures, and garbage."""

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.model.addr import IPAddress
from podwire.wire.packet import (
    ETH_ARP,
    ETH_IPV4,
    ETH_IPV6,
    ICMP,
    IPIP,
    TCP,
    UDP,
    Frame,
    Packet,
    bare_frame,
    build_frame,
    build_packet,
    parse_frame,
    parse_packet,
)

A, B = ip_address("10.244.0.5"), ip_address("10.244.1.7")
PAIRS = st.one_of(
    st.tuples(st.ip_addresses(v=4), st.ip_addresses(v=4)),
    st.tuples(st.ip_addresses(v=6), st.ip_addresses(v=6)),
)
PORTS = st.integers(1, 65535).filter(lambda port: port not in (8472, 4789, 8285))


def ethertype(address: IPAddress) -> int:
    return ETH_IPV4 if address.version == 4 else ETH_IPV6


@given(PAIRS, st.sampled_from([TCP, UDP]), PORTS, PORTS, st.binary(max_size=64), st.integers(1, 255))
def test_what_is_built_is_parsed_back(
    pair: tuple[IPAddress, IPAddress], protocol: int, sport: int, dport: int, payload: bytes, ttl: int
) -> None:
    packet = Packet(*pair, protocol, ttl, sport, dport, payload)
    assert parse_packet(ethertype(pair[0]), build_packet(packet)) == packet


@given(PAIRS, PAIRS, st.integers(0, 2**24 - 1), st.binary(max_size=32))
def test_a_vxlan_packet_shows_what_it_carries(
    outer: tuple[IPAddress, IPAddress], inner: tuple[IPAddress, IPAddress], vni: int, payload: bytes
) -> None:
    carried = Packet(*inner, TCP, 64, 40000, 80, payload)
    frame = Frame("02:00:00:00:00:01", "02:00:00:00:00:02", ethertype(inner[0]), carried)
    tunnel = Packet(*outer, UDP, 64, 51000, 8472, vni=vni, inner=frame)
    seen = parse_packet(ethertype(outer[0]), build_packet(tunnel))
    assert seen is not None
    assert (seen.vni, seen.innermost) == (vni, carried)


@pytest.mark.parametrize(("protocol", "port", "name"), [(IPIP, 0, "ipip"), (UDP, 8285, "udp")])
def test_a_tunnel_without_frames_shows_what_it_carries(protocol: int, port: int, name: str) -> None:
    carried = Packet(A, B, TCP, 64, 40000, 80, b"payload")
    outer = ip_address("198.18.0.11"), ip_address("198.18.0.12")
    seen = parse_packet(ETH_IPV4, build_packet(Packet(*outer, protocol, 64, port, port, inner=bare_frame(ETH_IPV4, carried))))
    assert seen is not None
    assert (seen.tunnel, seen.vni, seen.innermost) == (name, None, carried)
    stranger = parse_packet(ETH_IPV4, build_packet(Packet(*outer, protocol, 64, port, port, b"E" + bytes(30))))
    assert stranger is not None
    assert (stranger.tunnel, stranger.innermost) == ("", stranger)


def test_flow_names_both_ends() -> None:
    assert Packet(A, B, TCP, sport=4242, dport=80).flow == "10.244.0.5:4242 → 10.244.1.7:80/tcp"
    assert Packet(ip_address("fd00::1"), ip_address("fd00::2"), UDP, sport=1, dport=53).flow == "[fd00::1]:1 → [fd00::2]:53/udp"
    assert Packet(A, B, ICMP).flow == "10.244.0.5 → 10.244.1.7/icmp"


def test_ethernet_padding_is_not_payload() -> None:
    frame = Frame("02:00:00:00:00:01", "02:00:00:00:00:02", ETH_IPV4, Packet(A, B, UDP, sport=1, dport=2, payload=b"hi"))
    seen = parse_frame(build_frame(frame) + bytes(20))
    assert seen is not None
    assert seen.packet is not None
    assert seen.packet.payload == b"hi"


def test_known_checksums() -> None:
    # The worked example of an IPv4 header checksum: 192.168.0.1 → 192.168.0.199, UDP (0xb861 with these very fields).
    built = build_packet(Packet(ip_address("192.168.0.1"), ip_address("192.168.0.199"), ICMP, 64, payload=bytes(95)))
    assert sum(int.from_bytes(built[i : i + 2], "big") for i in range(0, 20, 2)) % 0xFFFF == 0


def test_a_later_fragment_has_no_ports() -> None:
    raw = bytearray(build_packet(Packet(A, B, UDP, sport=7, dport=9, payload=b"x" * 8)))
    raw[6:8] = (0x00B9).to_bytes(2, "big")
    seen = parse_packet(ETH_IPV4, bytes(raw))
    assert seen is not None
    assert (seen.sport, seen.dport) == (0, 0)


def test_other_protocols_stay_bytes() -> None:
    seen = parse_frame(bytes(12) + ETH_ARP.to_bytes(2, "big") + b"arp")
    assert seen is not None
    assert (seen.packet, seen.payload) == (None, b"arp")


@pytest.mark.parametrize("size", range(14))
def test_a_runt_is_no_frame(size: int) -> None:
    assert parse_frame(bytes(size)) is None


@given(st.binary(max_size=120))
def test_garbage_never_raises(data: bytes) -> None:
    parse_frame(data)
    for kind in (ETH_IPV4, ETH_IPV6):
        parse_packet(kind, data)
        parse_frame(bytes(12) + kind.to_bytes(2, "big") + data)
