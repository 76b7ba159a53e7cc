"""From what is to what shall be: keyed comparison, and the order in which nothing is ever half there.

Make before break: switches, links, addresses, neighbours, forwarding entries, then the routes that use them; removals come
after all additions, in the reverse order. Only what is podwire's own is ever removed: links by their alias, routes by their
protocol (`observe` gives no others), addresses, neighbours and forwarding entries on links of ours.

The observed side may also be a *desired* value that was applied before: that is how a unit's change is computed.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from podwire.model.addr import IPAddress, IPNetwork
from podwire.model.ids import HOST, NetnsName
from podwire.model.kernelstate import (
    ROUTE_PROTOCOL,
    Address,
    Device,
    FdbEntry,
    Ipip,
    Link,
    Neighbour,
    NetState,
    Route,
    Veth,
    Vxlan,
    Wireguard,
    WireguardPeer,
)
from podwire.model.ops import (
    AddAddress,
    AddLink,
    ChangeLink,
    DelAddress,
    DelFdb,
    DelLink,
    DelNeighbour,
    DelRoute,
    DelWireguardPeer,
    Op,
    Plan,
    SetFdb,
    SetNeighbour,
    SetRoute,
    SetShaper,
    SetSysctl,
    SetWireguardPeer,
)

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

_DEVICE_SYSCTL = re.compile(r"net/ipv[46]/(?:conf|neigh)/(?!all/|default/)[^/]+/")
"""A switch that exists only while its device does."""

EMPTY = NetState()


@dataclass(frozen=True, slots=True)
class Delta(Generic[V]):
    """`set`: values to add or to change to, in the order wanted; `remove`: observed values that nobody wants."""

    set: tuple[V, ...]
    remove: tuple[V, ...]


def diff_keyed(desired: Iterable[V], observed: Iterable[V], key: Callable[[V], K]) -> Delta[V]:
    """Mark and sweep, written once: what is missing or differs is set, what has a key that nobody wants is removed."""
    present = {key(value): value for value in observed}
    wanted = {key(value): value for value in desired}
    return Delta(
        set=tuple(value for name, value in wanted.items() if present.get(name) != value),
        remove=tuple(value for name, value in present.items() if name not in wanted),
    )


def diff(desired: Mapping[NetnsName, NetState], observed: Mapping[NetnsName, NetState]) -> Plan:
    """The operations that lead from `observed` to `desired`, in a safe order.

    A namespace that `observed` does not have counts as empty; one that `desired` does not have loses what is ours.
    Both ends of a veth pair are made by one operation, so give both namespaces where both are wanted.
    """
    names = sorted(desired.keys() | observed.keys())  # HOST, the empty name, is first
    work = _Links(desired, observed)
    work.compare()
    make: list[Op] = []
    unmake: list[Op] = []
    for ns in names:
        make += _makes(work, ns)
    for ns in reversed(names):
        unmake += _breaks(work, ns)
    return (*make, *unmake)


def diff_host(desired: NetState, observed: NetState) -> Plan:
    """`diff` within HOST alone."""
    return diff({HOST: desired}, {HOST: observed})


def restrict(observed: NetState, to: NetState) -> NetState:
    """The part of `observed` whose keys `to` has: comparing one unit with the kernel must not sweep away the others."""
    routes = {_route_key(route) for route in to.routes}
    neighbours = {_neighbour_key(entry) for entry in to.neighbours}
    fdb = {_fdb_key(entry) for entry in to.fdb}
    return NetState(
        links={name: link for name, link in observed.links.items() if name in to.links},
        addresses=frozenset(a for a in observed.addresses if a.dev in to.links),
        routes=frozenset(r for r in observed.routes if _route_key(r) in routes),
        neighbours=frozenset(n for n in observed.neighbours if _neighbour_key(n) in neighbours),
        fdb=frozenset(e for e in observed.fdb if _fdb_key(e) in fdb),
        sysctls={key: value for key, value in observed.sysctls.items() if key in to.sysctls},
        wireguard=frozenset(p for p in observed.wireguard if _peer_key(p) in set(map(_peer_key, to.wireguard))),
    )


def satisfied(desired: Link, observed: Link) -> bool:
    """Whether an observed link is what is desired, as far as that says anything (None and an empty alias say nothing)."""
    return (
        same_kind(desired, observed)
        and (not isinstance(desired.kind, Wireguard) or desired.kind == observed.kind)
        and desired.up == observed.up
        and (desired.mtu is None or desired.mtu == observed.mtu)
        and (desired.mac is None or desired.mac == observed.mac)
        and (desired.master is None or desired.master == observed.master)
        and (desired.hairpin is None or desired.hairpin == observed.hairpin)
        and (not desired.alias or desired.alias == observed.alias)
    )


def same_kind(desired: Link, observed: Link) -> bool:
    """Whether changing `observed` can do, or whether it has to be made anew."""
    if isinstance(desired.kind, Device):
        return True
    if isinstance(desired.kind, Vxlan | Ipip):
        return desired.kind == observed.kind
    return type(desired.kind) is type(observed.kind)


@dataclass(slots=True)
class _NsLinks:
    """What happens to one namespace's links. `gone` are devices whose addresses and entries vanish with them."""

    replaced: list[str] = field(default_factory=list)
    added: list[AddLink] = field(default_factory=list)
    changed: list[Link] = field(default_factory=list)
    swept: list[str] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)


