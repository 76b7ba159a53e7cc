"""`kernel.port.Kernel` in memory. It executes every operation, so that a test can look at the result or send a packet
through it (`testing.fakefabric`). Failures are ordered by name: `fail_next`. What someone else does: `drift`."""

import asyncio
import errno
import socket
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from podwire.kernel.port import KernelError, KernelEvent
from podwire.model.addr import IPAddress
from podwire.model.flow import Flow
from podwire.model.ids import HOST, NetnsName
from podwire.model.kernelstate import Address, FdbEntry, Link, Neighbour, NetState, Route, Veth, Wireguard, WireguardPeer
from podwire.model.nft import Data, NftConflict, NftMissing, NftSet, Ruleset, TableRef
from podwire.model.ops import (
    AddAddress,
    AddLink,
    Applied,
    ChangeLink,
    CommitNft,
    DelAddress,
    DelFdb,
    DelLink,
    DelNeighbour,
    DelRoute,
    DelWireguardPeer,
    Failure,
    Op,
    Plan,
    SetFdb,
    SetNeighbour,
    SetRoute,
    SetShaper,
    SetSysctl,
    SetWireguardPeer,
)
from podwire.testing.fakenetns import FakeNetns, Refused
from podwire.wire.rtnlread import describe_route

_UNSAID = ("link", "fdb")
"""Notices in which Linux does not name who caused them."""


