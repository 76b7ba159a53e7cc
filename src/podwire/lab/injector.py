"""Faults in a running lab: cutting and slowing cables, stopping machines, removing what agents have programmed; and healing."""

import asyncio
import itertools
import logging
from collections.abc import Iterable, Mapping
from typing import Protocol

from podwire.kernel.netns import off_loop
from podwire.kernel.rtnlsocket import RtnlSocket
from podwire.lab.errors import LabError
from podwire.lab.fabric import Fabric, check
from podwire.lab.faults import Fault, FaultKind, amount, cut_off, plan_rules
from podwire.lab.topology import API, UPLINK, Place
from podwire.model.addr import Family
from podwire.model.errors import Unsupported
from podwire.model.kernelstate import Device, Link, NetState
from podwire.model.nft import Batch, DelTable
from podwire.model.ops import ChangeLink, CommitNft, DelFdb, DelLink, DelNeighbour, DelRoute, Op, SetSysctl
from podwire.plan.services import TABLE
from podwire.wire import netem, rtnl, rtnlread

log = logging.getLogger(__name__)

REMOVABLE = ("routes", "neighbours", "fdb", "rules", "switches", "devices")
"""What `remove` takes away, of what an agent has programmed on its node; anything else is a device's name."""


class Machine(Protocol):
    """What runs at a place and can be stopped like a machine whose power is cut."""

    @property
    def place(self) -> Place: ...

    @property
    def loses_cable(self) -> bool:
        """Whether it is the whole machine that stops; if not, only its process is killed."""
        ...

    async def stop(self) -> None: ...

    def start(self) -> None: ...


class FaultInjector:
    """The faults that are in force. `machines`: by name, as they are at any time; they come and go."""

    def __init__(self, fabric: Fabric, *machines: Mapping[str, Machine]) -> None:
        self._fabric, self._machines = fabric, machines
        self._active: list[Fault] = []
        self._busy = asyncio.Lock()

    @property
    def active(self) -> tuple[Fault, ...]:
        return tuple(self._active)

    @property
    def stopped(self) -> frozenset[str]:
        """The machines that are without power."""
        return frozenset(_stopped(self._active))

    async def add(self, fault: Fault) -> None:
        """Put a fault in force, beside those that are; one that is already stays as it is. Raises LabError, Unsupported."""
        async with self._busy:
            for name in (*fault.places, *fault.others):
                self._fabric.place(name)
            if fault.kind is FaultKind.DELAY and any(self._fabric.place(name).at_bridge for name in fault.places):
                raise LabError(f"{API} has no cable of its own to be slow: delay the places that speak to it")
            if fault.kind is FaultKind.STOP:
                for name in fault.places:
                    self._machine(name)
            if fault in self._active:
                return
            wanted = [*self._active, fault]
            await self._apply(wanted)
            self._active = wanted
            log.warning("fault: %s", fault)

    async def heal(self, names: Iterable[str] = ()) -> int:
        """End the faults that concern one of `names`; of none: all. Returns how many. Raises LabError."""
        async with self._busy:
            chosen = set(names)
            for name in chosen:
                self._fabric.place(name)
            kept = [f for f in self._active if chosen and not chosen & {*f.places, *f.others}]
            ended = len(self._active) - len(kept)
            await self._apply(kept)
            self._active = kept
            log.warning("faults: %d healed, %d in force", ended, len(kept))
            return ended

    async def remove(self, name: str, what: str) -> int:
        """Take away what the agent of node `name` has programmed, as a stranger would: a kind of REMOVABLE, or a device.

        Returns how many things went. Raises LabError."""
        place = self._machine(name).place
        kernel = self._fabric.kernel
        ops = tuple(_removal(place, await kernel.observe(place.netns), what))
        if what == "rules":
            held = await kernel.observe_nft(TABLE, place.netns)
            ops = (CommitNft(Batch(tuple(DelTable(ref) for ref in held.tables)), place.netns),) if held.tables else ()
        if not ops:
            raise LabError(
                f"{name} has no {what} of an agent's: name one of {', '.join(REMOVABLE)}, or a device of the agent's"
            )
        check(await kernel.apply(ops), f"removing {what} from {name}")
        log.warning("fault: %s removed from %s (%d)", what, name, len(ops))
        return len(ops)

    def forget(self, name: str) -> None:
        """A place is gone for good, and its part in every fault."""
        left = [_without(fault, name) for fault in self._active]
        self._active = [fault for fault in left if fault is not None]

    # --- inside -------------------------------------------------------------------------------------------------------

    async def _apply(self, wanted: list[Fault]) -> None:
        everybody = {name: self._fabric.place(name) for name in self._fabric.places()}
        for name, place in everybody.items():
            await self._delay(place, amount(FaultKind.DELAY, name, self._active), amount(FaultKind.DELAY, name, wanted))
        batches = [
            CommitNft(batch, place.netns)
            for name, place in everybody.items()
            if (batch := self._rules(place, wanted)) != self._rules(place, self._active)
        ]
        check(await self._fabric.kernel.apply(tuple(batches)), "the faults")
        before, after = _stopped(self._active), _stopped(wanted)
        for name in sorted(after - before):
            await self._machine(name).stop()
            if self._machine(name).loses_cable:
                await self._cable(everybody[name], up=False)
        for name in sorted(before - after):
            if self._machine(name).loses_cable:
                await self._cable(everybody[name], up=True)
            self._machine(name).start()

    def _rules(self, place: Place, faults: list[Fault]) -> Batch:
        cut = cut_off(place.name, faults, self._fabric.places())
        return plan_rules(place, [self._fabric.place(name) for name in cut], amount(FaultKind.DROP, place.name, faults))

    async def _cable(self, place: Place, *, up: bool) -> None:
        port = ChangeLink(Link(place.name, Device(), up=up))
        check(await self._fabric.kernel.apply((port,)), f"the cable of {place.name}")

    async def _delay(self, place: Place, before: float, after: float) -> None:
        """At both ends of the cable, so that each way takes `after` milliseconds longer."""
        if before == after:
            return
        node = self._fabric.descriptor(place.name)
        for descriptor, device in ((node, UPLINK), (self._fabric.own_descriptor, place.name)):
            await off_loop(lambda fd=descriptor, name=device: set_delay(fd, name, after))  # type: ignore[misc]

    def _machine(self, name: str) -> Machine:
        for machines in self._machines:
            if name in machines:
                return machines[name]
        known = ", ".join(itertools.chain.from_iterable(self._machines))
        raise LabError(f"{name} cannot be stopped or damaged: machines are {known}")


