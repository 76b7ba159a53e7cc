"""Ethernet, IPv4/IPv6, TCP/UDP/ICMP, and packets in packets (VXLAN, IPIP, flannel's udp): bytes ⇄ values, no I/O.

`parse_frame` never raises on strange traffic: what it does not know it leaves as payload, and a frame too short for its
own headers gives the part that could be read. Checksums are neither checked (a capture on a virtual device sees them
before offload) nor, in `build_*`, left out where a real stack would want them.
"""

import struct
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, IPv6Address

from podwire.model.addr import IPAddress

ETH_IPV4, ETH_ARP, ETH_IPV6 = 0x0800, 0x0806, 0x86DD
ICMP, IPIP, TCP, UDP, ICMPV6 = 1, 4, 6, 17, 58
PROTOCOL_NAMES = {ICMP: "icmp", IPIP: "ipip", TCP: "tcp", UDP: "udp", ICMPV6: "icmpv6"}
VXLAN_PORTS = frozenset({8472, 4789})
"""Destination ports whose UDP payload is taken for VXLAN: flannel's and IANA's (RFC 7348)."""
FLANNEL_UDP_PORT = 8285
"""The destination port whose UDP payload is taken for a bare IPv4 packet, if it looks like one."""

_ETH = struct.Struct("!6s6sH")
_IPV4 = struct.Struct("!BBHHHBBH4s4s")
_IPV6 = struct.Struct("!IHBB16s16s")
_TCP = struct.Struct("!HHIIBBHHH")
_UDP = struct.Struct("!HHHH")
_VXLAN_FLAG_VNI = 0x08


@dataclass(frozen=True, slots=True)
class Packet:
    """An IP packet. Ports are 0 where the protocol has none; `inner` is what a tunnel's packet carries (where the tunnel has no
    Ethernet frames, in one without MACs), with the `vni` of a VXLAN."""

    src: IPAddress
    dst: IPAddress
    protocol: int
    ttl: int = 64
    sport: int = 0
    dport: int = 0
    payload: bytes = b""
    vni: int | None = None
    inner: "Frame | None" = None

    @property
    def innermost(self) -> "Packet":
        """The packet that the endpoints know: itself, or what the tunnel carries."""
        packet = self
        while packet.inner is not None and packet.inner.packet is not None:
            packet = packet.inner.packet
        return packet

    @property
    def tunnel(self) -> str:
        """What kind of tunnel's packet it is: vxlan, ipip or udp; empty for none."""
        if self.inner is None:
            return ""
        return "vxlan" if self.vni is not None else PROTOCOL_NAMES[self.protocol]

    @property
    def flow(self) -> str:
        """`10.0.0.1:4242 → 10.0.0.2:80/tcp`, the form in which reports name a packet."""
        name = PROTOCOL_NAMES.get(self.protocol, str(self.protocol))
        if not (self.sport or self.dport):
            return f"{self.src} → {self.dst}/{name}"
        return f"{endpoint(self.src, self.sport)} → {endpoint(self.dst, self.dport)}/{name}"


@dataclass(frozen=True, slots=True)
class Frame:
    """An Ethernet frame; `packet` is None for anything but IP (its bytes stay in `payload`)."""

    src_mac: str
    dst_mac: str
    ethertype: int
    packet: Packet | None = None
    payload: bytes = field(default=b"", repr=False)


def endpoint(address: IPAddress, port: int) -> str:
    """`10.0.0.1:80` or `[fd00::1]:80`."""
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


def parse_frame(data: bytes) -> Frame | None:
    """An Ethernet frame as captured; None if it is shorter than the header."""
    if len(data) < _ETH.size:
        return None
    dst, src, ethertype = _ETH.unpack_from(data)
    body = data[_ETH.size :]
    return Frame(src.hex(":"), dst.hex(":"), ethertype, parse_packet(ethertype, body), body)


def parse_packet(ethertype: int, body: bytes) -> Packet | None:
    """An IP packet by its ethertype; None for other protocols and truncated headers."""
    if ethertype == ETH_IPV4 and len(body) >= _IPV4.size:
        first, _, total, _, fragment, ttl, protocol, _, src4, dst4 = _IPV4.unpack_from(body)
        header = (first & 0x0F) * 4
        packet = Packet(IPv4Address(src4), IPv4Address(dst4), protocol, ttl)
        segment = body[header : max(total, header)]
        # Only the first fragment has the transport header.
        return replace(packet, payload=segment) if fragment & 0x1FFF else _with_transport(packet, segment)
    if ethertype == ETH_IPV6 and len(body) >= _IPV6.size:
        _, length, next_header, hops, src6, dst6 = _IPV6.unpack_from(body)
        packet = Packet(IPv6Address(src6), IPv6Address(dst6), next_header, hops)
        return _with_transport(packet, body[_IPV6.size : _IPV6.size + length])
    return None


