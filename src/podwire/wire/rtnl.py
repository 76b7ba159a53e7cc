"""rtnetlink requests, sans-IO: links, addresses, routes, neighbours and forwarding entries from `model.kernelstate`.

Layout: linux/{rtnetlink,if_link,if_addr,neighbour,if_bridge}.h. Requests come without a sequence number (`netlink.Batch`
gives them one). The kernel knows devices by index, so routes and neighbours take indices; links go by name.
The decoders are in `wire.rtnlread`.
"""

import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from podwire.model.addr import IPAddress
from podwire.model.kernelstate import (
    ROUTE_PROTOCOL,
    Address,
    Bridge,
    Device,
    Dummy,
    FdbEntry,
    Ipip,
    Link,
    Neighbour,
    Route,
    Shaper,
    Tun,
    Veth,
    Vxlan,
    Wireguard,
)
from podwire.wire.netlink import (
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    NLM_F_REQUEST,
    attr,
    attr_be16,
    attr_str,
    attr_u8,
    attr_u32,
    message,
    nested,
)

AF_UNSPEC, AF_INET, AF_BRIDGE, AF_INET6 = 0, 2, 7, 10

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30

IFINFOMSG = struct.Struct("=BxHiII")
IFADDRMSG = struct.Struct("=BBBBi")
RTMSG = struct.Struct("=BBBBBBBBI")
NDMSG = struct.Struct("=BxxxiHBB")
TCMSG = struct.Struct("=BxxxiIII")
TC_RATESPEC = struct.Struct("=BBHhHI")
RTNEXTHOP = struct.Struct("=HBBi")

IFF_UP = 1
IFF_RUNNING = 0x40
BRIDGE_DEFAULT_MTU = 1500

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER = 1, 3, 4, 5, 10
IFLA_PROTINFO, IFLA_LINKINFO, IFLA_IFALIAS, IFLA_AF_SPEC, IFLA_NET_NS_FD = 12, 18, 20, 26, 28
IFLA_QDISC, IFLA_GROUP = 6, 27
IFLA_EXT_MASK, IFLA_LINK_NETNSID = 29, 37
IFLA_INFO_KIND, IFLA_INFO_DATA, IFLA_INFO_SLAVE_KIND, IFLA_INFO_SLAVE_DATA = 1, 2, 4, 5
IFLA_BRPORT_MODE = 4
IFLA_BR_STP_STATE = 5
IFLA_INET6_ADDR_GEN_MODE = 8
IN6_ADDR_GEN_MODE_NONE = 1
VETH_INFO_PEER = 1
IFLA_VXLAN_ID, IFLA_VXLAN_LINK, IFLA_VXLAN_LOCAL, IFLA_VXLAN_LEARNING = 1, 3, 4, 7
IFLA_VXLAN_PORT, IFLA_VXLAN_LOCAL6, IFLA_VXLAN_GBP = 15, 17, 23
IFLA_IPTUN_LOCAL, IFLA_IPTUN_PROTO = 2, 9
IPPROTO_IPIP = 4
RTEXT_FILTER_SKIP_STATS = 8

IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 1, 2, 8
IFA_F_NODAD = 0x02

RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC = 1, 4, 5, 6, 7
RTA_MULTIPATH, RTA_TABLE, RTA_VIA = 9, 15, 18
RT_TABLE_MAIN = 254
RTPROT_BOOT = 3
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK, RT_SCOPE_NOWHERE = 0, 253, 255
RTN_UNSPEC, RTN_UNICAST, RTN_BLACKHOLE = 0, 1, 6
RTNH_F_ONLINK = 4
IP6_RT_PRIO_USER = 1024

NDA_DST, NDA_LLADDR, NDA_IFINDEX = 1, 2, 8
NTF_SELF = 0x02
NUD_PERMANENT = 0x80

RTM_NEWQDISC = 36
TC_H_ROOT = 0xFFFFFFFF
TCA_KIND, TCA_OPTIONS = 1, 2
TCA_TBF_PARMS, TCA_TBF_RATE64, TCA_TBF_BURST = 1, 4, 6
TOKEN_BUCKET = "tbf"
_SHAPER_QUEUE_MS = 25

