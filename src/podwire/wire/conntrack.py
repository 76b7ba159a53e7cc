"""conntrack over nfnetlink, sans-IO: `model.flow.Flow` from the kernel's messages, and requests about it.

Layout: linux/netfilter/nfnetlink{,_conntrack}.h. Numbers are big-endian.
"""

import ipaddress

from podwire.model.addr import Family
from podwire.model.flow import Flow, FlowTuple
from podwire.wire.netlink import (
    NLM_F_DUMP,
    NLM_F_REQUEST,
    Message,
    NetlinkError,
    as_be,
    attr,
    attr_be16,
    attr_be32,
    attr_u8,
    message,
    nested,
    parse_attrs,
)

NFNL_SUBSYS_CTNETLINK = 1
IPCTNL_MSG_CT_NEW, IPCTNL_MSG_CT_GET, IPCTNL_MSG_CT_DELETE = 0, 1, 2

CTA_TUPLE_ORIG, CTA_TUPLE_REPLY, CTA_STATUS, CTA_TIMEOUT, CTA_MARK = 1, 2, 3, 7, 8
CTA_COUNTERS_ORIG, CTA_COUNTERS_REPLY, CTA_ID, CTA_ZONE = 9, 10, 12, 18
CTA_TUPLE_IP, CTA_TUPLE_PROTO = 1, 2
CTA_IP_V4_SRC, CTA_IP_V4_DST, CTA_IP_V6_SRC, CTA_IP_V6_DST = 1, 2, 3, 4
CTA_PROTO_NUM, CTA_PROTO_SRC_PORT, CTA_PROTO_DST_PORT = 1, 2, 3
CTA_PROTO_ICMP_ID, CTA_PROTO_ICMP_TYPE, CTA_PROTO_ICMP_CODE = 4, 5, 6
CTA_PROTO_ICMPV6_ID, CTA_PROTO_ICMPV6_TYPE, CTA_PROTO_ICMPV6_CODE = 7, 8, 9
CTA_COUNTERS_PACKETS, CTA_COUNTERS_BYTES = 1, 2

IPPROTO_ICMP, IPPROTO_ICMPV6 = 1, 58

_NFGENMSG_BYTES = 4
_AF = {Family.IPV4: 2, Family.IPV6: 10}


def dump_flows(family: Family) -> bytes:
    """All flows of one family."""
    return message(_type(IPCTNL_MSG_CT_GET), NLM_F_REQUEST | NLM_F_DUMP, 0, _nfgenmsg(_AF[family]))


def get_flow(original: FlowTuple, zone: int = 0) -> bytes:
    """The flow that has this tuple in either direction; ENOENT where there is none."""
    return message(_type(IPCTNL_MSG_CT_GET), NLM_F_REQUEST, 0, *_named(original, zone))


def del_flow(flow: Flow) -> bytes:
    """Forget that flow; ENOENT where it is gone, or where another took its tuple since (the identifier differs)."""
    parts = _named(flow.original, flow.zone)
    if flow.id:
        parts.append(attr_be32(CTA_ID, flow.id))
    return message(_type(IPCTNL_MSG_CT_DELETE), NLM_F_REQUEST, 0, *parts)


def read_flow(msg: Message) -> Flow:
    """IPCTNL_MSG_CT_NEW or _DELETE → Flow. Raises NetlinkError for what has no tuples."""
    if len(msg.payload) < _NFGENMSG_BYTES:
        raise NetlinkError(f"conntrack message has {len(msg.payload)} bytes: its header needs {_NFGENMSG_BYTES}")
    attrs = parse_attrs(msg.payload, _NFGENMSG_BYTES)
    if CTA_TUPLE_ORIG not in attrs or CTA_TUPLE_REPLY not in attrs:
        raise NetlinkError("conntrack message lacks the tuples of its two directions")
    return Flow(
        original=_read_tuple(attrs[CTA_TUPLE_ORIG]),
        reply=_read_tuple(attrs[CTA_TUPLE_REPLY]),
        status=as_be(attrs.get(CTA_STATUS, b"")),
        mark=as_be(attrs.get(CTA_MARK, b"")),
        zone=as_be(attrs.get(CTA_ZONE, b"")),
        id=as_be(attrs.get(CTA_ID, b"")),
        timeout_s=as_be(attrs.get(CTA_TIMEOUT, b"")),
        original_counters=_counters(attrs.get(CTA_COUNTERS_ORIG, b"")),
        reply_counters=_counters(attrs.get(CTA_COUNTERS_REPLY, b"")),
    )