class _Links:
    """The link part of a diff, over all namespaces at once, because veth pairs reach across."""

    def __init__(self, desired: Mapping[NetnsName, NetState], observed: Mapping[NetnsName, NetState]) -> None:
        self.desired, self.observed = desired, observed
        self.by_ns = {ns: _NsLinks() for ns in desired.keys() | observed.keys()}

    def compare(self) -> None:
        paired: set[tuple[NetnsName, str]] = set()
        for ns in sorted(self.desired):
            # A master before its ports: an operation may name only what is there.
            for link in sorted(self.desired[ns].links.values(), key=lambda link: (link.master is not None, link.name)):
                if (ns, link.name) not in paired:
                    paired |= self._compare_link(ns, link)
        for ns, state in self.observed.items():
            wanted = self.desired.get(ns, EMPTY).links
            for link in state.links.values():
                if link.owned and link.name not in wanted and link.name not in self.by_ns[ns].gone:
                    self.by_ns[ns].swept.append(link.name)
                    self.by_ns[ns].gone.add(link.name)
                    self._peer_goes(link)

    def _compare_link(self, ns: NetnsName, link: Link) -> set[tuple[NetnsName, str]]:
        """Decide on `link`, and on its other end if it is the first seen of a pair; returns the ends decided on."""
        ends = {(ns, link.name)}
        peer = self._wanted_peer(link)
        if peer and isinstance(link.kind, Veth):
            ends.add((link.kind.peer_ns, peer.name))
        if all(self._usable(*end) for end in ends):
            for end_ns, name in sorted(ends):
                wanted = self.desired[end_ns].links[name]
                current = self.observed.get(end_ns, EMPTY).links.get(name)
                if current is None or not satisfied(wanted, current):
                    self.by_ns[end_ns].changed.append(wanted)
            return ends
        for end_ns, name in sorted(ends):
            if name in self.observed.get(end_ns, EMPTY).links:
                self._replace(end_ns, name)
        self.by_ns[ns].added.append(AddLink(link, peer, ns))
        return ends

    def _usable(self, ns: NetnsName, name: str) -> bool:
        """Whether the wanted link stands already and only needs changing. One that podwire does not make is always so."""
        wanted = self.desired[ns].links[name]
        if isinstance(wanted.kind, Device):
            return True
        current = self.observed.get(ns, EMPTY).links.get(name)
        return current is not None and same_kind(wanted, current)

    def _wanted_peer(self, link: Link) -> Link | None:
        if not isinstance(link.kind, Veth):
            return None
        return self.desired.get(link.kind.peer_ns, EMPTY).links.get(link.kind.peer)

    def _replace(self, ns: NetnsName, name: str) -> None:
        """Clear the way for a new link of this name. A stranger's is left: adding ours then fails, and says why."""
        current = self.observed[ns].links[name]
        if not current.owned or name in self.by_ns[ns].gone:
            return
        self.by_ns[ns].replaced.append(name)
        self.by_ns[ns].gone.add(name)
        self._peer_goes(current)

    def _peer_goes(self, link: Link) -> None:
        """Deleting one end of a pair deletes the other."""
        if isinstance(link.kind, Veth) and link.kind.peer_ns in self.by_ns:
            self.by_ns[link.kind.peer_ns].gone.add(link.kind.peer)


def _makes(work: _Links, ns: NetnsName) -> list[Op]:
    desired, links = work.desired.get(ns, EMPTY), work.by_ns[ns]
    observed = _without(work.observed.get(ns, EMPTY), links.gone)
    switches = {key: value for key, value in desired.sysctls.items() if observed.sysctls.get(key) != value}
    ops: list[Op] = [SetSysctl(key, value, ns) for key, value in switches.items() if not _DEVICE_SYSCTL.match(key)]
    ops += [DelLink(name, ns) for name in links.replaced]
    ops += links.added
    ops += [ChangeLink(link, ns) for link in links.changed]
    ops += [SetSysctl(key, value, ns) for key, value in switches.items() if _DEVICE_SYSCTL.match(key)]
    for name, link in desired.links.items():
        if link.shaper and (name not in observed.links or observed.links[name].shaper is None):
            ops.append(SetShaper(name, link.shaper, ns))
    for address in sorted(desired.addresses - observed.addresses, key=_address_order):
        # The kernel refuses an IPv6 address that the device has with another prefix length: there break comes before make.
        ops += [DelAddress(old, ns) for old in _same_ip(observed.addresses, address)]
        ops.append(AddAddress(address, ns))
    neighbours = diff_keyed(desired.neighbours, observed.neighbours, _neighbour_key)
    ops += [SetNeighbour(entry, ns) for entry in sorted(neighbours.set, key=lambda n: (n.dev, int(n.ip)))]
    fdb = diff_keyed(desired.fdb, observed.fdb, _fdb_key)
    ops += [SetFdb(entry, ns) for entry in sorted(fdb.set, key=_fdb_key)]
    ops += [SetWireguardPeer(peer, ns) for peer in _wireguard_changes(desired, observed)]
    routes = diff_keyed(desired.routes, observed.routes, _route_key)
    ops += [SetRoute(route, ns) for route in sorted(routes.set, key=_route_order)]
    return ops


