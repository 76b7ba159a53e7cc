"""Do the kernels of all nodes agree with the leases? Pure: leases, pods' addresses and observed kernels in, findings out.

The way to a peer is looked up in what was observed as a packet would take it: the longest route, its next hop's neighbour
entry, that MAC's forwarding entry, the machine behind that address, and the MAC of the device there. Nothing of what was
planned is asked, so a planner's mistake shows.
"""

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from podwire.model.addr import IPAddress, IPNetwork, family_of
from podwire.model.kernelstate import Bridge, Ipip, NetState, Route, Tun, Vxlan, Wireguard
from podwire.plan.leases import Lease

MAPPED = "every pod address belongs to one node"
UNIQUE = "no subnet and no address is held twice"
AGREED = "every node's kernel knows the way"
KEPT = "a packet keeps its source"
FITTING = "the path MTU is what the devices say"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `condition`: which of the five it is about; `evidence`: what was seen, in words.

    `ok` is None for what could not be looked at from here; `evidence` then says why.
    """

    condition: str
    subject: str
    ok: bool | None
    evidence: str


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node as its kernel has it. `addresses`: its own on the underlay (and what its lease says, where that differs)."""

    name: str
    addresses: frozenset[IPAddress]
    state: NetState


@dataclass(frozen=True, slots=True)
class PodAddress:
    pod: str
    node: str
    ip: IPAddress


def check_uniqueness(leases: Mapping[str, Lease], pods: Collection[PodAddress]) -> list[Finding]:
    """`leases`: by node. What is held twice, or one finding that says that nothing is."""
    held = [(node, subnet) for node, lease in leases.items() for subnet in lease.subnets]
    found = [
        Finding(UNIQUE, f"{one} and {two}", ok=False, evidence=f"{a} of {one} overlaps {b} of {two}")
        for (one, a), (two, b) in itertools.combinations(held, 2)
        if a.version == b.version and a.overlaps(b)
    ]
    by_ip: dict[IPAddress, list[str]] = {}
    for entry in pods:
        by_ip.setdefault(entry.ip, []).append(entry.pod)
    found += [
        Finding(UNIQUE, str(ip), ok=False, evidence=f"{ip} is held by {' and '.join(names)}")
        for ip, names in by_ip.items()
        if len(names) > 1
    ]
    everything = f"{len(held)} subnets of {len(leases)} nodes, {len(by_ip)} pod addresses"
    return found or [Finding(UNIQUE, "all", ok=True, evidence=f"{everything}: compared pair by pair")]


def check_mapping(leases: Mapping[str, Lease], pods: Iterable[PodAddress]) -> list[Finding]:
    """That each pod's address lies in the subnet of the node it runs on, and in no other's."""
    found = []
    for entry in pods:
        owners = [node for node, lease in leases.items() if any(_holds(subnet, entry.ip) for subnet in lease.subnets)]
        words = f"{entry.ip} lies in the subnet of {' and '.join(owners) or 'nobody'}; the pod runs on {entry.node}"
        found.append(Finding(MAPPED, entry.pod, ok=owners == [entry.node], evidence=words))
    return found


def check_devices(view: NodeView, leases: Mapping[str, Lease]) -> Iterator[Finding]:
    """That each address of the node's devices within the pods' subnets is in the node's own: a bridge that has kept a subnet
    which is another's by now gives its addresses to pods a second time."""
    for address in sorted(view.state.addresses, key=lambda a: (a.dev, a.interface.version, int(a.interface.ip))):
        ip = address.interface.ip
        owners = [node for node, lease in leases.items() if any(_holds(subnet, ip) for subnet in lease.subnets)]
        if owners:
            words = f"{address.dev} has {address.interface}, which lies in the subnet of {' and '.join(owners)}"
            yield Finding(MAPPED, f"{view.name}: {address.dev}", ok=owners == [view.name], evidence=words)


def check_ways(leases: Mapping[str, Lease], views: Mapping[str, NodeView]) -> Iterator[Finding]:
    """From each node in `views` to every other node's subnets. Of nodes without a view the addresses come from the lease."""
    for view in views.values():
        for node, lease in leases.items():
            for subnet in lease.subnets if node != view.name else ():
                complaint, words = _way(view, subnet, lease, views.get(node))
                evidence = f"{words}: {complaint}" if complaint else words
                yield Finding(AGREED, f"{view.name} → {node} ({subnet})", ok=not complaint, evidence=evidence)


