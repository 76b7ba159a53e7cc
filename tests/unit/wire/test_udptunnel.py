"""The udp back end's packets: hops, checksums, routes, and the ICMP answer, judged by the packet parser."""

import ipaddress
import struct

from hypothesis import given
from hypothesis import strategies as st

from podwire.wire.packet import internet_checksum
from podwire.wire.udptunnel import RouteTable, is_ipv4, net_unreachable, spend_hop


def packet(
    *, ttl: int = 64, protocol: int = 17, body: bytes = b"0123456789abcdef", fragment: int = 0, ident: int = 7
) -> bytearray:
    source, destination = ipaddress.IPv4Address("10.5.1.2").packed, ipaddress.IPv4Address("10.5.2.2").packed
    header = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(body), ident, fragment, ttl, protocol, 0, source, destination)
    return bytearray(header[:10] + struct.pack(">H", internet_checksum(header)) + header[12:] + body)


@given(st.integers(2, 255), st.integers(0, 65535))
def test_a_hop_is_spent_and_the_checksum_stays_right(ttl: int, ident: int) -> None:
    changed = packet(ttl=ttl, ident=ident)
    before = bytes(changed)
    assert spend_hop(changed)
    assert changed[8] == ttl - 1
    assert internet_checksum(bytes(changed[:20])) in (0, 0xFFFF)
    after = bytes(changed)
    assert (after[:8], after[9:10], after[12:]) == (before[:8], before[9:10], before[12:])


def test_without_hops_left_a_packet_ends() -> None:
    for ttl in (0, 1):
        last = packet(ttl=ttl)
        assert not spend_hop(last)
        assert last == packet(ttl=ttl)


def test_what_is_no_ipv4_packet() -> None:
    good = packet()
    assert is_ipv4(good, len(good))
    assert not is_ipv4(good, len(good) - 1)
    assert not is_ipv4(good, 19)
    assert not is_ipv4(bytearray(b"\x60" + bytes(60)), 61)
    assert not is_ipv4(bytearray(b"\x45" + bytes(60)), 61)  # a total length of nothing


def test_the_longest_prefix_counts() -> None:
    table = RouteTable()
    table.set(ipaddress.IPv4Network("10.5.0.0/16"), ("192.0.2.1", 8285))
    table.set(ipaddress.IPv4Network("10.5.2.0/24"), ("192.0.2.2", 8285))

    def find(text: str) -> tuple[str, int] | None:
        return table.lookup(int(ipaddress.IPv4Address(text)))

    assert find("10.5.2.9") == ("192.0.2.2", 8285)
    assert find("10.5.3.9") == ("192.0.2.1", 8285)
    assert find("10.6.0.1") is None
    table.set(ipaddress.IPv4Network("10.5.2.0/24"), None)
    table.set(ipaddress.IPv4Network("10.9.0.0/24"), None)
    assert find("10.5.2.9") == ("192.0.2.1", 8285)
    assert len(table) == 1


def test_the_sender_is_told_that_there_is_no_way() -> None:
    sent = packet()
    answer = net_unreachable(bytes(sent))
    assert (answer[0], answer[9], answer[12:16], answer[16:20]) == (0x45, 1, bytes(sent[16:20]), bytes(sent[12:16]))
    assert (answer[20], answer[21]) == (3, 0)
    assert answer[28:] == bytes(sent[:28])
    assert struct.unpack(">H", answer[2:4]) == (len(answer),)
    assert internet_checksum(answer[:20]) in (0, 0xFFFF)
    assert internet_checksum(answer[20:]) in (0, 0xFFFF)


def test_no_answer_to_errors_and_later_fragments() -> None:
    assert net_unreachable(bytes(packet(protocol=1, body=b"\x03" + bytes(7)))) == b""
    assert net_unreachable(bytes(packet(fragment=5))) == b""
    assert net_unreachable(bytes(packet(protocol=1, body=b"\x08" + bytes(7)))) != b""