_DUMP = NLM_F_REQUEST | NLM_F_DUMP
_CREATE = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_EXCL
_SET = NLM_F_REQUEST | NLM_F_CREATE | NLM_F_REPLACE


def mac_bytes(mac: str) -> bytes:
    """`0a:58:…` → six bytes. Raises ValueError for anything else."""
    raw = bytes.fromhex(mac.replace(":", ""))
    if len(raw) != 6:
        raise ValueError(f"MAC address {mac!r} does not have six bytes")
    return raw


def family(address: IPAddress) -> int:
    return AF_INET if address.version == 4 else AF_INET6


# --- links --------------------------------------------------------------------------------------------------------


def new_link(link: Link, *, indices: Mapping[str, int], peer: Link | None = None, peer_ns_fd: int | None = None) -> bytes:
    """Create a link, down. `indices` has the underlay of a VXLAN. A veth's peer is made in the namespace of `peer_ns_fd`.

    What creation cannot set (alias, master, hairpin) and the up flag come after it, by `settle_link`. Raises ValueError
    for a Device: podwire does not make those."""
    info = nested(IFLA_LINKINFO, *_link_info(link, indices, peer, peer_ns_fd))
    # A bridge's MTU only stays what it is, whatever its ports, if it is changed after creation (BROPT_MTU_SET_BY_USER).
    given = replace(link, mtu=None) if isinstance(link.kind, Bridge) else link
    return message(RTM_NEWLINK, _CREATE, 0, _ifinfo(AF_UNSPEC), *_basics(given), info)


def _basics(link: Link) -> list[bytes]:
    attrs = [attr_str(IFLA_IFNAME, link.name)]
    if link.mtu is not None:
        attrs.append(attr_u32(IFLA_MTU, link.mtu))
    if link.mac is not None:
        attrs.append(attr(IFLA_ADDRESS, mac_bytes(link.mac)))
    return attrs


def _link_info(link: Link, indices: Mapping[str, int], peer: Link | None, peer_ns_fd: int | None) -> list[bytes]:
    match link.kind:
        case Bridge():
            return [attr_str(IFLA_INFO_KIND, "bridge")]
        case Veth():
            end = peer or Link(name=link.kind.peer, kind=Veth())
            attrs = _basics(end)
            if peer_ns_fd is not None:
                attrs.append(attr_u32(IFLA_NET_NS_FD, peer_ns_fd))
            data = nested(IFLA_INFO_DATA, attr(VETH_INFO_PEER, _ifinfo(AF_UNSPEC) + b"".join(attrs)))
            return [attr_str(IFLA_INFO_KIND, "veth"), data]
        case Vxlan() as vxlan:
            local = IFLA_VXLAN_LOCAL if vxlan.local.version == 4 else IFLA_VXLAN_LOCAL6
            return [
                attr_str(IFLA_INFO_KIND, "vxlan"),
                nested(
                    IFLA_INFO_DATA,
                    attr_u32(IFLA_VXLAN_ID, vxlan.vni),
                    attr_u32(IFLA_VXLAN_LINK, indices[vxlan.underlay]),
                    attr(local, vxlan.local.packed),
                    attr_u8(IFLA_VXLAN_LEARNING, int(vxlan.learning)),
                    attr_be16(IFLA_VXLAN_PORT, vxlan.port),
                    *([attr(IFLA_VXLAN_GBP)] if vxlan.gbp else []),
                ),
            ]
        case Ipip(local=local_end):
            data = nested(IFLA_INFO_DATA, attr(IFLA_IPTUN_LOCAL, local_end.packed), attr_u8(IFLA_IPTUN_PROTO, IPPROTO_IPIP))
            return [attr_str(IFLA_INFO_KIND, "ipip"), data]
        case Wireguard():
            return [attr_str(IFLA_INFO_KIND, "wireguard")]
        case Dummy():
            return [attr_str(IFLA_INFO_KIND, "dummy")]
        case Tun():
            raise ValueError(f"link {link.name}: a TUN device is made through /dev/net/tun")
        case Device():
            raise ValueError(f"link {link.name}: a Device is configured, never made")


