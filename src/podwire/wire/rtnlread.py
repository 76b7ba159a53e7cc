"""rtnetlink answers and notifications, sans-IO, to the values of `model.kernelstate`. The requests are in `wire.rtnl`."""

import ipaddress
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from podwire.model.addr import IPAddress, IPInterface
from podwire.model.kernelstate import (
    ROUTE_PROTOCOL,
    Address,
    Bridge,
    Device,
    Dummy,
    FdbEntry,
    Ipip,
    Link,
    LinkKind,
    Neighbour,
    NextHop,
    Route,
    Shaper,
    Tun,
    Veth,
    Vxlan,
    Wireguard,
)
from podwire.wire import rtnl
from podwire.wire.netlink import NLM_F_REPLACE, Message, NetlinkError, as_be, as_str, as_u8, as_u16, as_u32, parse_attrs


@dataclass(frozen=True, slots=True)
class RawLink:
    """A link as the kernel gives it: other links by index, data not yet interpreted."""

    index: int
    name: str
    up: bool
    running: bool
    """Operationally up (RFC 2863), that is: not only switched on, it also carries packets."""
    mtu: int
    mac: str
    alias: str
    kind: str
    data: Mapping[int, bytes]
    master_index: int
    link_index: int
    link_elsewhere: bool
    """Whether `link_index` counts in another namespace."""
    hairpin: bool
    qdisc: str


def read_link(msg: Message) -> RawLink:
    """RTM_NEWLINK or RTM_DELLINK → RawLink. Raises NetlinkError for a message cut short."""
    _, _, index, flags, _ = _header(rtnl.IFINFOMSG, msg)
    attrs = parse_attrs(msg.payload, rtnl.IFINFOMSG.size)
    info = parse_attrs(attrs.get(rtnl.IFLA_LINKINFO, b""))
    port = parse_attrs(info.get(rtnl.IFLA_INFO_SLAVE_DATA, b""))
    is_port = as_str(info.get(rtnl.IFLA_INFO_SLAVE_KIND, b"")) == "bridge"
    return RawLink(
        index=index,
        name=as_str(attrs.get(rtnl.IFLA_IFNAME, b"")),
        up=bool(flags & rtnl.IFF_UP),
        running=bool(flags & rtnl.IFF_RUNNING),
        mtu=_u32(attrs, rtnl.IFLA_MTU),
        mac=attrs.get(rtnl.IFLA_ADDRESS, b"").hex(":"),
        alias=as_str(attrs.get(rtnl.IFLA_IFALIAS, b"")),
        kind=as_str(info.get(rtnl.IFLA_INFO_KIND, b"")),
        data=parse_attrs(info.get(rtnl.IFLA_INFO_DATA, b"")),
        master_index=_u32(attrs, rtnl.IFLA_MASTER),
        link_index=_u32(attrs, rtnl.IFLA_LINK),
        link_elsewhere=rtnl.IFLA_LINK_NETNSID in attrs,
        hairpin=is_port and rtnl.IFLA_BRPORT_MODE in port and bool(as_u8(port[rtnl.IFLA_BRPORT_MODE])),
        qdisc=as_str(attrs.get(rtnl.IFLA_QDISC, b"")),
    )


def links(raws: Iterable[RawLink]) -> dict[str, Link]:
    """All of one namespace's links, by name; a link of a kind that podwire does not make is a Device. rtnetlink does not tell
    a WireGuard device's port and key."""
    known = list(raws)
    names = {raw.index: raw.name for raw in known}
    return {
        raw.name: Link(
            name=raw.name,
            kind=_kind(raw, names),
            mtu=raw.mtu,
            mac=raw.mac,
            up=raw.up,
            master=names.get(raw.master_index, ""),
            hairpin=raw.hairpin,
            alias=raw.alias,
            shaper=Shaper(0, 0) if raw.qdisc == rtnl.TOKEN_BUCKET else None,
        )
        for raw in known
    }


def _kind(raw: RawLink, names: Mapping[int, str]) -> LinkKind:
    match raw.kind:
        case "bridge":
            return Bridge()
        case "veth":
            return Veth(peer="" if raw.link_elsewhere else names.get(raw.link_index, ""))
        case "vxlan":
            local = raw.data.get(rtnl.IFLA_VXLAN_LOCAL) or raw.data.get(rtnl.IFLA_VXLAN_LOCAL6)
            if local is None:
                return Device()  # made by someone else, for a use that podwire has no type for
            return Vxlan(
                vni=_u32(raw.data, rtnl.IFLA_VXLAN_ID),
                port=as_be(raw.data.get(rtnl.IFLA_VXLAN_PORT, b"\0\0")),
                local=_ip(local),
                underlay=names.get(_u32(raw.data, rtnl.IFLA_VXLAN_LINK), ""),
                learning=bool(as_u8(raw.data.get(rtnl.IFLA_VXLAN_LEARNING, b"\0"))),
                gbp=rtnl.IFLA_VXLAN_GBP in raw.data,
            )
        case "ipip":
            return Ipip(_ip(raw.data.get(rtnl.IFLA_IPTUN_LOCAL, bytes(4))))
        case "tun":
            return Tun()
        case "dummy":
            return Dummy()
        case "wireguard":
            return Wireguard(0, "")
        case _:
            return Device()


