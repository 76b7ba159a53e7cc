"""Fake nodes on one underlay: send a packet from any namespace and see by which devices it goes and where it ends.

Layer 3 as Linux does it: netfilter, routes, neighbours, bridges, veth pairs, VXLAN encapsulation. Nothing is resolved that a
real node would not find out: a VXLAN has no ARP, so it needs its static neighbour and forwarding entry.
"""

import ipaddress
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from podwire.model.addr import IPAddress
from podwire.model.ids import HOST, NetnsName
from podwire.model.kernelstate import Bridge, Link, Route, Veth, Vxlan
from podwire.model.nft import Hook
from podwire.testing.fakekernel import FakeKernel
from podwire.testing.fakenetns import FakeNetns
from podwire.trace.journey import Fate, Machine, Packet, Result
from podwire.trace.netfilter import run_hook

_HOPS = 16


@dataclass(frozen=True, slots=True)
class Hop:
    """One step: in namespace `ns` of `node`, the device and what happened there."""

    node: str
    ns: str
    dev: str
    what: str


@dataclass(frozen=True, slots=True)
class Delivery:
    """Where a packet ended, and as what. `dropped` is empty if it arrived, else the reason."""

    node: str
    ns: str
    packet: Packet
    hops: tuple[Hop, ...] = field(default=())
    dropped: str = ""

    @property
    def arrived(self) -> bool:
        return not self.dropped


class Dropped(Exception):
    """The packet ends here; the text says why."""


class FakeFabric:
    """Nodes by name. Their uplinks (`uplink`, a Device) are all on one switch."""

    def __init__(self, nodes: Mapping[str, FakeKernel], uplink: str = "eth0") -> None:
        self._nodes, self._uplink = dict(nodes), uplink

    def send(
        self,
        node: str,
        dst: IPAddress,
        ns: NetnsName = HOST,
        *,
        port: int = 0,
        protocol: int = 6,
        choose: Callable[[int], int] = lambda n: 0,
    ) -> Delivery:
        """A connection's first packet to `dst` from a process in namespace `ns` of `node`. `choose(n)` gives the numbers that
        rules draw. Never raises: the delivery says what went wrong."""
        unspecified = ipaddress.ip_address("0.0.0.0" if dst.version == 4 else "::")
        packet = Packet(unspecified, dst, protocol, sport=32768 if port else 0, dport=port)
        return _Walk(self._nodes, self._uplink, node, self._nodes[node].space(ns), choose).run(packet)