def settle_link(link: Link, *, indices: Mapping[str, int]) -> list[bytes]:
    """The requests that finish a link just made by `new_link`: master, alias, a bridge's MTU, hairpin, then up."""
    requests: list[bytes] = []
    attrs: list[bytes] = []
    if link.master:
        attrs.append(attr_u32(IFLA_MASTER, indices[link.master]))
        # A bridge port has no use for an IPv6 link-local address; without it the kernel sends neither DAD nor MLD for it.
        mode = nested(AF_INET6, attr_u8(IFLA_INET6_ADDR_GEN_MODE, IN6_ADDR_GEN_MODE_NONE))
        attrs.append(nested(IFLA_AF_SPEC, mode))
    if isinstance(link.kind, Bridge) and link.mtu is not None:
        if link.mtu == BRIDGE_DEFAULT_MTU:  # setting what it is already would be no change, and fix nothing
            requests.append(_change(link.name, attr_u32(IFLA_MTU, link.mtu - 1)))
        attrs.append(attr_u32(IFLA_MTU, link.mtu))
    if link.alias:
        attrs.append(attr(IFLA_IFALIAS, link.alias.encode()))
    if attrs:
        requests.append(_change(link.name, *attrs))
    requests += _hairpin(link)
    if link.up:
        requests.append(_change(link.name, up=True))
    return requests


def change_link(link: Link, *, indices: Mapping[str, int]) -> list[bytes]:
    """Bring an existing link to `link`: mtu, mac, master ("" takes it off its bridge), alias, up, hairpin; None stays."""
    attrs = _basics(link)[1:]
    if link.alias or not isinstance(link.kind, Device):
        attrs.append(attr(IFLA_IFALIAS, link.alias.encode()))
    if link.master is not None:
        attrs.append(attr_u32(IFLA_MASTER, indices[link.master] if link.master else 0))
    return [_change(link.name, *attrs, up=link.up), *_hairpin(link)]


def _hairpin(link: Link) -> list[bytes]:
    if link.hairpin is None or not link.master:
        return []
    data = nested(IFLA_INFO_SLAVE_DATA, attr_u8(IFLA_BRPORT_MODE, int(link.hairpin)))
    return [_change(link.name, nested(IFLA_LINKINFO, attr_str(IFLA_INFO_SLAVE_KIND, "bridge"), data))]


def _change(name: str, *attrs: bytes, up: bool | None = None) -> bytes:
    flags, change = (IFF_UP if up else 0, IFF_UP if up is not None else 0)
    header = _ifinfo(AF_UNSPEC, flags=flags, change=change)
    return message(RTM_NEWLINK, NLM_F_REQUEST, 0, header, attr_str(IFLA_IFNAME, name), *attrs)


def del_link(name: str) -> bytes:
    return message(RTM_DELLINK, NLM_F_REQUEST, 0, _ifinfo(AF_UNSPEC), attr_str(IFLA_IFNAME, name))


LEAVING_GROUP = 0x706F6457
"""The device group of links that are about to go together."""


def join_group(name: str, group: int) -> bytes:
    """Put a link into a device group; ENODEV where there is none of that name."""
    parts = _ifinfo(AF_UNSPEC), attr_str(IFLA_IFNAME, name), attr_u32(IFLA_GROUP, group)
    return message(RTM_SETLINK, NLM_F_REQUEST, 0, *parts)


def del_group(group: int) -> bytes:
    """Delete all links of a device group at once: the kernel waits for its readers once, not once for each."""
    return message(RTM_DELLINK, NLM_F_REQUEST, 0, _ifinfo(AF_UNSPEC), attr_u32(IFLA_GROUP, group))


def get_link(name: str) -> bytes:
    """Ask for one link; ENODEV where there is none."""
    return message(RTM_GETLINK, NLM_F_REQUEST, 0, _ifinfo(AF_UNSPEC), attr_str(IFLA_IFNAME, name), _NO_STATS)