class FakeKernel:
    """A node's kernel. `uplink` is a Device that is there from the start, as a machine's network card is ("": none).

    A pod's namespace is made by its first `attach` and outlives `detach`, as real ones do while a process holds them;
    `destroy` ends it."""

    def __init__(self, uplink: Link | None = None) -> None:
        self._spaces: dict[NetnsName, FakeNetns] = {HOST: FakeNetns(HOST)}
        self._attached: set[NetnsName] = {HOST}
        self._streams: list[FakeEvents] = []
        self._faults: dict[str, deque[tuple[int, str]]] = {}
        self._macs = 0
        self.applied: list[Op] = []
        """Every operation that succeeded, in order."""
        self.commits = Counter[NetnsName]()
        """nftables transactions by namespace."""
        self.listening: dict[tuple[IPAddress, int], int] = {}
        """Ports that were asked for, and the real ones behind them."""
        if uplink is not None:
            self.host.links[uplink.name] = Link(
                uplink.name, uplink.kind, uplink.mtu or 1500, uplink.mac or self._new_mac(), uplink.up, "", False, uplink.alias
            )

    @property
    def host(self) -> FakeNetns:
        return self._spaces[HOST]

    def space(self, ns: NetnsName) -> FakeNetns:
        """The namespace itself, attached or not. Raises KernelError if it was never made."""
        if ns not in self._spaces:
            raise KernelError(f"no network namespace {ns!r}", errno.ENOENT)
        return self._spaces[ns]

    @property
    def namespaces(self) -> dict[NetnsName, FakeNetns]:
        """All there are, attached or not."""
        return dict(self._spaces)

    # --- the port ---------------------------------------------------------------------------------------------

    def attach(self, ns: NetnsName, fd: int) -> None:
        if ns == HOST:
            raise KernelError("the node's own namespace cannot be attached a second time", errno.EINVAL)
        self._spaces.setdefault(ns, FakeNetns(ns))
        self._attached.add(ns)

    def detach(self, ns: NetnsName) -> None:
        if ns != HOST:
            self._attached.discard(ns)

    async def observe(self, ns: NetnsName = HOST) -> NetState:
        return self._attached_space(ns).state()

    async def observe_devices(self, ns: NetnsName = HOST) -> NetState:
        state = self._attached_space(ns).state()
        return NetState(links=state.links, addresses=state.addresses)

    async def observe_wireguard(self, devices: Sequence[str]) -> dict[str, tuple[Wireguard, tuple[WireguardPeer, ...]]]:
        state = self.host.state()
        kinds = {name: link.kind for name, link in state.links.items() if name in devices}
        return {
            name: (kind, tuple(peer for peer in state.wireguard if peer.dev == name))
            for name, kind in kinds.items()
            if isinstance(kind, Wireguard)
        }

    async def observe_nft(self, table: str, ns: NetnsName = HOST) -> Ruleset:
        return self._attached_space(ns).ruleset.only(table)

    async def lookup_nft(self, table: TableRef, of: NftSet, keys: Sequence[bytes]) -> dict[bytes, Data]:
        elements = self._elements(table, of)
        return {key: elements[key] for key in keys if key in elements}

    async def count_nft(self, table: TableRef, of: NftSet) -> dict[bytes, tuple[Data, tuple[int, int]]]:
        return {key: (data, (0, 0)) for key, data in self._elements(table, of).items()}

    def _elements(self, table: TableRef, of: NftSet) -> Mapping[bytes, Data]:
        held = self.host.ruleset.tables.get(table)
        found = held.sets.get(of.name) if held else None
        return found.elements if found else {}

    async def read_sysctl(self, key: str, ns: NetnsName = HOST) -> str:
        return self._attached_space(ns).sysctls.get(key, "")

    async def forget_flows(self, wanted: Callable[[Flow], bool], ns: NetnsName = HOST) -> int:
        space = self._attached_space(ns)
        kept = [flow for flow in space.flows if not wanted(flow)]
        gone = len(space.flows) - len(kept)
        space.flows[:] = kept
        return gone

    async def carries(self, name: str, ns: NetnsName = HOST) -> bool:
        link = self._attached_space(ns).links.get(name)
        return link is not None and link.up

    async def apply(self, plan: Plan) -> Applied:
        await asyncio.sleep(0)  # as the real one, it lets others run
        failures: list[Failure] = []
        for op in plan:
            try:
                self._injected(op)
                self._execute(op, ours=True)
            except Refused as refusal:
                failures.append(Failure(op, refusal.errno, refusal.message))
            else:
                self.applied.append(op)
        return Applied(done=len(plan) - len(failures), failures=tuple(failures))

    async def listen(self, port: int, address: IPAddress) -> socket.socket:
        """On a free port of 127.0.0.1, which `listening` tells."""
        sock = socket.create_server(("127.0.0.1", 0))
        self.listening[address, port] = sock.getsockname()[1]
        return sock

    def events(self) -> "FakeEvents":
        stream = FakeEvents()
        self._streams.append(stream)
        return stream

    async def close(self) -> None:
        for stream in self._streams:
            stream.close()
        self._streams.clear()

    # --- what tests add -----------------------------------------------------------------------------------------

    def fail_next(self, op: str, code: int = errno.ENOBUFS, *, message: str = "injected", times: int = 1) -> None:
        """Refuse the next `times` operations of the class named `op` ("SetRoute", "CommitNft", …) with errno `code`."""
        self._faults.setdefault(op, deque()).extend([(code, message)] * times)

    def drift(self, *ops: Op) -> None:
        """Execute as someone else would: the events say that it was not us. Raises Refused where Linux would."""
        for op in ops:
            self._execute(op, ours=False)

    def destroy(self, ns: NetnsName) -> None:
        """End a pod's namespace, as when its last process goes: the other ends of its veths go too."""
        space = self._spaces.pop(ns, None)
        self._attached.discard(ns)
        if space is not None:
            before = set(self.host.links)
            space.destroy()
            for name in sorted(before - set(self.host.links)):
                self._tell(KernelEvent(HOST, "link", name, removed=True))

    # --- execution ------------------------------------------------------------------------------------------------

    def _attached_space(self, ns: NetnsName) -> FakeNetns:
        if ns not in self._attached:
            raise KernelError(f"no network namespace {ns!r} is attached", errno.ENOENT)
        return self._spaces[ns]

    def _injected(self, op: Op) -> None:
        waiting = self._faults.get(type(op).__name__)
        if waiting:
            raise Refused(*waiting.popleft())

    def _execute(self, op: Op, *, ours: bool) -> None:
        if op.ns not in self._attached:
            raise Refused(errno.ENOENT, f"no network namespace {op.ns!r} is attached")
        space = self._spaces[op.ns]
        before = self.host.state() if self._streams else None
        if isinstance(op, AddLink):
            self._add_link(space, op)
        else:
            _run(space, op)
        if isinstance(op, CommitNft):
            self.commits[op.ns] += 1
        if before is not None:
            self._notify(op, before, ours)

    def _add_link(self, space: FakeNetns, op: AddLink) -> None:
        if not isinstance(op.link.kind, Veth):
            space.add_link(op.link, self._new_mac())
            return
        other_ns = op.link.kind.peer_ns
        if other_ns not in self._attached:
            raise Refused(errno.ENOENT, f"no network namespace {other_ns!r} is attached")
        other = self._spaces[other_ns]
        end = op.peer or Link(op.link.kind.peer, Veth(), up=False)
        space.check_new(op.link)
        other.check_new(end)
        space.add_link(op.link, self._new_mac())
        other.add_link(end, self._new_mac())
        space.join(op.link.name, other, end.name)

    def _new_mac(self) -> str:
        self._macs += 1
        return (b"\x02\xfa" + self._macs.to_bytes(4, "big")).hex(":")

    def _notify(self, op: Op, before: NetState, ours: bool) -> None:
        if ours and isinstance(op, CommitNft):
            return
        for what, subject, removed in _changes(op, before, self.host.state()):
            self._tell(KernelEvent(HOST, what, subject, removed, ours=ours and what not in _UNSAID))

    def _tell(self, event: KernelEvent) -> None:
        for stream in self._streams:
            stream.put(event)