def _breaks(work: _Links, ns: NetnsName) -> list[Op]:
    desired, links = work.desired.get(ns, EMPTY), work.by_ns[ns]
    whole = work.observed.get(ns, EMPTY)
    observed = _without(whole, links.gone)
    ours = {link.name for link in whole.links.values() if link.owned} | desired.links.keys()
    strangers = {name for name, link in desired.links.items() if isinstance(link.kind, Device)}
    ops: list[Op] = []
    routes = diff_keyed(desired.routes, observed.routes, _route_key)
    gone = (route for route in routes.remove if route.protocol == ROUTE_PROTOCOL or route.dev in ours - strangers)
    ops += [DelRoute(route, ns) for route in sorted(gone, key=_route_order, reverse=True)]
    # A unit's old value has no devices in it: what it says of them is ours to take back.
    foreign = (whole.links.keys() - ours) | strangers
    peers = diff_keyed(desired.wireguard, observed.wireguard, _peer_key)
    ops += [DelWireguardPeer(peer, ns) for peer in sorted(peers.remove, key=_peer_key) if peer.dev not in foreign]
    fdb = diff_keyed(desired.fdb, observed.fdb, _fdb_key)
    ops += [DelFdb(entry, ns) for entry in sorted(fdb.remove, key=_fdb_key) if entry.dev not in foreign]
    neighbours = diff_keyed(desired.neighbours, observed.neighbours, _neighbour_key)
    stale = (entry for entry in neighbours.remove if entry.dev not in foreign)
    ops += [DelNeighbour(entry, ns) for entry in sorted(stale, key=lambda n: (n.dev, int(n.ip)))]
    kept = {(address.dev, address.interface.ip) for address in desired.addresses}
    for address in sorted(observed.addresses - desired.addresses, key=_address_order):
        removable = address.dev in ours - strangers and not address.interface.ip.is_link_local
        if removable and (address.dev, address.interface.ip) not in kept:
            ops.append(DelAddress(address, ns))
    ops += [DelLink(name, ns) for name in sorted(links.swept)]
    return ops


def _without(state: NetState, gone: set[str]) -> NetState:
    """`state` after the devices in `gone` have vanished, and with them all that was on them."""
    if not gone:
        return state
    return NetState(
        links={name: link for name, link in state.links.items() if name not in gone},
        addresses=frozenset(a for a in state.addresses if a.dev not in gone),
        routes=frozenset(r for r in state.routes if r.dev not in gone and not any(h.dev in gone for h in r.nexthops)),
        neighbours=frozenset(n for n in state.neighbours if n.dev not in gone),
        fdb=frozenset(e for e in state.fdb if e.dev not in gone),
        sysctls=state.sysctls,
        wireguard=frozenset(p for p in state.wireguard if p.dev not in gone),
    )


def _wireguard_changes(desired: NetState, observed: NetState) -> list[WireguardPeer]:
    """The peers to set. Networks move from peer to peer by being set, so the order does not matter; an endpoint that was not
    observed is as good as any."""
    present = {_peer_key(peer): peer for peer in observed.wireguard}

    def differs(peer: WireguardPeer) -> bool:
        other = present.get(_peer_key(peer))
        if other is None:
            return True
        return replace(peer, endpoint=None) != replace(other, endpoint=None) or other.endpoint not in (None, peer.endpoint)

    return sorted(filter(differs, desired.wireguard), key=_peer_key)


def _same_ip(observed: Iterable[Address], wanted: Address) -> list[Address]:
    return [a for a in observed if a.dev == wanted.dev and a.interface.ip == wanted.interface.ip and a != wanted]


def _route_key(route: Route) -> tuple[IPNetwork, int]:
    return route.dst, route.metric


def _neighbour_key(entry: Neighbour) -> tuple[str, IPAddress]:
    return entry.dev, entry.ip


def _fdb_key(entry: FdbEntry) -> tuple[str, str]:
    return entry.dev, entry.mac


def _peer_key(peer: WireguardPeer) -> tuple[str, str]:
    return peer.dev, peer.public_key


def _address_order(address: Address) -> tuple[str, int, int]:
    return address.dev, address.interface.version, int(address.interface.ip)


def _route_order(route: Route) -> tuple[bool, int, int, int, int]:
    """Routes on a link first: those through a gateway need them."""
    through = route.via is not None or bool(route.nexthops)
    return through, route.dst.version, int(route.dst.network_address), route.dst.prefixlen, route.metric