def _with_transport(packet: Packet, segment: bytes) -> Packet:
    if packet.protocol == TCP and len(segment) >= _TCP.size:
        sport, dport, _, _, offset, *_ = _TCP.unpack_from(segment)
        return replace(packet, sport=sport, dport=dport, payload=segment[(offset >> 4) * 4 :])
    if packet.protocol == UDP and len(segment) >= _UDP.size:
        sport, dport, length, _ = _UDP.unpack_from(segment)
        packet = replace(packet, sport=sport, dport=dport, payload=segment[_UDP.size : max(length, _UDP.size)])
        if dport == FLANNEL_UDP_PORT:
            return _with_bare(packet)
        return _with_vxlan(packet) if dport in VXLAN_PORTS else packet
    packet = replace(packet, payload=segment)
    return _with_bare(packet) if packet.protocol == IPIP else packet


def _with_bare(packet: Packet) -> Packet:
    body = packet.payload
    if len(body) < _IPV4.size or body[0] >> 4 != 4 or int.from_bytes(body[2:4], "big") != len(body):
        return packet
    return replace(packet, inner=bare_frame(ETH_IPV4, parse_packet(ETH_IPV4, body)))


def bare_frame(ethertype: int, packet: Packet | None) -> Frame:
    """A packet that travels without an Ethernet frame."""
    return Frame("", "", ethertype, packet)


def _with_vxlan(packet: Packet) -> Packet:
    if len(packet.payload) < 8 or not packet.payload[0] & _VXLAN_FLAG_VNI:
        return packet
    vni = int.from_bytes(packet.payload[4:7], "big")
    return replace(packet, vni=vni, inner=parse_frame(packet.payload[8:]))


def build_frame(frame: Frame) -> bytes:
    """The bytes of a frame; its packet, if any, is built anew from the fields."""
    header = _ETH.pack(_mac(frame.dst_mac), _mac(frame.src_mac), frame.ethertype)
    return header + (build_packet(frame.packet) if frame.packet is not None else frame.payload)


def build_packet(packet: Packet) -> bytes:
    """The bytes of a TCP, UDP or other IP packet with right lengths and checksums. TCP is a bare PSH|ACK segment."""
    payload = packet.payload
    if packet.inner is not None and packet.vni is None:
        payload = build_packet(packet.inner.packet) if packet.inner.packet is not None else packet.payload
    elif packet.inner is not None:
        payload = bytes((_VXLAN_FLAG_VNI, 0, 0, 0)) + (packet.vni or 0).to_bytes(3, "big") + b"\0" + build_frame(packet.inner)
    if packet.protocol == TCP:
        segment = _TCP.pack(packet.sport, packet.dport, 1, 1, 5 << 4, 0x18, 65535, 0, 0) + payload
        segment = _patch(segment, 16, _transport_checksum(packet, segment))
    elif packet.protocol == UDP:
        segment = _UDP.pack(packet.sport, packet.dport, _UDP.size + len(payload), 0) + payload
        segment = _patch(segment, 6, _transport_checksum(packet, segment) or 0xFFFF)
    else:
        segment = payload
    if packet.src.version == 4:
        total = _IPV4.size + len(segment)
        header = _IPV4.pack(0x45, 0, total, 0, 0, packet.ttl, packet.protocol, 0, packet.src.packed, packet.dst.packed)
        return _patch(header, 10, internet_checksum(header)) + segment
    version = 6 << 28
    return _IPV6.pack(version, len(segment), packet.protocol, packet.ttl, packet.src.packed, packet.dst.packed) + segment


def _transport_checksum(packet: Packet, segment: bytes) -> int:
    if packet.src.version == 4:
        pseudo = packet.src.packed + packet.dst.packed + struct.pack("!BBH", 0, packet.protocol, len(segment))
    else:
        pseudo = packet.src.packed + packet.dst.packed + struct.pack("!IHBB", len(segment), 0, 0, packet.protocol)
    return internet_checksum(pseudo + segment)


def internet_checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _patch(data: bytes, offset: int, value: int) -> bytes:
    return data[:offset] + value.to_bytes(2, "big") + data[offset + 2 :]


def _mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))