def dump_links() -> bytes:
    return message(RTM_GETLINK, _DUMP, 0, _ifinfo(AF_UNSPEC), _NO_STATS)


_NO_STATS = attr_u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS)


def _ifinfo(af: int, *, index: int = 0, flags: int = 0, change: int = 0) -> bytes:
    return IFINFOMSG.pack(af, 0, index, flags, change)


# --- queues -------------------------------------------------------------------------------------------------------


def set_shaper(shaper: Shaper, index: int) -> bytes:
    """The device's root queue becomes a token bucket (tbf), in place of what is there.

    A packet waits for at most 25 ms, as behind the reference bandwidth plugin; what comes then is dropped."""
    rate, burst = shaper.rate // 8, shaper.burst // 8
    slow = min(rate, 0xFFFFFFFF)
    limit = min(rate * _SHAPER_QUEUE_MS // 1000 + burst, 0xFFFFFFFF)
    # linklayer 1 (Ethernet): the kernel computes times itself and needs no table from us.
    parms = TC_RATESPEC.pack(0, 1, 0, 0, 0, slow) + TC_RATESPEC.pack(0, 0, 0, 0, 0, 0) + struct.pack("=III", limit, 0, 0)
    options = [attr(TCA_TBF_PARMS, parms), attr_u32(TCA_TBF_BURST, burst)]
    if rate > slow:
        options.append(attr(TCA_TBF_RATE64, struct.pack("=Q", rate)))
    header = TCMSG.pack(AF_UNSPEC, index, 0, TC_H_ROOT, 0)
    return message(RTM_NEWQDISC, _SET, 0, header, attr_str(TCA_KIND, TOKEN_BUCKET), nested(TCA_OPTIONS, *options))


# --- addresses ----------------------------------------------------------------------------------------------------


def set_address(address: Address, index: int) -> bytes:
    """Add the address (again is no error). IPv6 without duplicate address detection: the addresses are ours."""
    return _address(RTM_NEWADDR, _SET, address, index)


def del_address(address: Address, index: int) -> bytes:
    return _address(RTM_DELADDR, NLM_F_REQUEST, address, index)


def _address(type_: int, flags: int, address: Address, index: int) -> bytes:
    ip = address.interface
    header = IFADDRMSG.pack(family(ip.ip), ip.network.prefixlen, 0, 0, index)
    parts = [header, attr(IFA_LOCAL, ip.packed), attr(IFA_ADDRESS, ip.packed)]
    if ip.version == 6 and type_ == RTM_NEWADDR:
        parts.append(attr_u32(IFA_FLAGS, IFA_F_NODAD))
    return message(type_, flags, 0, *parts)


def dump_addresses() -> bytes:
    return message(RTM_GETADDR, _DUMP, 0, IFADDRMSG.pack(AF_UNSPEC, 0, 0, 0, 0))


# --- routes -------------------------------------------------------------------------------------------------------


def set_route(route: Route, indices: Mapping[str, int]) -> bytes:
    """Add or replace a route of the main table, marked with its protocol."""
    scope = RT_SCOPE_UNIVERSE
    if route.dst.version == 4 and route.via is None and not route.nexthops and not route.blackhole:
        scope = RT_SCOPE_LINK
    flags = RTNH_F_ONLINK if route.onlink and not route.nexthops else 0
    type_ = RTN_BLACKHOLE if route.blackhole else RTN_UNICAST
    parts = [_rtmsg(route, scope, flags, type_), attr(RTA_DST, route.dst.network_address.packed)]
    if route.nexthops:
        parts.append(attr(RTA_MULTIPATH, _nexthops(route, indices)))
    elif not route.blackhole:
        parts.append(attr_u32(RTA_OIF, indices[route.dev]))
        if route.via is not None:
            parts.append(_gateway(route, route.via))
    if route.src is not None:
        parts.append(attr(RTA_PREFSRC, route.src.packed))
    if route.metric:
        parts.append(attr_u32(RTA_PRIORITY, route.metric))
    return message(RTM_NEWROUTE, _SET, 0, *parts)


def del_route(route: Route) -> bytes:
    """Remove our route with that destination and metric, wherever it leads. For IPv4 the kernel takes metric 0 to mean the
    route that comes first: it must be there, or one with another metric goes."""
    parts = [_rtmsg(route, RT_SCOPE_NOWHERE, 0, RTN_UNSPEC), attr(RTA_DST, route.dst.network_address.packed)]
    metric = route.metric or (IP6_RT_PRIO_USER if route.dst.version == 6 else 0)
    if metric:
        parts.append(attr_u32(RTA_PRIORITY, metric))
    return message(RTM_DELROUTE, NLM_F_REQUEST, 0, *parts)


def dump_routes(af: int, protocol: int = ROUTE_PROTOCOL) -> bytes:
    """The main table's routes of one family. With NETLINK_GET_STRICT_CHK the kernel filters, otherwise the decoder does."""
    return message(RTM_GETROUTE, _DUMP, 0, RTMSG.pack(af, 0, 0, 0, RT_TABLE_MAIN, protocol, 0, 0, 0))


def _rtmsg(route: Route, scope: int, flags: int, type_: int) -> bytes:
    af = family(route.dst.network_address)
    return RTMSG.pack(af, route.dst.prefixlen, 0, 0, RT_TABLE_MAIN, route.protocol, scope, type_, flags)


def _gateway(route: Route, via: IPAddress) -> bytes:
    if via.version == route.dst.version:
        return attr(RTA_GATEWAY, via.packed)
    return attr(RTA_VIA, family(via).to_bytes(2, _ORDER) + via.packed)


def _nexthops(route: Route, indices: Mapping[str, int]) -> bytes:
    legs: list[bytes] = []
    for hop in route.nexthops:
        gateway = _gateway(route, hop.via)
        flags = RTNH_F_ONLINK if route.onlink else 0
        legs.append(RTNEXTHOP.pack(RTNEXTHOP.size + len(gateway), flags, 0, indices[hop.dev]) + gateway)
    return b"".join(legs)


_ORDER: Literal["little", "big"] = "little" if struct.pack("=H", 1) == b"\1\0" else "big"


# --- neighbours and forwarding entries ----------------------------------------------------------------------------


def set_neighbour(entry: Neighbour, index: int) -> bytes:
    header = NDMSG.pack(family(entry.ip), index, NUD_PERMANENT, 0, 0)
    return message(RTM_NEWNEIGH, _SET, 0, header, attr(NDA_DST, entry.ip.packed), attr(NDA_LLADDR, mac_bytes(entry.mac)))


def del_neighbour(entry: Neighbour, index: int) -> bytes:
    header = NDMSG.pack(family(entry.ip), index, 0, 0, 0)
    return message(RTM_DELNEIGH, NLM_F_REQUEST, 0, header, attr(NDA_DST, entry.ip.packed))


def set_fdb(entry: FdbEntry, index: int) -> bytes:
    """A VXLAN device's own entry; replaces where the MAC pointed before."""
    header = NDMSG.pack(AF_BRIDGE, index, NUD_PERMANENT, NTF_SELF, 0)
    return message(RTM_NEWNEIGH, _SET, 0, header, attr(NDA_LLADDR, mac_bytes(entry.mac)), attr(NDA_DST, entry.dst.packed))


def del_fdb(entry: FdbEntry, index: int) -> bytes:
    header = NDMSG.pack(AF_BRIDGE, index, 0, NTF_SELF, 0)
    return message(
        RTM_DELNEIGH, NLM_F_REQUEST, 0, header, attr(NDA_LLADDR, mac_bytes(entry.mac)), attr(NDA_DST, entry.dst.packed)
    )


def dump_neighbours(af: int) -> bytes:
    return message(RTM_GETNEIGH, _DUMP, 0, NDMSG.pack(af, 0, 0, 0, 0))


def dump_fdb(index: int) -> bytes:
    """The forwarding entries of one device (a bridge port's or a VXLAN's)."""
    return message(RTM_GETNEIGH, _DUMP, 0, NDMSG.pack(AF_BRIDGE, 0, 0, 0, 0), attr_u32(NDA_IFINDEX, index))
