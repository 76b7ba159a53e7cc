"""Services → IPVS virtual servers, and the nftables around them.

IPVS picks the backend; everything it has no notion of stays with the rules and maps of `services_rules`: who is refused,
dropped or masqueraded, source ranges, host ports, and the second pool of a frontend whose pools differ by where a client is
(with externalTrafficPolicy: Local, IPVS serves those outside, the map this node's own pods and processes). So the verdict for
a packet is that of the other back ends. The nat hooks come before IPVS: what a map rewrites never gets there.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields

import msgspec

from podwire.model.addr import Family
from podwire.model.ipvs import DelReal, DelVirtual, IpvsOp, SetReal, SetVirtual, VirtualKey, VirtualServer
from podwire.model.nft import Batch, NftSet, Rule, Ruleset, TableRef, ip_field
from podwire.model.nftexpr import (
    RETURN,
    Bitwise,
    Cmp,
    CmpOp,
    Immediate,
    Lookup,
    Masquerade,
    Payload,
    PayloadBase,
    goto,
    jump,
)
from podwire.model.servicetable import Backend, Frontend, FrontendKind, NodeFacts, Pool
from podwire.plan.elementbooks import CountedBook
from podwire.plan.nftexprs import Fields, from_this_machine, is_protocol
from podwire.plan.serviceledger import ServiceLedger
from podwire.plan.services_maps import FamilyMaps, place_of, resynced, taken
from podwire.plan.services_rules import LEFT, PICK, PICK_LOCAL, REFUSE, Number, Sets, pack_number, sent_to_a_frontend, sets_of
from podwire.plan.services_table import LOOPBACK

TABLE = "podwire-ipvs"
"""The nftables beside IPVS. Not the name of the nftables mode's: while the mode changes there are both."""

DEVICE = "podwire-ipvs"
"""Holds the addresses of virtual servers: IPVS only sees what the node takes for its own."""

UDP = 17
_TCP, _TCP_FLAGS, _RST = 6, 13, b"\x04"


@dataclass(frozen=True, slots=True)
class IpvsChanges:
    """What changed: virtual servers (None: gone) and nftables."""

    servers: Mapping[VirtualKey, VirtualServer | None]
    batch: Batch

    def __bool__(self) -> bool:
        return bool(self.servers) or bool(self.batch)


class IpvsPlanner(ServiceLedger["IpvsMaps"]):
    """Holds one node's desired virtual servers and rules."""

    def __init__(self, facts: NodeFacts, scheduler: str = "rr") -> None:
        super().__init__(facts, lambda family, known: IpvsMaps(family, known, scheduler))

    def take(self) -> IpvsChanges:
        """From what was last taken to what is desired now; falsy if that is the same."""
        servers = {key: server for maps in self._maps.values() for key, server in maps.take_servers().items()}
        return IpvsChanges(servers, taken(self._maps.values()))

    def resync(self, observed: Ruleset, *, leavings: bool = False) -> Batch:
        """From the nftables that the kernel holds to what is desired now. Everything then counts as taken. `leavings`: as in
        `ServicePlanner.resync`."""
        for maps in self._maps.values():
            maps.take_servers()
        return resynced(self._maps.values(), observed, leavings=leavings)

    def servers(self) -> dict[VirtualKey, VirtualServer]:
        """All virtual servers that the kernel shall hold."""
        return {key: server for maps in self._maps.values() for key, server in maps.servers.items()}

    def served(self) -> dict[VirtualKey, bytes]:
        """Virtual servers, and the keys of the frontends that are left to them."""
        return {_virtual(maps.frontend(key)): key for maps in self._maps.values() for key in maps.left_to_ipvs}

    def bound(self) -> frozenset[bytes]:
        """The addresses that the node must take for its own beside those it has."""
        return frozenset(address for maps in self._maps.values() for address in maps.bound)


@dataclass(frozen=True, slots=True)
class IpvsSets(Sets):
    """`bound`: addresses of the device. Without it, a port of theirs that nobody serves would be the node's own."""

    bound: NftSet

    def all(self) -> tuple[NftSet, ...]:
        return (*Sets.all(self), self.bound)


def _sets(family: Family) -> IpvsSets:
    shared = sets_of(family)
    return IpvsSets(**{f.name: getattr(shared, f.name) for f in fields(shared)}, bound=NftSet("bound", (ip_field(family),)))