def read_address(msg: Message, names: Mapping[int, str]) -> Address | None:
    """RTM_NEWADDR or RTM_DELADDR → Address; None where the device is unknown."""
    _, prefixlen, _, _, index = _header(rtnl.IFADDRMSG, msg)
    attrs = parse_attrs(msg.payload, rtnl.IFADDRMSG.size)
    # IFA_ADDRESS is the peer's on a point-to-point link; IPv6 has IFA_LOCAL only there.
    raw = attrs.get(rtnl.IFA_LOCAL, attrs.get(rtnl.IFA_ADDRESS))
    if raw is None or index not in names:
        return None
    return Address(names[index], _interface(raw, prefixlen))


def read_route(msg: Message, names: Mapping[int, str], wanted: int = ROUTE_PROTOCOL) -> Route | None:
    """RTM_NEWROUTE or RTM_DELROUTE → Route; None for what is not a unicast or blackhole route in the main table with protocol
    `wanted`."""
    af, dst_len, _, _, table, protocol, _, type_, flags = _header(rtnl.RTMSG, msg)
    attrs = parse_attrs(msg.payload, rtnl.RTMSG.size)
    table = _u32(attrs, rtnl.RTA_TABLE) or table
    if (protocol, table) != (wanted, rtnl.RT_TABLE_MAIN) or type_ not in (rtnl.RTN_UNICAST, rtnl.RTN_BLACKHOLE):
        return None
    blackhole = type_ == rtnl.RTN_BLACKHOLE
    if af not in (rtnl.AF_INET, rtnl.AF_INET6):
        return None
    dst = attrs.get(rtnl.RTA_DST, bytes(4 if af == rtnl.AF_INET else 16))
    metric = _u32(attrs, rtnl.RTA_PRIORITY)
    legs = tuple(_legs(attrs.get(rtnl.RTA_MULTIPATH, b""), names))
    src = attrs.get(rtnl.RTA_PREFSRC)
    return Route(
        dst=_interface(dst, dst_len).network,
        # IPv6 says `lo` of a blackhole.
        dev=names.get(_u32(attrs, rtnl.RTA_OIF), "") if not legs and not blackhole else "",
        via=_via(attrs) if not legs else None,
        src=_ip(src) if src else None,
        onlink=bool(flags & rtnl.RTNH_F_ONLINK) or any(onlink for _, onlink in legs),
        metric=0 if af == rtnl.AF_INET6 and metric == rtnl.IP6_RT_PRIO_USER else metric,
        nexthops=tuple(hop for hop, _ in legs),
        protocol=protocol,
        blackhole=blackhole,
    )


def _legs(data: bytes, names: Mapping[int, str]) -> Iterator[tuple[NextHop, bool]]:
    offset = 0
    while len(data) - offset >= rtnl.RTNEXTHOP.size:
        length, flags, _, index = rtnl.RTNEXTHOP.unpack_from(data, offset)
        if length < rtnl.RTNEXTHOP.size or offset + length > len(data):
            raise NetlinkError(f"next hop at byte {offset} says {length} bytes of {len(data) - offset}")
        via = _via(parse_attrs(data[offset + rtnl.RTNEXTHOP.size : offset + length]))
        if via is not None:
            yield NextHop(via, names.get(index, "")), bool(flags & rtnl.RTNH_F_ONLINK)
        offset += (length + 3) & ~3


def _via(attrs: Mapping[int, bytes]) -> IPAddress | None:
    if rtnl.RTA_GATEWAY in attrs:
        return _ip(attrs[rtnl.RTA_GATEWAY])
    if rtnl.RTA_VIA in attrs:
        raw = attrs[rtnl.RTA_VIA]
        return _ip(raw[2:6] if as_u16(raw) == rtnl.AF_INET else raw[2:18])
    return None


def read_neighbour(msg: Message, names: Mapping[int, str]) -> Neighbour | None:
    """RTM_NEWNEIGH or RTM_DELNEIGH → Neighbour; None unless it is permanent (or no longer is: RTM_DELNEIGH) and IP."""
    af, index, state, _, _ = _header(rtnl.NDMSG, msg)
    attrs = parse_attrs(msg.payload, rtnl.NDMSG.size)
    if af not in (rtnl.AF_INET, rtnl.AF_INET6) or rtnl.NDA_DST not in attrs or index not in names:
        return None
    if not state & rtnl.NUD_PERMANENT and msg.type != rtnl.RTM_DELNEIGH:
        return None
    mac = attrs.get(rtnl.NDA_LLADDR, b"")
    return Neighbour(names[index], _ip(attrs[rtnl.NDA_DST]), mac.hex(":"))