def check_own(view: NodeView, lease: Lease) -> Iterator[Finding]:
    """That a tunnel's MAC is the one that the node's lease tells the others."""
    for subnet in lease.subnets:
        told = lease.attrs.data(family_of(subnet))
        tunnels = [link for link in view.state.links.values() if isinstance(link.kind, Vxlan) and link.owned]
        mine = [link for link in tunnels if link.kind.local.version == subnet.version]  # type: ignore[union-attr]
        for link in mine if "VtepMAC" in told else ():
            ok = f'"{link.mac}"' in told.lower()
            words = f"{link.name} has {link.mac}; the lease says {told}"
            yield Finding(AGREED, f"{view.name} itself ({subnet})", ok=ok, evidence=words)


def longest_route(state: NetState, address: IPAddress) -> Route | None:
    """The route of podwire's that a packet to `address` takes."""
    fitting = [route for route in state.routes if _holds(route.dst, address)]
    return max(fitting, key=lambda route: (route.dst.prefixlen, -route.metric), default=None)


def _addresses(lease: Lease, view: NodeView | None) -> frozenset[IPAddress]:
    told = frozenset(a for a in (lease.attrs.public_ip, lease.attrs.public_ipv6) if a is not None)
    return told | (view.addresses if view else frozenset())


def _way(view: NodeView, subnet: IPNetwork, lease: Lease, there: NodeView | None) -> tuple[str, str]:
    """(what is wrong or "", what was seen)."""
    state, peer = view.state, _addresses(lease, there)
    target = subnet.network_address + 1
    route = longest_route(state, target)
    if route is None:
        return f"there is no route to {target}", "no route"
    words = [f"route {route.dst}" + (f" via {route.via}" if route.via else "") + f" dev {route.dev}"]
    link = state.links.get(route.dev)
    if link is None or not link.up:
        return f"device {route.dev} is not there, or down", words[0]
    match link.kind:
        case Vxlan():
            complaint = _through_vxlan(state, route, peer, there, words)
        case Wireguard():
            peers = [p for p in state.wireguard if p.dev == route.dev and any(_inside(subnet, net) for net in p.allowed)]
            words += [f"WireGuard peer {p.public_key}" for p in peers]
            told = lease.attrs.data(family_of(subnet))
            complaint = "" if len(peers) == 1 else f"{len(peers)} WireGuard peers may send from {subnet}"
            if not complaint and f'"{peers[0].public_key}"' not in told:
                complaint = f"that is another key than the lease tells, {told or 'none'}"
        case Tun():
            words.append("the UDP proxy decides")
            complaint = ""
        case Bridge():
            complaint = "it leads to this node's own bridge"
        case kind:
            complaint = "" if route.via in peer else f"the next hop {route.via} is none of {_words(peer)}"
            if isinstance(kind, Ipip):
                words.append("encapsulated as IPIP")
    return complaint, ", ".join(words)


def _through_vxlan(state: NetState, route: Route, peer: frozenset[IPAddress], there: NodeView | None, words: list[str]) -> str:
    mac = next((n.mac for n in state.neighbours if (n.dev, n.ip) == (route.dev, route.via)), None)
    if mac is None:
        return f"{route.via} has no neighbour entry on {route.dev}"
    words.append(f"neighbour {mac}")
    outer = next((e.dst for e in state.fdb if (e.dev, e.mac) == (route.dev, mac)), None)
    if outer is None:
        return f"{mac} has no forwarding entry on {route.dev}"
    words.append(f"forwarded to {outer}")
    if outer not in peer:
        return f"{outer} is none of the node's addresses {_words(peer)}"
    if there is None:
        return ""
    own = state.links[route.dev].kind
    ends = [k for k in there.state.links.values() if isinstance(k.kind, Vxlan) and isinstance(own, Vxlan)
            and k.kind.vni == own.vni and k.kind.local == outer]  # fmt: skip
    if not ends:
        return f"nobody receives it: {there.name} has no VXLAN device for that VNI at {outer}"
    words.append(f"received by {ends[0].name} with {ends[0].mac}")
    return "" if ends[0].mac == mac and ends[0].up else f"the device there has another MAC, {ends[0].mac}, or is down"


def _holds(net: IPNetwork, address: IPAddress) -> bool:
    return net.version == address.version and address in net


def _inside(subnet: IPNetwork, net: IPNetwork) -> bool:
    return subnet.version == net.version and subnet.network_address in net and subnet.prefixlen >= net.prefixlen


def _words(addresses: Iterable[IPAddress]) -> str:
    return ", ".join(sorted(map(str, addresses))) or "(none)"
