"""flannel's udp back end on the wire: a bare IPv4 packet is the datagram's payload. Sans-IO.

A packet's way through a tunnel end costs it one hop (RFC 791: the header checksum is adapted, RFC 1624).
"""

import struct
from ipaddress import IPv4Network

from podwire.wire.packet import internet_checksum

Buffer = bytearray | memoryview

HEADER_BYTES = 20
_QUOTED_BYTES = 8
_ICMP_UNREACHABLE, _NET_UNREACHABLE = 3, 0
_TTL = 64
_CHECKSUM = struct.Struct(">H")


class RouteTable:
    """Subnet → where its packets go, by longest prefix."""

    def __init__(self) -> None:
        self._by_length: dict[int, dict[int, tuple[str, int]]] = {}
        self._lengths: tuple[tuple[int, dict[int, tuple[str, int]]], ...] = ()

    def set(self, subnet: IPv4Network, endpoint: tuple[str, int] | None) -> None:
        """None: nothing leads there any more."""
        book = self._by_length.setdefault(32 - subnet.prefixlen, {})
        key = int(subnet.network_address) >> (32 - subnet.prefixlen)
        if endpoint is not None:
            book[key] = endpoint
        else:
            book.pop(key, None)
        self._lengths = tuple((shift, entries) for shift, entries in sorted(self._by_length.items()) if entries)

    def lookup(self, destination: int) -> tuple[str, int] | None:
        for shift, entries in self._lengths:
            endpoint = entries.get(destination >> shift)
            if endpoint is not None:
                return endpoint
        return None

    def __len__(self) -> int:
        return sum(len(entries) for entries in self._by_length.values())


def is_ipv4(packet: Buffer, length: int) -> bool:
    """Whether the first `length` bytes can be an IPv4 packet that stands there whole."""
    return length >= HEADER_BYTES and packet[0] >> 4 == 4 and length >= (packet[2] << 8 | packet[3]) >= HEADER_BYTES


def spend_hop(packet: Buffer) -> bool:
    """Take one hop off the packet's time to live, in place. False, untouched, for one that has none left."""
    if packet[8] <= 1:
        return False
    packet[8] -= 1
    total = (packet[10] << 8 | packet[11]) + 0x100
    total = (total & 0xFFFF) + (total >> 16)
    packet[10], packet[11] = total >> 8, total & 0xFF
    return True


def net_unreachable(packet: bytes) -> bytes:
    """The ICMP answer "network unreachable" to the sender of an IPv4 packet; it quotes the packet's header and eight bytes.
    Empty where none may be sent (RFC 1122: to an ICMP error, a later fragment).

    It comes from the packet's destination: from the tunnel's own address, which is the host's, Linux would not take it in."""
    header_bytes = (packet[0] & 0x0F) * 4
    fragment = (packet[6] & 0x1F) << 8 | packet[7]
    is_icmp_error = packet[9] == 1 and len(packet) > header_bytes and packet[header_bytes] not in (0, 8)
    if fragment or is_icmp_error:
        return b""
    quoted = packet[: header_bytes + _QUOTED_BYTES]
    icmp = struct.pack(">BBHI", _ICMP_UNREACHABLE, _NET_UNREACHABLE, 0, 0) + quoted
    icmp = icmp[:2] + _CHECKSUM.pack(internet_checksum(icmp)) + icmp[4:]
    header = struct.pack(">BBHHHBBH4s4s", 0x45, 0, HEADER_BYTES + len(icmp), 0, 0, _TTL, 1, 0, packet[16:20], packet[12:16])
    header = header[:10] + _CHECKSUM.pack(internet_checksum(header)) + header[12:]
    return header + icmp
