"""Services in IPVS, with nftables around it. Real servers that leave are drained: weight 0 until their last connection ends."""

import asyncio
import ipaddress
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TypeVar

from podwire.agent.proxymodes.nft import Leavings, commit, count_connections, remove_tables
from podwire.agent.proxymodes.port import Connections
from podwire.kernel.ipvs import IpvsClient, IpvsState
from podwire.kernel.netns import off_loop_to_the_end
from podwire.kernel.port import Kernel, KernelError
from podwire.model.errors import Unsupported
from podwire.model.ids import ObjectKey
from podwire.model.ipvs import STRICT_ARP, SWITCHES, IpvsOp, VirtualKey, VirtualServer
from podwire.model.kernelstate import OWNER_ALIAS, Address, Dummy, Link, NetState
from podwire.model.nft import Ruleset
from podwire.model.objects import EndpointSlice, Pod, Service
from podwire.model.ops import AddAddress, AddLink, DelAddress, DelLink, Op, SetSysctl
from podwire.model.proxymode import ProxyMode
from podwire.model.servicetable import Frontend, NodeFacts, ServiceTable
from podwire.plan import ipvs as plan
from podwire.plan.ipvs import DEVICE, TABLE, IpvsPlanner

log = logging.getLogger(__name__)

T = TypeVar("T")

LOOK_SECONDS = 0.7
"""How often IPVS is asked for what it holds: the kernel tells nobody of changes, nor of a connection's end."""
LOOK_SHARE = 30
"""Where asking takes long, so many times as long goes by before it is done again."""
AUDIT_SECONDS = 15.0
"""How often everything is compared, the addresses on the device included."""