class IpvsMaps(FamilyMaps):
    """One family's virtual servers, and the maps for the rest."""

    def __init__(self, family: Family, facts: NodeFacts, scheduler: str) -> None:
        self._ipvs_sets = _sets(family)
        super().__init__(family, facts, self._ipvs_sets)
        self.table = TableRef(family, TABLE)
        self.servers: dict[VirtualKey, VirtualServer] = {}
        self._scheduler = scheduler
        self._own = {ip.packed for ip in facts.node_ips}
        for chain in (PICK, PICK_LOCAL):
            self._numbers.use(Number(chain, LEFT))
        self._bound = CountedBook(self._ipvs_sets.bound)
        self._books[self._ipvs_sets.bound.name] = self._bound
        self._originals: dict[bytes, Frontend] = {}
        self._left: dict[bytes, str] = {}
        """Keys → the map that says to leave the packet to IPVS."""
        self._changed: dict[VirtualKey, VirtualServer | None] = {}

    @property
    def bound(self) -> Iterable[bytes]:
        return self._bound.elements

    @property
    def left_to_ipvs(self) -> Iterable[bytes]:
        """Keys of frontends."""
        return self._left

    def frontend(self, key: bytes) -> Frontend:
        return self._originals[key]

    def program(self, key: bytes, frontend: Frontend | None, owner: str = "") -> None:
        old = self._originals.pop(key, None)
        was, left = self._left.pop(key, ""), ""
        if frontend is not None:
            self._originals[key] = frontend
            left = _left_to_ipvs(frontend)
        if old is not None and was != left:
            super().program(key, None)
        if left:
            self._left[key] = left
        self._serve(old if was else None, frontend if left else None)
        super().program(key, _for_maps(frontend, left) if frontend else None, owner)

    def _serve(self, old: Frontend | None, new: Frontend | None) -> None:
        """The virtual server and the address it needs."""
        before, after = (_address_to_bind(f, self._own) if f else None for f in (old, new))
        if before != after:
            if after is not None:
                self._bound.want(after)
            if before is not None:
                self._bound.release(before)
        served = new or old
        if served is None:
            return
        key = _virtual(served)
        held = self.servers.get(key)
        if new is None:
            self.servers.pop(key, None)
        else:
            self.servers[key] = VirtualServer(self._scheduler, new.affinity_s, dict.fromkeys(_served_pool(new).backends, 1))
        if self.servers.get(key) != held:
            self._changed[key] = self.servers.get(key)

    def _lead(self, key: bytes, new: Frontend, old: Frontend | None) -> None:
        super()._lead(key, new, old)
        if key in self._left:
            self._books[self._left[key]].put(key, pack_number(LEFT))

    def take_servers(self) -> dict[VirtualKey, VirtualServer | None]:
        changed, self._changed = self._changed, {}
        return changed

    def _rules(self) -> dict[str, tuple[Rule, ...]]:
        rules = super()._rules()
        address = Fields(self.family).daddr(0)
        refuse = Rule((address, Lookup(self._ipvs_sets.bound.name, 0), Immediate(goto(REFUSE))), "no such port on this address")
        _, *others = rules["postrouting"]
        if not self._facts.tells_pods(self.family.version):
            rules["rewritten"] = (*rules["rewritten"], self._from_the_device())
        return rules | {
            "inside": (*rules["inside"], refuse),
            "output": (_reset(), *rules["output"]),
            "postrouting": (self._led(), *others),
        }

    def _from_the_device(self) -> Rule:
        """A process of the node that connects to an address of the device has that one as its source, too, unless it chooses
        another. Nobody else knows the way back there (kube-proxy's ipvs mode: "src,dst" of KUBE-CLUSTER-IP)."""
        bound = (Fields(self.family).original_daddr(0), Lookup(self._ipvs_sets.bound.name, 0))
        return Rule((*from_this_machine(), *bound, Masquerade()), "from the node itself, by an address of the device")

    def _led(self) -> Rule:
        """To conntrack, what IPVS leads elsewhere is not "dnat", so each first packet is asked for its original destination.
        What was sent to no frontend is left alone: a connection of the node to its own address is none of a pod to itself."""
        return Rule((*sent_to_a_frontend(self.family), Immediate(jump("rewritten"))), "to a Service")


def _reset() -> Rule:
    """The answer to a connection that a process of the node made to a closed port. The address is the node's own here, and so
    also the client's: the reset would be refused like the connection was, and the process left waiting."""
    flags = (Payload(PayloadBase.TRANSPORT, _TCP_FLAGS, 1, 0), Bitwise(0, 0, _RST, bytes(1)), Cmp(CmpOp.NEQ, 0, bytes(1)))
    return Rule((*is_protocol(_TCP), *flags, Immediate(RETURN)), "the answer to a refused connection")


def _virtual(frontend: Frontend) -> VirtualKey:
    return VirtualKey(frontend.address, frontend.protocol, frontend.port)