def set_delay(fd: int, device: str, milliseconds: float) -> None:
    """Hold back what leaves a device of the namespace behind `fd`; 0: no longer. Blocks. Raises Unsupported without netem."""
    sock = RtnlSocket(fd)
    try:
        index = rtnlread.read_link(sock.execute([rtnl.get_link(device)]).answers[0]).index
        request = netem.set_delay(index, milliseconds / 1000) if milliseconds else netem.remove_delay(index)
        outcome = sock.execute([request])
    finally:
        sock.close()
    for ack in outcome.errors.values():
        if milliseconds:
            reason = ack.message or f"error {ack.errno}"
            raise Unsupported(f"what delays packets (the netem queue: {reason})", "run `sudo modprobe sch_netem`")


def _stopped(faults: Iterable[Fault]) -> set[str]:
    return {name for fault in faults if fault.kind is FaultKind.STOP for name in fault.places}


def _without(fault: Fault, name: str) -> Fault | None:
    places = tuple(place for place in fault.places if place != name)
    others = tuple(place for place in fault.others if place != name)
    return Fault(fault.kind, places, others, fault.amount) if places and (others or not fault.others) else None


def _removal(place: Place, state: NetState, what: str) -> list[Op]:
    ns = place.netns
    ours = {name for name, link in state.links.items() if link.owned}
    match what:
        case "routes":
            return [DelRoute(route, ns) for route in state.routes]
        case "neighbours":
            return [DelNeighbour(entry, ns) for entry in state.neighbours if entry.dev in ours]
        case "fdb":
            return [DelFdb(entry, ns) for entry in state.fdb if entry.dev in ours]
        case "switches":
            off = {Family.IPV4: "net/ipv4/ip_forward", Family.IPV6: "net/ipv6/conf/all/forwarding"}
            return [SetSysctl(off[family], "0", ns) for family in place.addresses]
        case "devices":
            return [DelLink(name, ns) for name in sorted(ours)]
        case _:
            return [DelLink(what, ns)] if what in ours else []