class _Walk:
    def __init__(
        self, nodes: Mapping[str, FakeKernel], uplink: str, node: str, space: FakeNetns, choose: Callable[[int], int]
    ) -> None:
        self._nodes, self._uplink, self._choose = nodes, uplink, choose
        self._node, self._space = node, space
        self._hops: list[Hop] = []

    def run(self, packet: Packet) -> Delivery:
        dropped = ""
        self._packet = packet
        try:
            self._route()
        except Dropped as reason:
            dropped = str(reason)
        return Delivery(self._node, self._space.label, self._packet, tuple(self._hops), dropped)

    def _route(self) -> None:
        self._packet = replace(self._packet, src=self._source(self._lookup()))
        for hop in range(_HOPS):
            entered = self._packet
            first = self._netfilter(Hook.PREROUTING if hop else Hook.OUTPUT, entered, rewritten=False)
            dst = self._packet.dst
            if dst in self._space.local_addresses():
                self._netfilter(Hook.INPUT, entered, rewritten=first.rewritten)
                return
            if hop and self._space.sysctls.get(_forwarding(dst)) != "1":
                raise Dropped(f"{self._where()} does not forward {dst} ({_forwarding(dst)} is not 1)")
            route = self._lookup()
            if hop:
                self._netfilter(Hook.FORWARD, entered, rewritten=first.rewritten)
            if self._netfilter(Hook.POSTROUTING, entered, rewritten=first.rewritten).masquerade:
                self._packet = replace(self._packet, src=self._source(route))
                self._note("", f"masqueraded as {self._packet.src}")
            dev, via = (route.nexthops[0].dev, route.nexthops[0].via) if route.nexthops else (route.dev, route.via)
            self._transmit(self._space.links[dev], via or dst)
        raise Dropped(f"{self._packet.dst} was still under way after {_HOPS} hops")

    def _lookup(self) -> Route:
        route = self._space.lookup(self._packet.dst)
        if route is None:
            raise Dropped(f"{self._where()} has no route to {self._packet.dst}")
        if route.blackhole:
            raise Dropped(f"{self._where()} drops what goes to {route.dst}")
        return route

    def _source(self, route: Route) -> IPAddress:
        """The address that a packet sent by `route` bears."""
        if route.src is not None:
            return route.src
        dev = route.nexthops[0].dev if route.nexthops else route.dev
        for address in self._space.addresses:
            ip = address.interface.ip
            if address.dev == dev and ip.version == route.dst.version and not ip.is_link_local:
                return ip
        return self._packet.src

    def _netfilter(self, hook: Hook, entered: Packet, *, rewritten: bool) -> Result:
        machine = Machine(frozenset(self._space.local_addresses()), self._choose)
        result = run_hook(self._space.ruleset, hook, self._packet, machine, original=entered, rewritten=rewritten)
        if result.fate is not Fate.PASS:
            raise Dropped(f"{self._where()} at {hook.name.lower()}: {result.fate.value}")
        if result.packet.dst != self._packet.dst or result.packet.dport != self._packet.dport:
            self._note("", f"destination becomes {result.packet.dst} port {result.packet.dport}")
        self._packet = result.packet
        return result

    def _transmit(self, link: Link, next_hop: IPAddress) -> None:
        if not link.up:
            raise Dropped(f"{link.name} in {self._where()} is down")
        self._note(link.name, f"to {next_hop}")
        match link.kind:
            case Vxlan() as tunnel:
                self._encapsulate(link, tunnel, next_hop)
            case Bridge():
                self._bridge(self._space, link.name, next_hop)
            case Veth():
                self._pair(link, next_hop)
            case _ if link.name == self._uplink:
                self._underlay(next_hop)
            case _:
                raise Dropped(f"{link.name} in {self._where()} leads nowhere")

    def _pair(self, link: Link, next_hop: IPAddress) -> None:
        other, name = self._space.peers[link.name]
        end = other.links[name]
        if not end.up:
            raise Dropped(f"{name}, the other end of {link.name}, is down")
        if end.master:
            self._bridge(other, end.master, next_hop)
        elif next_hop in other.local_addresses():
            self._space = other
        else:
            raise Dropped(f"nobody at {name} answers for {next_hop}")

    def _bridge(self, space: FakeNetns, bridge: str, next_hop: IPAddress) -> None:
        """Who on this bridge answers for `next_hop`: its own namespace, or a port's other end."""
        if not space.links[bridge].up:
            raise Dropped(f"bridge {bridge} is down")
        if any(a.interface.ip == next_hop and a.dev == bridge for a in space.addresses):
            self._space = space
            return
        for port in space.links.values():
            if port.master != bridge or not port.up or port.name not in space.peers:
                continue
            other, name = space.peers[port.name]
            if other.links[name].up and any(a.interface.ip == next_hop and a.dev == name for a in other.addresses):
                self._note(port.name, "bridged")
                self._space = other
                return
        raise Dropped(f"nobody on bridge {bridge} answers for {next_hop}")

    def _encapsulate(self, link: Link, tunnel: Vxlan, next_hop: IPAddress) -> None:
        neighbour = self._space.neighbours.get((link.name, next_hop))
        if neighbour is None:
            raise Dropped(f"{link.name} in {self._where()} has no neighbour entry for {next_hop}")
        entry = self._space.fdb.get((link.name, neighbour.mac))
        if entry is None:
            raise Dropped(f"{link.name} in {self._where()} has no forwarding entry for {neighbour.mac}")
        self._note(link.name, f"encapsulated {tunnel.local} → {entry.dst} VNI {tunnel.vni}")
        outer = self._space.lookup(entry.dst)
        if outer is None or outer.dev != tunnel.underlay:
            raise Dropped(f"{self._where()} has no route over {tunnel.underlay} to {entry.dst}")
        self._underlay(entry.dst)
        for far in self._space.links.values():
            kind = far.kind
            if isinstance(kind, Vxlan) and (kind.vni, kind.port, kind.local) == (tunnel.vni, tunnel.port, entry.dst):
                if far.mac != neighbour.mac or not far.up:
                    raise Dropped(f"{far.name} on {self._node} has MAC {far.mac}, the packet is for {neighbour.mac}")
                self._note(far.name, "decapsulated")
                return
        raise Dropped(f"{self._node} has no VXLAN device with VNI {tunnel.vni}, port {tunnel.port}, address {entry.dst}")

    def _underlay(self, next_hop: IPAddress) -> None:
        for name, kernel in self._nodes.items():
            if any(a.interface.ip == next_hop and a.dev == self._uplink for a in kernel.host.addresses):
                self._node, self._space = name, kernel.host
                return
        raise Dropped(f"no node on the underlay has {next_hop}")

    def _note(self, dev: str, what: str) -> None:
        self._hops.append(Hop(self._node, self._space.label, dev, what))

    def _where(self) -> str:
        return f"{self._space.label} on {self._node}" if self._space.label else self._node


def _forwarding(dst: IPAddress) -> str:
    return "net/ipv4/ip_forward" if dst.version == 4 else "net/ipv6/conf/all/forwarding"