def _left_to_ipvs(frontend: Frontend) -> str:
    """The map in which the frontend's packets are left to IPVS; "" where the maps serve it alone."""
    if frontend.kind is FrontendKind.HOST_PORT or frontend.address == LOOPBACK or not _served_pool(frontend).backends:
        return ""
    return "pools" if frontend.outside is None else "local-pools"


def _served_pool(frontend: Frontend) -> Pool:
    return frontend.inside if frontend.outside is None else frontend.outside


def _for_maps(frontend: Frontend, left: str) -> Frontend:
    """What is left for the maps to do. They have nobody for clients outside: those are IPVS', and at 127.0.0.1 there are none.
    So the maps need no memory of such clients, whose number a packet would take along to IPVS and further."""
    if left == "pools":
        return msgspec.structs.replace(frontend, inside=Pool(), affinity_s=0)
    if left == "local-pools" or (frontend.address == LOOPBACK and frontend.outside is not None):
        return msgspec.structs.replace(frontend, outside=Pool())
    return frontend


def _address_to_bind(frontend: Frontend, own: Collection[bytes]) -> bytes | None:
    return None if frontend.address in own or frontend.kind is FrontendKind.NODE_PORT else frontend.address


# --- from what is there to what shall be --------------------------------------------------------------------------


def introduce(wanted: Mapping[VirtualKey, VirtualServer], held: Mapping[VirtualKey, VirtualServer]) -> list[IpvsOp]:
    """What comes, before rules lead there: virtual servers, real ones, weights."""
    ops: list[IpvsOp] = []
    for key, server in wanted.items():
        present = held.get(key)
        if present is None or (present.scheduler, present.persistence_s) != (server.scheduler, server.persistence_s):
            ops.append(SetVirtual(key, server.scheduler, server.persistence_s, new=present is None))
        there = present.servers if present else {}
        for backend, weight in server.servers.items():
            if there.get(backend) != weight:
                ops.append(SetReal(key, backend, weight, new=backend not in there))
    return ops


def retire(
    wanted: Mapping[VirtualKey, VirtualServer],
    held: Mapping[VirtualKey, VirtualServer],
    connections: Mapping[tuple[VirtualKey, Backend], int] | None = None,
) -> list[IpvsOp]:
    """What goes, after rules have stopped to lead there. Real servers that leave keep their connections: they get weight 0, and
    go once they have none (`connections` knows; None: nobody asked). UDP has no end to wait for."""
    ops: list[IpvsOp] = []
    for key, server in held.items():
        wished = wanted[key].servers if key in wanted else {}
        gone = [backend for backend in server.servers if backend not in wished]
        left = len(server.servers)
        for backend in gone:
            idle = connections is not None and connections.get((key, backend), 0) == 0
            if key.protocol == UDP or idle:
                ops.append(DelReal(key, backend))
                left -= 1
            elif server.servers[backend]:
                ops.append(SetReal(key, backend, 0, new=False))
        if key not in wanted and not left:
            ops.append(DelVirtual(key))
    return ops


def after(held: Mapping[VirtualKey, VirtualServer], ops: Iterable[IpvsOp]) -> dict[VirtualKey, VirtualServer]:
    """What the kernel holds once `ops` are done."""
    state = dict(held)
    for op in ops:
        present = state.get(op.key)
        servers = present.servers if present else {}
        match op:
            case SetVirtual(key, scheduler, persistence_s, _):
                state[key] = VirtualServer(scheduler, persistence_s, servers)
            case DelVirtual(key):
                state.pop(key, None)
            case SetReal(key, server, weight, _) if present:
                state[key] = VirtualServer(present.scheduler, present.persistence_s, {**servers, server: weight})
            case DelReal(key, server) if present:
                rest = {b: w for b, w in servers.items() if b != server}
                state[key] = VirtualServer(present.scheduler, present.persistence_s, rest)
    return state


def ours(
    held: Iterable[VirtualKey], planner: IpvsPlanner, observed: Ruleset, bound: Collection[bytes]
) -> frozenset[VirtualKey]:
    """Which virtual servers this program made: IPVS keeps no owner, so the record is our nftables (what they leave to IPVS) and
    our device (`bound`: the addresses on it). All others are left alone."""
    wanted = planner.servers()
    left = set()
    for state in observed.tables.values():
        for name in ("pools", "local-pools"):
            elements = state.sets[name].elements if name in state.sets else {}
            left |= {_virtual_at(key) for key, number in elements.items() if number == pack_number(LEFT)}
    return frozenset(key for key in held if key in wanted or key in left or key.address in bound)


def _virtual_at(key: bytes) -> VirtualKey:
    """A map's key (address . protocol . port) → the virtual server's."""
    return VirtualKey(*place_of(key))