def encode_tuple(type: int, flow: FlowTuple) -> bytes:
    """A tuple as the attribute `type` (CTA_TUPLE_ORIG or CTA_TUPLE_REPLY)."""
    source, target = (CTA_IP_V4_SRC, CTA_IP_V4_DST) if flow.src.version == 4 else (CTA_IP_V6_SRC, CTA_IP_V6_DST)
    proto = [attr_u8(CTA_PROTO_NUM, flow.protocol)]
    if flow.protocol in (IPPROTO_ICMP, IPPROTO_ICMPV6):
        v4 = flow.protocol == IPPROTO_ICMP
        proto.append(attr_be16(CTA_PROTO_ICMP_ID if v4 else CTA_PROTO_ICMPV6_ID, flow.sport))
        proto.append(attr_u8(CTA_PROTO_ICMP_TYPE if v4 else CTA_PROTO_ICMPV6_TYPE, flow.dport >> 8))
        proto.append(attr_u8(CTA_PROTO_ICMP_CODE if v4 else CTA_PROTO_ICMPV6_CODE, flow.dport & 0xFF))
    else:
        proto += [attr_be16(CTA_PROTO_SRC_PORT, flow.sport), attr_be16(CTA_PROTO_DST_PORT, flow.dport)]
    addresses = nested(CTA_TUPLE_IP, attr(source, flow.src.packed), attr(target, flow.dst.packed))
    return nested(type, addresses, nested(CTA_TUPLE_PROTO, *proto))


def _read_tuple(data: bytes) -> FlowTuple:
    attrs = parse_attrs(data)
    addresses = parse_attrs(attrs.get(CTA_TUPLE_IP, b""))
    proto = parse_attrs(attrs.get(CTA_TUPLE_PROTO, b""))
    src = addresses.get(CTA_IP_V4_SRC) or addresses.get(CTA_IP_V6_SRC)
    dst = addresses.get(CTA_IP_V4_DST) or addresses.get(CTA_IP_V6_DST)
    if src is None or dst is None:
        raise NetlinkError("conntrack tuple lacks an address")
    number = as_be(proto.get(CTA_PROTO_NUM, b""))
    sport, dport = as_be(proto.get(CTA_PROTO_SRC_PORT, b"")), as_be(proto.get(CTA_PROTO_DST_PORT, b""))
    if number == IPPROTO_ICMP:
        sport, dport = _read_icmp(proto, CTA_PROTO_ICMP_ID, CTA_PROTO_ICMP_TYPE, CTA_PROTO_ICMP_CODE)
    elif number == IPPROTO_ICMPV6:
        sport, dport = _read_icmp(proto, CTA_PROTO_ICMPV6_ID, CTA_PROTO_ICMPV6_TYPE, CTA_PROTO_ICMPV6_CODE)
    try:
        return FlowTuple(ipaddress.ip_address(src), ipaddress.ip_address(dst), number, sport, dport)
    except ValueError as error:
        raise NetlinkError(f"conntrack tuple has addresses of {len(src)} and {len(dst)} bytes") from error


def _read_icmp(proto: dict[int, bytes], id_: int, type_: int, code: int) -> tuple[int, int]:
    return as_be(proto.get(id_, b"")), as_be(proto.get(type_, b"")) << 8 | as_be(proto.get(code, b""))


def _counters(data: bytes) -> tuple[int, int]:
    attrs = parse_attrs(data)
    return as_be(attrs.get(CTA_COUNTERS_PACKETS, b"")), as_be(attrs.get(CTA_COUNTERS_BYTES, b""))


def _named(original: FlowTuple, zone: int) -> list[bytes]:
    af = _AF[Family.IPV4 if original.src.version == 4 else Family.IPV6]
    parts = [_nfgenmsg(af), encode_tuple(CTA_TUPLE_ORIG, original)]
    if zone:
        parts.append(attr_be16(CTA_ZONE, zone))
    return parts


def _type(msg: int) -> int:
    return NFNL_SUBSYS_CTNETLINK << 8 | msg


def _nfgenmsg(af: int) -> bytes:
    return bytes((af, 0, 0, 0))
