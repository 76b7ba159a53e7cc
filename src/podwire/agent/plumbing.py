"""What the node's namespace shall hold, unit by unit, and the one place that makes the kernel hold it.

A change costs its unit: the unit's old value stands in for the observed one. Whatever fails is looked at for real
(observe, diff, apply) once more before it counts as failed; `check` compares everything with the kernel.
"""

import asyncio
import logging
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from podwire.agent.switches import RefusedSwitches
from podwire.kernel.port import Kernel, KernelError, KernelEvent
from podwire.kernel.syscalls import release_memory
from podwire.model.errors import PodwireError
from podwire.model.ids import HOST, NetnsName, pod_netns
from podwire.model.kernelstate import OWNER_ALIAS, Bridge, Device, Link, NetState, Veth, Wireguard
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
from podwire.plan.diff import EMPTY, diff, restrict, same_kind
from podwire.plan.naming import BRIDGE, host_veth
from podwire.plan.node import Unit, union, union_units
from podwire.plan.podlinks import PodAttachment, fresh_pod_namespace, plan_pod

log = logging.getLogger(__name__)

_REMOVALS = (DelAddress, DelFdb, DelLink, DelNeighbour, DelRoute, DelWireguardPeer)

CARRIER_SECONDS = 1.0
ECHO_SECONDS = 0.5
"""How long after a change of ours the kernel may still tell about it (carrier, operational state, a bridge's ports)."""


MANY_PEERS = 1000


class PlumbingError(PodwireError):
    """The kernel refused part of a change, also after looking again."""

    def __init__(self, what: str, failures: Collection[Failure]) -> None:
        self.failures = tuple(failures)
        first = "; ".join(f"{describe(f.op)}: {f.message or os.strerror(f.errno)}" for f in self.failures[:3])
        more = f" and {len(self.failures) - 3} more" if len(self.failures) > 3 else ""
        super().__init__(f"{what}: the kernel refused {first}{more}")


@dataclass(frozen=True, slots=True)
class _PodUnit:
    """`inode` is not 0 for a container engine's namespace: its number, since another may be at that path one day. Other
    things in it are not ours to judge."""

    unit: Unit
    netns: str
    inode: int = 0

    @property
    def shared(self) -> bool:
        return self.inode != 0


class EnginePod(NamedTuple):
    """A container engine's pod: where its namespace is said to be, and the namespace's number."""

    pod: PodAttachment
    netns: str
    inode: int