def read_fdb(msg: Message, names: Mapping[int, str]) -> FdbEntry | None:
    """RTM_NEWNEIGH or RTM_DELNEIGH of AF_BRIDGE → FdbEntry; None for one without a destination (not a VXLAN's)."""
    af, index, _, flags, _ = _header(rtnl.NDMSG, msg)
    attrs = parse_attrs(msg.payload, rtnl.NDMSG.size)
    if af != rtnl.AF_BRIDGE or not flags & rtnl.NTF_SELF or index not in names:
        return None
    if rtnl.NDA_DST not in attrs or rtnl.NDA_LLADDR not in attrs:
        return None
    return FdbEntry(names[index], attrs[rtnl.NDA_LLADDR].hex(":"), _ip(attrs[rtnl.NDA_DST]))


class Notice(NamedTuple):
    """A notification in words: `what` as in `KernelEvent`, `subject` for a log line."""

    what: str
    subject: str
    removed: bool


def read_notice(msg: Message, names: Mapping[int, str]) -> Notice | None:
    """A message of the link, address, route or neighbour groups → Notice; None for what podwire does not watch
    (learnt neighbours, other tables, bridge bookkeeping)."""
    match msg.type:
        case rtnl.RTM_NEWLINK | rtnl.RTM_DELLINK:
            # A bridge tells of its ports in its own family: of changes to their settings only so.
            if msg.payload and msg.payload[0] == rtnl.AF_BRIDGE and msg.type == rtnl.RTM_DELLINK:
                return None
            return Notice("link", read_link(msg).name, msg.type == rtnl.RTM_DELLINK)
        case rtnl.RTM_NEWADDR | rtnl.RTM_DELADDR:
            address = read_address(msg, names)
            return (
                address
                if address is None
                else Notice("address", f"{address.interface} on {address.dev}", msg.type == rtnl.RTM_DELADDR)
            )
        case rtnl.RTM_NEWROUTE | rtnl.RTM_DELROUTE:
            return _route_notice(msg, names)
        case rtnl.RTM_NEWNEIGH | rtnl.RTM_DELNEIGH:
            gone = msg.type == rtnl.RTM_DELNEIGH
            fdb = read_fdb(msg, names)
            if fdb is not None:
                return Notice("fdb", f"{fdb.mac} → {fdb.dst} on {fdb.dev}", gone)
            return _neighbour_notice(msg, names, gone=gone)
        case _:
            return None


def _route_notice(msg: Message, names: Mapping[int, str]) -> Notice | None:
    """Of ours; or, as removed, of one that somebody else's has replaced: the kernel tells of the new one only."""
    route = read_route(msg, names)
    if route is not None:
        return Notice("route", describe_route(route), msg.type == rtnl.RTM_DELROUTE)
    if msg.type != rtnl.RTM_NEWROUTE or not msg.flags & NLM_F_REPLACE:
        return None
    af, dst_len, _, _, table, _, _, _, _ = _header(rtnl.RTMSG, msg)
    attrs = parse_attrs(msg.payload, rtnl.RTMSG.size)
    if (_u32(attrs, rtnl.RTA_TABLE) or table) != rtnl.RT_TABLE_MAIN or af not in (rtnl.AF_INET, rtnl.AF_INET6):
        return None
    dst = _interface(attrs.get(rtnl.RTA_DST, bytes(4 if af == rtnl.AF_INET else 16)), dst_len).network
    return Notice("route", f"{dst} replaced", removed=True)


def _neighbour_notice(msg: Message, names: Mapping[int, str], *, gone: bool) -> Notice | None:
    """Permanent entries, those that go, and, as gone, learnt ones: one of them may have been permanent."""
    entry = read_neighbour(msg._replace(type=rtnl.RTM_DELNEIGH), names)
    if entry is None or entry.ip.is_multicast:
        return None
    learnt = not _header(rtnl.NDMSG, msg)[2] & rtnl.NUD_PERMANENT
    return Notice("neighbour", f"{entry.ip} is {entry.mac} on {entry.dev}", gone or learnt)


def describe_route(route: Route) -> str:
    """As `ip route` writes it: `10.244.1.0/24 via 10.244.1.0 dev flannel.1`."""
    if route.blackhole:
        return f"blackhole {route.dst}"
    legs = route.nexthops or ((NextHop(route.via, route.dev),) if route.via is not None else ())
    where = " ".join(f"via {leg.via} dev {leg.dev}" for leg in legs) or f"dev {route.dev}"
    return f"{route.dst} {where}"


def _header(layout: struct.Struct, msg: Message) -> tuple[int, ...]:
    if len(msg.payload) < layout.size:
        raise NetlinkError(f"rtnetlink message of type {msg.type} has {len(msg.payload)} bytes: its header needs {layout.size}")
    return layout.unpack_from(msg.payload)


def _u32(attrs: Mapping[int, bytes], type_: int) -> int:
    raw = attrs.get(type_)
    return as_u32(raw) if raw else 0


def _ip(raw: bytes) -> IPAddress:
    try:
        return ipaddress.ip_address(raw)
    except ValueError as error:
        raise NetlinkError(f"an address has {len(raw)} bytes") from error


def _interface(raw: bytes, prefixlen: int) -> IPInterface:
    try:
        return ipaddress.ip_interface((raw, prefixlen))
    except ValueError as error:
        raise NetlinkError(f"an address of {len(raw)} bytes has a prefix of {prefixlen} bits") from error