class FakeEvents:
    """The changes of HOST since it was made."""

    def __init__(self) -> None:
        self._ready: deque[KernelEvent] = deque()
        self._wake = asyncio.Event()
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> KernelEvent:
        while not self._ready:
            if self._closed:
                raise StopAsyncIteration
            self._wake.clear()
            await self._wake.wait()
        return self._ready.popleft()

    def put(self, event: KernelEvent) -> None:
        if not self._closed:
            self._ready.append(event)
            self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    async def aclose(self) -> None:
        self.close()


def _run(space: FakeNetns, op: Op) -> None:
    match op:
        case ChangeLink(link=link):
            space.change_link(link)
        case DelLink(name=name):
            if name in space.links:
                space.del_link(name)
        case AddAddress(address=address):
            space.add_address(address)
        case DelAddress(address=address):
            space.del_address(address)
        case SetRoute(route=route):
            space.set_route(route)
        case DelRoute(route=route):
            space.del_route(route)
        case SetNeighbour(neighbour=neighbour):
            space.set_neighbour(neighbour)
        case DelNeighbour(neighbour=neighbour):
            space.del_neighbour(neighbour)
        case SetFdb(entry=entry):
            space.set_fdb(entry)
        case DelFdb(entry=entry):
            space.del_fdb(entry)
        case SetWireguardPeer(peer=peer):
            space.set_wireguard_peer(peer)
        case DelWireguardPeer(peer=peer):
            space.del_wireguard_peer(peer)
        case SetShaper(dev=dev, shaper=shaper):
            space.set_shaper(dev, shaper)
        case SetSysctl(key=key, value=value):
            space.set_sysctl(key, value)
        case CommitNft(batch=batch):
            try:
                space.ruleset = space.ruleset.apply(batch)
            except NftConflict as conflict:
                code = errno.ENOENT if isinstance(conflict, NftMissing) else errno.EINVAL
                raise Refused(code, str(conflict)) from conflict
        case AddLink():
            raise AssertionError("AddLink concerns two namespaces")


def _changes(op: Op, before: NetState, after: NetState) -> list[tuple[str, str, bool]]:
    """(what, subject, removed) of everything that differs."""
    if isinstance(op, CommitNft) and op.ns == HOST:
        tables = sorted({str(command.table.name) for command in op.batch.commands})
        return [("nft", f"element in table {name}", False) for name in tables]
    found: list[tuple[str, str, bool]] = [
        ("sysctl", f"{key} is {value}", False) for key, value in after.sysctls.items() if before.sysctls.get(key) != value
    ]
    if before.links != after.links:
        found += [("link", name, True) for name in before.links if name not in after.links]
        found += [("link", name, False) for name, link in after.links.items() if before.links.get(name) != link]
    pairs = (
        ("address", before.addresses, after.addresses),
        ("route", before.routes, after.routes),
        ("neighbour", before.neighbours, after.neighbours),
        ("fdb", before.fdb, after.fdb),
    )
    for what, old, new in pairs:
        if old != new:
            found += [(what, _subject(item), True) for item in old - new]
            found += [(what, _subject(item), False) for item in new - old]
    return found


def _subject(item: object) -> str:
    match item:
        case Address():
            return f"{item.interface} on {item.dev}"
        case Route():
            return describe_route(item)
        case Neighbour():
            return f"{item.ip} is {item.mac} on {item.dev}"
        case FdbEntry():
            return f"{item.mac} → {item.dst} on {item.dev}"
        case _:
            return str(item)