class IpvsRules:
    """`ServiceRules` by `IpvsPlanner`. `netns_fd`: the namespace of `kernel`, the caller's to keep open. `scheduler`: how a
    real server is chosen, by IPVS' name (rr, wrr, lc, sh, mh, …)."""

    mode = ProxyMode.IPVS

    def __init__(
        self, kernel: Kernel, netns_fd: int, facts: NodeFacts, *, scheduler: str = "rr", strict_arp: bool = False
    ) -> None:
        self._kernel, self._fd = kernel, netns_fd
        self._switches = {**SWITCHES, **(STRICT_ARP if strict_arp else {})}
        self._planner = IpvsPlanner(facts, scheduler)
        self._held: dict[VirtualKey, VirtualServer] = {}
        """What IPVS holds of ours, real servers that are drained included."""
        self._bound: set[bytes] = set()
        self._leavings = Leavings()
        self._lock = asyncio.Lock()

    def set_facts(self, facts: NodeFacts) -> None:
        self._planner.set_facts(facts)

    def set_service(self, key: ObjectKey, service: Service | None, slices: Sequence[EndpointSlice] = ()) -> None:
        self._planner.set_service(key, service, slices)

    def set_host_ports(self, uid: str, pod: Pod | None) -> None:
        self._planner.set_host_ports(uid, pod)

    def table(self, key: ObjectKey) -> ServiceTable:
        return self._planner.table(key)

    def served_at(self, key: bytes) -> Frontend | None:
        return self._planner.served_at(key)

    async def program(self) -> int:
        async with self._lock:
            changes = self._planner.take()
            if not changes:
                return 0
            wanted = {key: server for key, server in changes.servers.items() if server is not None}
            held = {key: self._held[key] for key in changes.servers if key in self._held}
            with self._leavings.carrying_out():
                ops = await self._execute(plan.introduce(wanted, held))
                bound = await self._bind()
                commands = await commit(self._kernel, changes.batch)
            held = {key: self._held[key] for key in changes.servers if key in self._held}
            ops += await self._execute(plan.retire(wanted, held))
            return len(ops) + commands + bound + await self._unbind()

    async def compare(self) -> int:
        async with self._lock:
            made = await self._prepare()
            observed = await self._kernel.observe_nft(TABLE)
            state = await self._adopt(observed)
            wanted = self._planner.servers()
            ops = await self._execute(plan.introduce(wanted, self._held))
            bound = await self._bind()
            with self._leavings.carrying_out(all_of_it=True) as known:
                commands = await commit(self._kernel, self._planner.resync(observed, leavings=not known))
            ops += await self._execute(plan.retire(wanted, self._held, state.connections))
            return made + len(ops) + commands + bound + await self._unbind()

    async def adopt(self) -> None:
        """Take over what is there of this mode, to remove it. What an earlier life had begun to drain on the node's own
        addresses is known by its real servers' weight, 0."""
        async with self._lock:
            network = await self._kernel.observe()
            self._bound = _addresses_on_device(network)
            state = await self._adopt(await self._kernel.observe_nft(TABLE))
            here = {a.interface.ip.packed for a in network.addresses}
            drained = {k: s for k, s in state.servers.items() if k.address in here and not any(s.servers.values())}
            self._held |= drained

    async def served(self) -> Collection[bytes]:
        return (await self.connections(endpoints=False)).frontends.keys()

    async def changed(self) -> None:
        loop = asyncio.get_running_loop()
        audit, pause = loop.time() + AUDIT_SECONDS, LOOK_SECONDS
        while loop.time() < audit:
            await asyncio.sleep(pause)
            async with self._lock:
                began = loop.time()
                if await self._look() != self._held:
                    return
            pause = max(LOOK_SECONDS, LOOK_SHARE * (loop.time() - began))

    async def remove(self, *, at_once: bool = False) -> None:
        """Returns once the last connection through IPVS has ended: until then its virtual servers must stay. `at_once` cuts
        them."""
        await remove_tables(self._kernel, TABLE)
        async with self._lock:
            self._planner = IpvsPlanner(NodeFacts("", ()))  # from now on nothing is wanted
            await self._execute(plan.retire({}, self._held, {} if at_once else None))
        while self._held:
            async with self._lock:
                self._held = dict(await self._look())
            await asyncio.sleep(LOOK_SECONDS if self._held else 0)
        await self._apply([DelLink(DEVICE)])
        self._bound.clear()

    async def connections(self, *, endpoints: bool) -> Connections:
        counted = await count_connections(self._kernel, TABLE, endpoints=endpoints)
        if not endpoints:
            return counted
        keys = self._planner.served()
        state = await self._with_client(lambda client: client.observe(keys))
        chosen = dict(counted.endpoints)
        for (virtual, packed), accepted in state.accepted.items():
            pair = keys[virtual], packed
            chosen[pair] = chosen.get(pair, 0) + accepted
        return replace(counted, endpoints=chosen)

    # --- steps --------------------------------------------------------------------------------------------------------

    async def _look(self) -> dict[VirtualKey, VirtualServer]:
        """What IPVS holds of ours. Real servers that leave, and have no connection left, are gone then."""
        keys = tuple(self._held)
        state = await self._with_client(lambda client: client.observe(keys))
        if state.servers != self._held:
            return state.servers
        await self._execute(plan.retire(self._planner.servers(), self._held, state.connections))
        await self._unbind()
        return self._held

    async def _prepare(self) -> int:
        """The module, its switches and the device. Returns how much of that was missing."""
        await self._with_client(lambda client: None)
        switched = await self._kernel.apply(tuple(SetSysctl(key, value) for key, value in self._switches.items()))
        if switched.failures:
            # The kernel shows them to nobody in a user namespace, and without them IPVS cannot masquerade.
            raise Unsupported(
                f"IPVS with its switches ({switched.failures[0].message})",
                "run as the machine's own root, or use --proxy-mode nftables",
            )
        state = await self._kernel.observe()
        ops: list[Op] = []
        if DEVICE not in state.links:
            ops.append(AddLink(Link(DEVICE, Dummy(), alias=f"{OWNER_ALIAS}:ipvs")))
        await self._apply(ops)
        self._bound = _addresses_on_device(state)
        return int(DEVICE not in state.links)

    async def _bind(self) -> int:
        return await self._change_addresses(AddAddress, self._planner.bound() - self._bound)

    async def _unbind(self) -> int:
        """Addresses go once no virtual server needs them, the drained included."""
        needed = self._planner.bound() | {key.address for key in self._held}
        return await self._change_addresses(DelAddress, self._bound - needed)

    async def _change_addresses(self, change: type[AddAddress] | type[DelAddress], addresses: Iterable[bytes]) -> int:
        changed = set(addresses)
        await self._apply([change(Address(DEVICE, ipaddress.ip_interface(packed))) for packed in sorted(changed)])
        self._bound = self._bound | changed if change is AddAddress else self._bound - changed
        return len(changed)

    async def _apply(self, ops: Sequence[Op]) -> None:
        applied = await self._kernel.apply(tuple(ops))
        if applied.failures:
            failure = applied.failures[0]
            raise KernelError(f"IPVS' addresses: {failure.op}: {failure.message}", failure.errno)

    async def _execute(self, ops: list[IpvsOp]) -> list[IpvsOp]:
        if ops:
            await self._with_client(lambda client: client.execute(ops))
            self._held = plan.after(self._held, ops)
        return ops

    async def _adopt(self, observed: Ruleset) -> IpvsState:
        state = await self._with_client(lambda client: client.observe())
        keys = plan.ours(state.servers, self._planner, observed, self._bound)
        self._held = {key: state.servers[key] for key in keys}
        return state

    async def _with_client(self, use: Callable[[IpvsClient], T]) -> T:
        """A socket for each use: who makes and forgets a back end has nothing to close."""

        def work() -> T:
            with closing(IpvsClient(self._fd)) as client:
                return use(client)

        return await off_loop_to_the_end(work)


def _addresses_on_device(state: NetState) -> set[bytes]:
    """Without the link-local address that the kernel gives it."""
    return {a.interface.ip.packed for a in state.addresses if a.dev == DEVICE and not a.interface.ip.is_link_local}


async def left_behind(kernel: Kernel, netns_fd: int) -> IpvsRules | None:
    """What an earlier life in this mode has left, as something to `remove`; None where there is nothing."""
    if DEVICE not in (await kernel.observe()).links and not (await kernel.observe_nft(TABLE)).tables:
        return None
    rules = IpvsRules(kernel, netns_fd, NodeFacts("", ()))
    try:
        await rules.adopt()
    except Unsupported:
        log.debug("IPVS is not in this kernel any more")
    return rules