class Plumbing:
    """The node's links, addresses, routes and neighbours. Methods may be called from many tasks; changes are applied one
    after the other."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._base = EMPTY
        self._peers: dict[str, NetState] = {}
        self._pods: dict[str, _PodUnit] = {}
        self._leaving: dict[str, asyncio.Future[None]] = {}
        self._busy = asyncio.Lock()
        self._touched: dict[tuple[str, bool], float] = {}
        """What we changed lately, as `_echoes` has it, and when (event loop's time)."""
        self._forgetting = False
        self._switches = RefusedSwitches()

    @property
    def refused_sysctls(self) -> dict[str, str]:
        """Switches that this kernel does not have or does not let us set, with its words."""
        return self._switches.words

    @property
    def pods(self) -> frozenset[str]:
        """Uids of the pods that are plumbed."""
        return frozenset(self._pods)

    def expects(self, event: KernelEvent) -> bool:
        """Whether what the kernel tells follows from a change of our own, as far as one can know: it names the maker of
        routes and neighbours, but not of links and forwarding entries."""
        if event.ours or (event.what == "address" and event.subject.startswith("fe80:")):
            return True
        if event.what == "neighbour" and event.removed:
            return not self._concerns_us(event.subject)
        if event.what not in ("link", "fdb", "sysctl"):
            return False
        subject = event.subject if event.what == "fdb" else event.subject.partition(" ")[0]
        since = self._touched.get((subject, event.removed))
        return since is not None and asyncio.get_running_loop().time() - since < ECHO_SECONDS

    def _concerns_us(self, neighbour: str) -> bool:
        """Whether a neighbour that went, or was learnt (`<ip> is <mac> on <device>`), may have been one of our entries."""
        ip, device = neighbour.partition(" is ")[0], neighbour.rpartition(" on ")[2]
        link = self._base.links.get(device)
        if link is None or isinstance(link.kind, Device):
            return False
        if not isinstance(link.kind, Bridge):
            return True
        return any(str(entry.ip) == ip for pod in self._pods.values() for entry in pod.unit[HOST].neighbours)

    def _touch(self, plan: Plan) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        for op in plan:
            for key in _echoes(op):
                self._touched[key] = now
        if self._touched and not self._forgetting:
            self._forgetting = True
            loop.call_later(2 * ECHO_SECONDS, self._forget)

    def _forget(self) -> None:
        """Let go of what cannot echo any more: with thousands of peers that is a megabyte."""
        loop = asyncio.get_running_loop()
        recent = loop.time() - ECHO_SECONDS
        self._touched = {key: at for key, at in self._touched.items() if at > recent}
        self._forgetting = bool(self._touched)
        if self._forgetting:
            loop.call_later(2 * ECHO_SECONDS, self._forget)

    async def try_switches(self, switches: Mapping[str, str]) -> Mapping[str, str]:
        """Set what can be set; returns what the kernel refused, with its words."""
        async with self._busy:
            applied = await self._kernel.apply(tuple(SetSysctl(key, value) for key, value in switches.items()))
        return {f.op.key: f.message for f in applied.failures if isinstance(f.op, SetSysctl)}

    async def adopt(
        self,
        base: NetState,
        peers: Mapping[str, NetState],
        pods: Iterable[tuple[PodAttachment, str]],
        engines: Iterable[EnginePod] = (),
        *,
        remove: bool = True,
    ) -> Mapping[str, str]:
        """Take the node over as it is and make it what it shall be: what is right already stays untouched.

        `pods` come with the path of their namespace; `engines` are those of container engines, whose paths may be out of
        sight: while the node's end of the link stands, they live. `remove`: False while it is not known yet what else belongs
        to the node: what is missing is made, and all that is there stays. Returns, by uid, the pods that could not be adopted,
        and why; raises PlumbingError where the base or a peer could not be had."""
        lost: dict[str, str] = {}
        async with self._busy:
            self._base = base
            self._peers = {node: unit for node, unit in peers.items() if unit != EMPTY}
            self._pods = {pod.uid: _PodUnit(plan_pod(pod), netns) for pod, netns in pods}
            self._pods |= {pod.uid: _PodUnit(plan_pod(pod), netns, inode) for pod, netns, inode in engines}
            observed = await self._kernel.observe()
            attached = [uid for uid, pod in self._pods.items() if self._attach(uid, pod.netns, pod.inode)]
            for uid in self._pods.keys() - set(attached):
                pod = self._pods[uid]
                if not pod.shared or not _stands(uid, pod, observed):
                    del self._pods[uid]
                    lost[uid] = "its network namespace is gone"
            try:
                _, failures = await self._reconcile(attached, observed, remove=remove)
            finally:
                for uid in attached:
                    self._kernel.detach(pod_netns(uid))
            for uid, its in self._blame_engines(failures).items():
                del self._pods[uid]
                lost[uid] = str(PlumbingError(uid, its))
                failures = tuple(failure for failure in failures if failure not in its)
        if failures:
            raise PlumbingError("adopting the node", failures)
        return lost

    async def set_base(self, base: NetState) -> None:
        """The node's own part changes (it has other subnets now). Raises PlumbingError; the wish stands nevertheless."""
        async with self._busy:
            old, self._base = self._base, base
            failures = await self._change({HOST: base}, {HOST: old})
        if failures:
            raise PlumbingError("the node's own network", failures)

    async def set_peers(self, peers: Mapping[str, NetState]) -> None:
        """How to reach the pods of these nodes from now on; EMPTY: not at all. Raises PlumbingError; the wish stands
        nevertheless."""
        async with self._busy:
            old = [unit for node in peers if (unit := self._peers.get(node))]
            new = list(peers.values())
            for node, unit in peers.items():
                if unit != EMPTY:
                    self._peers[node] = unit
                else:
                    self._peers.pop(node, None)
            failures = await self._change({HOST: union(new)}, {HOST: union(old)})
        if failures:
            raise PlumbingError(f"peers {', '.join(sorted(peers))}", failures)

    async def plumb(self, pod: PodAttachment, netns: str, *, engine_path: str | None = None) -> None:
        """Join the pod, whose namespace is at path `netns`, to the node. Raises PlumbingError; nothing is left then.

        `engine_path`: the namespace is a container engine's, to be found there later (`netns` may be good for now only)."""
        unit = plan_pod(pod)
        label = pod_netns(pod.uid)
        async with self._busy:
            inode = os.stat(netns).st_ino if engine_path is not None else 0
            if not self._attach(pod.uid, netns, inode):
                raise PlumbingError(f"pod {pod.namespace}/{pod.name}: its network namespace {netns} is gone", ())
            try:
                failures = await self._change(unit, {label: fresh_pod_namespace()})
                if failures:
                    await self._change({}, {HOST: unit[HOST]})
                    raise PlumbingError(f"pod {pod.namespace}/{pod.name}", failures)
                self._pods[pod.uid] = _PodUnit(unit, netns if engine_path is None else engine_path, inode)
            finally:
                self._kernel.detach(label)
        await self._await_carrier(host_veth(pod.uid))

    async def _await_carrier(self, name: str) -> None:
        """A packet sent before the link carries is lost, and a connection's first is not sent again for a second."""
        try:
            async with asyncio.timeout(CARRIER_SECONDS):
                while not await self._kernel.carries(name):  # noqa: ASYNC110  # a few milliseconds, in the kernel
                    await asyncio.sleep(0.001)
        except TimeoutError:
            log.warning("link %s does not carry packets %g s after it was made; going on", name, CARRIER_SECONDS)

    async def unplumb(self, uid: str) -> None:
        """Remove the pod's link, whatever state it is in; also one that an earlier agent made. Raises PlumbingError.

        Those that are asked for while one change is being made go together in the next."""
        done = self._leaving.setdefault(uid, asyncio.get_running_loop().create_future())
        async with self._busy:
            if self._leaving.get(uid) is done:
                leaving, self._leaving = self._leaving, {}
                try:
                    await self._unplumb_together(leaving)
                finally:
                    _settle(leaving, KernelError("the removal of links was interrupted"))
        await asyncio.shield(done)

    async def _unplumb_together(self, leaving: Mapping[str, asyncio.Future[None]]) -> None:
        known = {uid: pod for uid in leaving if (pod := self._pods.pop(uid, None))}
        old = [pod.unit[HOST] for pod in known.values()]
        try:
            if len(known) < len(leaving):
                strays = union(_stray(uid) for uid in leaving.keys() - known.keys())
                old.append(_claimed(restrict(await self._kernel.observe(), strays)))
            failures = await self._change({}, {HOST: union(old)})
        except KernelError as error:
            self._pods |= known
            _settle(leaving, error)
            return
        refused = {failure.op.name: failure for failure in failures if isinstance(failure.op, DelLink)}
        for uid, done in leaving.items():
            if host_veth(uid) in refused:
                _settle({uid: done}, PlumbingError(f"pod {uid}", [refused[host_veth(uid)]]))
            else:
                done.set_result(None)

    async def compare(self, uid: str, netns: str, *, repair: bool) -> tuple[str, ...]:
        """What of a plumbed pod's link is not as it was left, as words; empty: nothing. With `repair` it is put back.

        `netns`: a path to the pod's namespace. Raises PlumbingError where it is gone, or something cannot be put back."""
        async with self._busy:
            pod = self._pods[uid]
            if not self._attach(uid, netns, pod.inode):
                raise PlumbingError(f"pod {uid}: its network namespace {netns} is gone", ())
            try:
                seen = {ns: restrict(await self._kernel.observe(ns), wanted) for ns, wanted in pod.unit.items()}
                plan = self._switches.worth_trying(diff(pod.unit, seen))
                failures = await self._carry_out(plan) if plan and repair else ()
            finally:
                self._kernel.detach(pod_netns(uid))
        if failures:
            raise PlumbingError(f"pod {uid}", failures)
        return tuple(describe(op) for op in plan)

    async def remove_foreign(self, uid: str, netns: int, device: str) -> None:
        """Remove a link that another plugin made, from within the namespace behind the descriptor. Raises PlumbingError."""
        label = pod_netns(uid)
        async with self._busy:
            self._kernel.attach(label, netns)
            try:
                applied = await self._execute((DelLink(device, label),))
            finally:
                self._kernel.detach(label)
        if applied.failures:
            raise PlumbingError(f"pod {uid}", applied.failures)

    def let_go(self) -> None:
        """Give back the memory that a comparison of everything took, where that is megabytes."""
        if len(self._peers) >= MANY_PEERS:
            release_memory()

    async def check(self) -> Plan:
        """Compare all with the kernel and put back what is missing; returns the operations that did it.

        Raises PlumbingError where something could not be put back."""
        async with self._busy:
            observed = await self._kernel.observe()
            broken = [uid for uid, pod in self._pods.items() if not _stands(uid, pod, observed)]
            attached = [uid for uid in broken if self._attach(uid, self._pods[uid].netns, self._pods[uid].inode)]
            try:
                repaired, failures = await self._reconcile(attached, observed, without=set(broken) - set(attached))
            finally:
                for uid in attached:
                    self._kernel.detach(pod_netns(uid))
        for uid, its in self._blame_engines(failures).items():
            log.warning("%s", PlumbingError(uid, its))
            failures = tuple(failure for failure in failures if failure not in its)
        if failures:
            raise PlumbingError("repair", failures)
        return repaired

    @property
    def untold(self) -> tuple[str, ...]:
        """Devices whose settings somebody can change without the kernel telling of it: WireGuard's, with their peers."""
        return tuple(name for name, link in self._base.links.items() if isinstance(link.kind, Wireguard))

    async def untold_changed(self) -> bool:
        """Whether somebody has changed them: a look at these devices alone."""
        async with self._busy:
            found = await self._kernel.observe_wireguard(self.untold)
            wanted = [peer for unit in (self._base, *self._peers.values()) for peer in unit.wireguard]
        kinds = {name: kind for name, (kind, _) in found.items()}
        if kinds != {name: self._base.links[name].kind for name in self.untold}:
            return True
        there = {(peer.dev, peer.public_key): peer for _, peers in found.values() for peer in peers}
        return len(there) != len(wanted) or any(
            (other := there.get((peer.dev, peer.public_key))) is None
            or (other.allowed, other.keepalive, other.psk) != (peer.allowed, peer.keepalive, peer.psk)
            for peer in wanted
        )

    # --- inside: the lock is held ---------------------------------------------------------------------------------

    async def _reconcile(
        self,
        uids: Collection[str],
        observed: NetState | None = None,
        without: Collection[str] = (),
        *,
        remove: bool = True,
    ) -> tuple[Plan, tuple[Failure, ...]]:
        """Full comparison of HOST and of the namespaces of the pods `uids`, which are attached. Pods in `without` are left
        out: their namespace is gone, and the runtime will say so."""
        desired = self._desired(uids, without)
        seen = {HOST: observed or await self._kernel.observe()}
        self._switches.devices(seen[HOST].links)
        for uid in uids:
            there, pod = await self._kernel.observe(pod_netns(uid)), self._pods[uid]
            seen[pod_netns(uid)] = restrict(there, pod.unit[pod_netns(uid)]) if pod.shared else there
        plan = self._switches.worth_trying(diff(desired, seen))
        if not remove:
            plan = tuple(op for op in plan if not isinstance(op, _REMOVALS))
        if not plan:
            return (), ()
        failures = await self._carry_out(plan)
        blocked = [f.op for f in failures if isinstance(f.op, SetRoute)]
        if blocked:
            again = await self._carry_out(tuple(op for refused in blocked for op in _in_place_of_another(refused)))
            failures = tuple(f for f in failures if f.op not in blocked) + again
        return plan, failures

    def _blame_engines(self, failures: Iterable[Failure]) -> dict[str, list[Failure]]:
        """The failures by container of an engine: what happens to its namespace is not in our hands, and no reason for the
        node to be without network."""
        owners = {key: uid for uid, pod in self._pods.items() if pod.shared for key in (host_veth(uid), pod_netns(uid))}
        blamed: dict[str, list[Failure]] = {}
        for failure in failures:
            op = failure.op
            uid = owners.get(op.ns)
            if isinstance(op, AddLink | ChangeLink):
                uid = uid or owners.get(op.link.name)
            if uid is not None:
                blamed.setdefault(uid, []).append(failure)
        return blamed

    def _desired(self, uids: Collection[str], without: Collection[str]) -> Unit:
        units: list[Unit] = [{HOST: self._base}]
        units += [{HOST: unit} for unit in self._peers.values()]
        for uid, pod in self._pods.items():
            if uid not in without:
                units.append(pod.unit if uid in uids else {HOST: pod.unit[HOST]})
        return union_units(units)

    async def _change(self, new: Unit, old: Mapping[NetnsName, NetState]) -> tuple[Failure, ...]:
        """From one value of some units to another; if the kernel refuses, from what is really there."""
        plan = self._switches.worth_trying(diff(new, old))
        if not plan:
            return ()
        failures = await self._carry_out(plan)
        if not failures:
            return ()
        log.info("looking again after: %s", "; ".join(f"{describe(f.op)}: {f.message}" for f in failures[:3]))
        seen: dict[NetnsName, NetState] = {}
        for ns in new.keys() | old.keys():
            wanted, had = new.get(ns, EMPTY), old.get(ns, EMPTY)
            there = await self._kernel.observe(ns)
            seen[ns] = there if ns != HOST else _claimed(restrict(there, union([wanted, had])))
        again = self._switches.worth_trying(diff(new, seen))
        return await self._carry_out(again) if again else ()

    async def _carry_out(self, plan: Plan) -> tuple[Failure, ...]:
        return self._switches.note(plan, await self._execute(plan))

    async def _execute(self, plan: Plan) -> Applied:
        self._touch(plan)
        try:
            return await self._kernel.apply(plan)
        finally:
            self._touch(plan)

    def _attach(self, uid: str, netns: str, inode: int) -> bool:
        """Whether the namespace is there, and (with `inode`) is the one that is meant."""
        try:
            fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            if inode and os.fstat(fd).st_ino != inode:
                return False
            self._kernel.attach(pod_netns(uid), fd)
        finally:
            os.close(fd)
        return True


def kind_of(op: Op) -> str:
    """What kind of thing an operation is about, as the label `kind` of the metric of repairs."""
    match op:
        case AddLink() | DelLink():
            return "device"
        case ChangeLink() | SetShaper():
            return "device-setting"
        case AddAddress() | DelAddress():
            return "address"
        case SetRoute() | DelRoute():
            return "route"
        case SetNeighbour() | DelNeighbour():
            return "neighbour"
        case SetFdb() | DelFdb():
            return "fdb"
        case SetSysctl():
            return "sysctl"
        case CommitNft():
            return "rules"
        case _:
            return "tunnel-peer"


def describe(op: Op) -> str:
    """An operation in few words, for a log line."""
    match op:
        case AddLink(link=link) | ChangeLink(link=link):
            return f"link {link.name}"
        case DelLink(name=name):
            return f"stray link {name}"
        case AddAddress(address=address):
            return f"address {address.interface} on {address.dev}"
        case DelAddress(address=address):
            return f"stray address {address.interface} on {address.dev}"
        case SetRoute(route=route):
            return f"route {route.dst}"
        case DelRoute(route=route):
            return f"stray route {route.dst}"
        case SetNeighbour(neighbour=entry):
            return f"neighbour {entry.ip} on {entry.dev}"
        case DelNeighbour(neighbour=entry):
            return f"stray neighbour {entry.ip} on {entry.dev}"
        case SetFdb(entry=forward):
            return f"forwarding entry {forward.mac} to {forward.dst} on {forward.dev}"
        case DelFdb(entry=forward):
            return f"stray forwarding entry {forward.mac} on {forward.dev}"
        case SetWireguardPeer(peer=peer):
            return f"WireGuard peer {peer.public_key} on {peer.dev}"
        case DelWireguardPeer(peer=peer):
            return f"stray WireGuard peer {peer.public_key} on {peer.dev}"
        case SetShaper(dev=dev):
            return f"bandwidth limit of {dev}"
        case SetSysctl(key=key, value=value):
            return f"{key}={value}"
        case CommitNft():
            return "nftables rules"


def _stray(uid: str) -> NetState:
    """The key of a pod's link, for one of which nothing else is known."""
    name = host_veth(uid)
    return NetState(links={name: Link(name, Veth())})


def _in_place_of_another(op: SetRoute) -> Plan:
    """The same in two steps: IPv6 does not replace a route that leads elsewhere by one whose gateway lies behind it, as a
    peer's does (`ip6_route_check_nh_onlink`). Protocol 0 is anybody's: we would have replaced it anyway."""
    return DelRoute(replace(op.route, protocol=0), op.ns), op


def _claimed(mine: NetState) -> NetState:
    """Links of ours by name, with our mark: an agent that was killed between making a link and marking it left none."""
    marked = {
        name: replace(link, alias=OWNER_ALIAS) if isinstance(link.kind, Veth) and not link.alias else link
        for name, link in mine.links.items()
    }
    return replace(mine, links=marked)


def _echoes(op: Op) -> tuple[tuple[str, bool], ...]:
    """What the kernel will tell about an operation without saying that it was ours, and whether something goes."""
    match op:
        case AddLink(link=link) | ChangeLink(link=link):
            return (link.name, False), (link.master or BRIDGE, False)
        case DelLink(name=name):
            return (name, False), (name, True), (BRIDGE, False)
        case SetFdb(entry=entry):
            return ((f"{entry.mac} → {entry.dst} on {entry.dev}", False),)
        case DelFdb(entry=entry):
            return ((f"{entry.mac} → {entry.dst} on {entry.dev}", True),)
        case SetSysctl(key=key):
            return ((key, False),)
        case _:
            return ()


def _settle(waiting: Mapping[str, asyncio.Future[None]], error: Exception) -> None:
    """Fail those that have no outcome yet."""
    for done in waiting.values():
        if not done.done():
            done.set_exception(error)
            done.exception()  # whoever waits for it may have been cancelled


def link_stands(uid: str, observed: NetState) -> bool:
    """Whether there is a node's end for the pod's link; it goes with the pod's namespace."""
    link = observed.links.get(host_veth(uid))
    return link is not None and link.owned


def _stands(uid: str, pod: _PodUnit, observed: NetState) -> bool:
    """Whether the node's end of the pod's link is there; if not, the pod's end is gone too and is made from its namespace."""
    name = host_veth(uid)
    link = observed.links.get(name)
    return link is not None and same_kind(pod.unit[HOST].links[name], link)
