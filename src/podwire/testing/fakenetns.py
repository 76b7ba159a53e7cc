"""One network namespace in memory: the kernel's rules for links, addresses, routes, neighbours and FDB entries.

Refusals carry the errno that Linux gives. What Linux drops by itself (routes of a device that goes down, a veth's other
end, …) is dropped here too: tests of planners depend on it.
"""

import errno
import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from podwire.model.addr import IPAddress, IPNetwork
from podwire.model.flow import Flow
from podwire.model.kernelstate import (
    ROUTE_PROTOCOL,
    Address,
    Bridge,
    Device,
    FdbEntry,
    Ipip,
    Link,
    Neighbour,
    NetState,
    Route,
    Shaper,
    Tun,
    Veth,
    Vxlan,
    Wireguard,
    WireguardPeer,
)
from podwire.model.nft import Ruleset

_NAME_BYTES = 15


class Refused(Exception):
    """What the kernel would answer: its errno and words."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.errno, self.message = code, message


@dataclass(eq=False)
class FakeNetns:
    """A namespace with `lo`, down, in it. `peers`: our veth → (namespace, name) of its other end."""

    label: str
    links: dict[str, Link] = field(default_factory=dict)
    peers: dict[str, tuple["FakeNetns", str]] = field(default_factory=dict)
    addresses: dict[Address, None] = field(default_factory=dict)
    routes: dict[tuple[IPNetwork, int], Route] = field(default_factory=dict)
    neighbours: dict[tuple[str, IPAddress], Neighbour] = field(default_factory=dict)
    fdb: dict[tuple[str, str], FdbEntry] = field(default_factory=dict)
    wireguard: dict[tuple[str, str], WireguardPeer] = field(default_factory=dict)
    sysctls: dict[str, str] = field(default_factory=dict)
    ruleset: Ruleset = field(default_factory=Ruleset)
    fixed_mtu: set[str] = field(default_factory=set)
    """Bridges whose MTU was set; that of the others is the smallest of their ports'."""
    shapers: dict[str, Shaper] = field(default_factory=dict)
    """The token buckets that devices have; `links` says only that there is one, as observation does."""
    flows: list[Flow] = field(default_factory=list)
    """Tracked connections: what a test puts there."""

    def __post_init__(self) -> None:
        self.links.setdefault("lo", _observed(Link("lo", Device(), mtu=65536, mac="00:00:00:00:00:00", up=False)))

    def state(self) -> NetState:
        return NetState(
            links=dict(self.links),
            addresses=frozenset(self.addresses),
            routes=frozenset(route for route in self.routes.values() if route.protocol == ROUTE_PROTOCOL),
            neighbours=frozenset(self.neighbours.values()),
            fdb=frozenset(self.fdb.values()),
            sysctls=dict(self.sysctls),
            wireguard=frozenset(replace(peer, endpoint=None) for peer in self.wireguard.values()),
        )

    # --- links ------------------------------------------------------------------------------------------------

    def add_link(self, link: Link, mac: str) -> None:
        """One link; a veth's other end is a second call and `join`. `mac` is used where the link asks for none."""
        self.check_new(link)
        mtu = self._largest_mtu(link)
        if link.mtu is not None:
            mtu = min(mtu, link.mtu) if isinstance(link.kind, Vxlan) else link.mtu  # Linux caps a new VXLAN's
        address = "" if isinstance(link.kind, Ipip | Tun | Wireguard) else link.mac or mac
        self.links[link.name] = _observed(replace(link, mtu=mtu, mac=address, up=False, shaper=None))
        if link.mtu is not None:
            self.fixed_mtu.add(link.name)
        self._adjust_mtu(link.master)
        if link.up:
            self._set_up(link.name)

    def check_new(self, link: Link) -> None:
        """Raise Refused unless a link like this can be made."""
        if link.master:
            self._link(link.master)
        if isinstance(link.kind, Vxlan):
            self._link(link.kind.underlay)
        if isinstance(link.kind, Device):
            raise Refused(errno.EINVAL, f"link {link.name}: a Device is configured, never made")
        if not link.name or len(link.name.encode()) > _NAME_BYTES:
            raise Refused(errno.ERANGE, "Attribute failed policy validation")
        if link.name in self.links:
            raise Refused(errno.EEXIST, "File exists")
        for other in self.links.values():
            if isinstance(link.kind, Vxlan) and isinstance(other.kind, Vxlan) and _endpoint(other.kind) == _endpoint(link.kind):
                raise Refused(errno.EEXIST, "A VXLAN device with the specified VNI already exists")
        if link.master:
            self._check_master(link)

    def join(self, name: str, other: "FakeNetns", other_name: str) -> None:
        """Make two links the ends of one pair."""
        for here, mine, there, theirs in ((self, name, other, other_name), (other, other_name, self, name)):
            here.peers[mine] = (there, theirs)
            visible = theirs if here is there else ""
            here.links[mine] = replace(here.links[mine], kind=Veth(peer=visible))

    def change_link(self, want: Link) -> None:
        """In Linux's order: what came before a refused part stays changed."""
        name, have = want.name, self._link(want.name)
        if want.master:
            self._link(want.master)
        if want.mac not in (None, have.mac):
            self._forget_neighbours(name)  # Linux flushes even permanent ones when the device's address changes
            self.links[name] = replace(self.links[name], mac=want.mac)
        if want.mtu not in (None, have.mtu):
            self._change_mtu(have, want.mtu)
        if isinstance(want.kind, Wireguard):
            self.links[name] = replace(self.links[name], kind=want.kind)
        if want.alias or not isinstance(want.kind, Device):
            self.links[name] = replace(self.links[name], alias=want.alias)
        if want.master not in (None, have.master):
            self._check_master(replace(have, master=want.master))
            self.links[name] = replace(self.links[name], master=want.master, hairpin=False)
            self._adjust_mtu(have.master)
            self._adjust_mtu(want.master)
        if want.up and not have.up:
            self._set_up(name)
        elif have.up and not want.up:
            self._set_down(name)
        if want.hairpin is not None and self.links[name].master and want.master:
            self.links[name] = replace(self.links[name], hairpin=want.hairpin)

    def _change_mtu(self, have: Link, mtu: int | None) -> None:
        if mtu is not None and isinstance(have.kind, Vxlan) and mtu > self._largest_mtu(have):
            raise Refused(errno.EINVAL, "Invalid argument")
        self.links[have.name] = replace(self.links[have.name], mtu=mtu)
        self.fixed_mtu.add(have.name)
        self._adjust_mtu(have.master)

    def del_link(self, name: str) -> None:
        if name == "lo":
            raise Refused(errno.EOPNOTSUPP, "Operation not supported")
        self._link(name)
        self._drop(name)
        if name in self.peers:
            other, other_name = self.peers.pop(name)
            other.peers.pop(other_name, None)
            other._drop(other_name)

    def destroy(self) -> None:
        """What happens when the last holder of the namespace goes: its devices go, and the other ends of its veths."""
        for name in [name for name in self.links if name != "lo"]:
            if name in self.links:
                self.del_link(name)
        self.ruleset = Ruleset()

    def _drop(self, name: str) -> None:
        self._set_down(name)
        for address in [address for address in self.addresses if address.dev == name]:
            del self.addresses[address]
        for key in [key for key in self.fdb if key[0] == name]:
            del self.fdb[key]
        for key in [key for key in self.wireguard if key[0] == name]:
            del self.wireguard[key]
        master = self.links.pop(name).master
        self.fixed_mtu.discard(name)
        self.shapers.pop(name, None)
        for switch in [switch for switch in self.sysctls if f"/conf/{name}/" in switch or f"/neigh/{name}/" in switch]:
            del self.sysctls[switch]
        self._adjust_mtu(master)
        for other in list(self.links.values()):
            if other.master == name:
                self.links[other.name] = replace(other, master="", hairpin=False)
            if isinstance(other.kind, Vxlan) and other.kind.underlay == name:
                self._drop(other.name)

    def _set_up(self, name: str) -> None:
        link = self.links[name] = replace(self.links[name], up=True)
        if name == "lo":
            for text in ("127.0.0.1/8", "::1/128"):
                self.addresses[Address("lo", ipaddress.ip_interface(text))] = None
        elif not link.master and link.mac:
            self.addresses[Address(name, ipaddress.ip_interface(f"{link_local(link.mac)}/64"))] = None

    def _set_down(self, name: str) -> None:
        self.links[name] = replace(self.links[name], up=False)
        self._forget_routes(name, (4, 6))
        for address in [a for a in self.addresses if a.dev == name and a.interface.version == 6]:
            del self.addresses[address]
        self._forget_neighbours(name)

    def _forget_routes(self, dev: str, versions: tuple[int, ...]) -> None:
        for key, route in list(self.routes.items()):
            leads_there = route.dev == dev or any(hop.dev == dev for hop in route.nexthops)
            if leads_there and route.dst.version in versions:
                del self.routes[key]

    def _forget_neighbours(self, dev: str, versions: tuple[int, ...] = (4, 6)) -> None:
        for key in [key for key in self.neighbours if key[0] == dev and key[1].version in versions]:
            del self.neighbours[key]

    def _adjust_mtu(self, bridge: str | None) -> None:
        if bridge and bridge in self.links and bridge not in self.fixed_mtu:
            ports = [link.mtu for link in self.links.values() if link.master == bridge and link.mtu is not None]
            self.links[bridge] = replace(self.links[bridge], mtu=min(ports, default=1500))

    def _check_master(self, link: Link) -> None:
        name = link.master
        if not name:
            return
        if isinstance(self._link(name).kind, Bridge) and isinstance(link.kind, Bridge):
            raise Refused(errno.ELOOP, "Can not enslave a bridge to a bridge")
        if not isinstance(self._link(name).kind, Bridge):
            raise Refused(errno.EOPNOTSUPP, "Device does not allow enslaving")

    def _largest_mtu(self, link: Link) -> int:
        """What a new device gets; for a VXLAN also the most it can have: the underlay's less the outer headers."""
        if not isinstance(link.kind, Vxlan):
            return 1500
        return (self._link(link.kind.underlay).mtu or 1500) - (50 if link.kind.local.version == 4 else 70)

    def _link(self, name: str) -> Link:
        if name not in self.links:
            raise Refused(errno.ENODEV, f"there is no device {name}")
        return self.links[name]

    # --- addresses, routes, neighbours, entries -----------------------------------------------------------------

    def add_address(self, address: Address) -> None:
        self._link(address.dev)
        self.addresses[address] = None

    def del_address(self, address: Address) -> None:
        dev, ip = address.dev, address.interface
        if address not in self.addresses:
            return
        del self.addresses[address]
        if ip.version == 6:
            return
        for key, route in list(self.routes.items()):
            if route.src == ip.ip:
                del self.routes[key]
        if not any(other.dev == dev and other.interface.version == 4 for other in self.addresses):
            self._disable_ipv4(dev)

    def _disable_ipv4(self, dev: str) -> None:
        """With a device's last IPv4 address its routes and neighbours go (fib_disable_ip)."""
        self._forget_routes(dev, (4,))
        self._forget_neighbours(dev, (4,))

    def set_route(self, route: Route) -> None:
        hops: list[tuple[str, IPAddress | None]] = [(hop.dev, hop.via) for hop in route.nexthops]
        if not hops and not route.blackhole:
            hops = [(route.dev, route.via)]
        for dev, _ in hops:
            self._link(dev)
        for dev, via in hops:
            if via is not None and not route.onlink and not self._on_link(dev, via):
                code = errno.ENETUNREACH if via.version == 4 else errno.EHOSTUNREACH
                raise Refused(code, "Nexthop has invalid gateway" if via.version == 4 else "No route to host")
            if not self._link(dev).up:
                raise Refused(errno.ENETDOWN, "Device for nexthop is not up")
            if via is not None and route.onlink and self._is_elsewhere(dev, via):
                raise Refused(errno.EINVAL, "Nexthop has invalid gateway or device mismatch")
        if route.src is not None and route.src not in self.local_addresses():
            raise Refused(errno.EINVAL, "Invalid prefsrc address")
        metric = 0 if route.dst.version == 6 and route.metric == 1024 else route.metric
        self.routes[route.dst, metric] = replace(route, metric=metric)

    def del_route(self, route: Route) -> None:
        key = (route.dst, route.metric)
        if key not in self.routes and route.dst.version == 4 and not route.metric:
            # To Linux a metric of 0 is "whichever comes first".
            others = (other for other in self.routes if other[0] == route.dst)
            key = min(others, key=lambda other: other[1], default=key)
        self.routes.pop(key, None)

    def set_neighbour(self, entry: Neighbour) -> None:
        self._link(entry.dev)
        self.neighbours[entry.dev, entry.ip] = entry

    def del_neighbour(self, entry: Neighbour) -> None:
        self.neighbours.pop((entry.dev, entry.ip), None)

    def set_fdb(self, entry: FdbEntry) -> None:
        if not isinstance(self._link(entry.dev).kind, Vxlan):
            raise Refused(errno.EOPNOTSUPP, "Operation not supported")
        self.fdb[entry.dev, entry.mac] = entry

    def del_fdb(self, entry: FdbEntry) -> None:
        known = self.fdb.get((entry.dev, entry.mac))
        if known is not None and known.dst == entry.dst:
            del self.fdb[entry.dev, entry.mac]

    def set_wireguard_peer(self, peer: WireguardPeer) -> None:
        """A network belongs to one peer: the last that was given it."""
        if not isinstance(self._link(peer.dev).kind, Wireguard):
            raise Refused(errno.EOPNOTSUPP, "Operation not supported")
        for key, other in self.wireguard.items():
            if key[0] == peer.dev:
                self.wireguard[key] = replace(other, allowed=tuple(n for n in other.allowed if n not in peer.allowed))
        self.wireguard[peer.dev, peer.public_key] = peer

    def del_wireguard_peer(self, peer: WireguardPeer) -> None:
        self.wireguard.pop((peer.dev, peer.public_key), None)

    def set_shaper(self, dev: str, shaper: Shaper) -> None:
        self._link(dev)
        self.shapers[dev] = shaper
        self.links[dev] = replace(self.links[dev], shaper=Shaper(0, 0))

    def set_sysctl(self, key: str, value: str) -> None:
        parts = key.split("/")
        if parts[0] != "net" or ".." in parts:
            raise Refused(errno.EINVAL, f"setting {key} to {value}: only paths below net/ belong to a network namespace")
        if len(parts) > 3 and parts[2] in ("conf", "neigh") and parts[3] not in ("all", "default", *self.links):
            raise Refused(errno.ENOENT, f"setting {key} to {value}: No such file or directory")
        self.sysctls[key] = " ".join(value.split())

    # --- lookups --------------------------------------------------------------------------------------------------

    def local_addresses(self) -> set[IPAddress]:
        return {address.interface.ip for address in self.addresses}

    def all_routes(self) -> Iterator[Route]:
        """Ours, and those that the kernel keeps for the networks of its addresses."""
        yield from self.routes.values()
        for address in self.addresses:
            if self.links[address.dev].up:
                yield Route(address.interface.network, address.dev, src=address.interface.ip)

    def lookup(self, dst: IPAddress) -> Route | None:
        """The route that a packet takes: longest prefix, then lowest metric, ours before the kernel's own."""
        best: Route | None = None
        for route in self.all_routes():
            if route.dst.version != dst.version or dst not in route.dst:
                continue
            if best is None or (route.dst.prefixlen, -route.metric) > (best.dst.prefixlen, -best.metric):
                best = route
        return best

    def _on_link(self, dev: str, via: IPAddress) -> bool:
        if via.is_link_local:
            return True
        return any(
            route.dev == dev and route.via is None and via.version == route.dst.version and via in route.dst
            for route in self.all_routes()
        )

    def _is_elsewhere(self, dev: str, via: IPAddress) -> bool:
        """IPv6 refuses an onlink gateway that a route (the default aside) puts behind another device."""
        if via.version == 4 or via.is_link_local:
            return False
        known = [route for route in self.all_routes() if route.dst.version == 6 and route.dst.prefixlen and via in route.dst]
        closest = max((route.dst.prefixlen for route in known), default=0)
        nearest = [route for route in known if route.dst.prefixlen == closest]
        return bool(nearest) and all(route.dev != dev for route in nearest)


def _observed(link: Link) -> Link:
    """With every field set, as `Kernel.observe` gives it."""
    return replace(link, master=link.master or "", hairpin=bool(link.hairpin and link.master))


def link_local(mac: str) -> IPAddress:
    """fe80:: + the modified EUI-64 of `mac` (RFC 4291 appendix A)."""
    raw = bytes.fromhex(mac.replace(":", ""))
    return ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + bytes([raw[0] ^ 2]) + raw[1:3] + b"\xff\xfe" + raw[3:])


def _endpoint(kind: Vxlan) -> tuple[int, int, int]:
    """What two VXLAN devices of a namespace must not share: an IPv4 and an IPv6 tunnel may have one VNI and port."""
    return kind.vni, kind.port, kind.local.version
