"""Services in nftables: one transaction for each round of changes."""

import asyncio
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from podwire.agent.proxymodes.port import Connections
from podwire.kernel.port import Kernel, KernelError
from podwire.model.addr import Family
from podwire.model.ids import ObjectKey
from podwire.model.nft import Afterwards, Batch, DelTable, TableRef, packed_length
from podwire.model.objects import EndpointSlice, Pod, Service
from podwire.model.ops import CommitNft
from podwire.model.proxymode import ProxyMode
from podwire.model.servicetable import Frontend, NodeFacts, ServiceTable
from podwire.plan.differences import nft_differences
from podwire.plan.readback import questions
from podwire.plan.services import TABLE, ServicePlanner
from podwire.plan.services_rules import sets_of

log = logging.getLogger(__name__)

_FEW = 200
"""So many Services are read back one by one; for more, reading everything is cheaper."""


class NftRules:
    """`ServiceRules` by `ServicePlanner` and a kernel port."""

    mode = ProxyMode.NFTABLES

    def __init__(self, kernel: Kernel, facts: NodeFacts) -> None:
        self._kernel = kernel
        self._planner = ServicePlanner(facts)
        self.differences: Sequence[str] = ()
        self._leavings = Leavings()

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
        with self._leavings.carrying_out():
            return await commit(self._kernel, self._planner.take_batch())

    async def compare(self) -> int:
        observed = await self._kernel.observe_nft(TABLE)
        with self._leavings.carrying_out(all_of_it=True) as known:
            batch = self._planner.resync(observed, leavings=not known)
            self.differences = nft_differences(batch, self._planner.owner_at)
            return await commit(self._kernel, batch)

    async def served(self) -> Collection[bytes]:
        return (await self.connections(endpoints=False)).frontends.keys()

    async def holds(self, keys: Sequence[ObjectKey]) -> bool | None:
        if len(keys) > _FEW:
            return None
        for key in keys:
            for question in questions(self._planner.frontends(key), self._planner.memories):
                if not question.holds(await self._kernel.lookup_nft(question.table, question.set, question.keys)):
                    log.warning("services: %s is not in the kernel's %s as it was left", key, question.set.name)
                    return False
        return True

    async def changed(self) -> None:
        await asyncio.get_running_loop().create_future()  # every change is announced

    async def remove(self) -> None:
        await remove_tables(self._kernel, TABLE)

    async def connections(self, *, endpoints: bool) -> Connections:
        return await count_connections(self._kernel, TABLE, endpoints=endpoints)


class Leavings:
    """Whether what packets left behind is known to be of what is programmed: not before it was looked at once, nor after a
    batch that was not carried out to its end."""

    def __init__(self) -> None:
        self._known = False

    @contextmanager
    def carrying_out(self, *, all_of_it: bool = False) -> Iterator[bool]:
        """Around the planning and committing of a batch; whether it was known before. `all_of_it`: the batch looks at all that
        is not known."""
        known, self._known = self._known, False
        yield known
        self._known = known or all_of_it


async def remove_tables(kernel: Kernel, name: str) -> bool:
    """Take the nftables tables of that name, of both families, out of the kernel. Whether there were any."""
    held = await kernel.observe_nft(name)
    return bool(await commit(kernel, Batch(tuple(DelTable(table) for table in held.tables))))


async def count_connections(kernel: Kernel, name: str, *, endpoints: bool) -> Connections:
    """By the counters of the elements that connections were looked up by, or that they made, in the tables of that name."""
    frontends: dict[bytes, int] = {}
    chosen: dict[tuple[bytes, bytes], int] = {}
    for family in Family:
        sets, table = sets_of(family), TableRef(family, name)
        at = packed_length(sets.services.key)
        for of in (sets.connections,) if endpoints else (sets.services, sets.outside):
            for key, (_, (packets, _)) in (await kernel.count_nft(table, of)).items():
                if endpoints:
                    chosen[key[:at], key[at:]] = packets
                else:
                    frontends[key] = frontends.get(key, 0) + packets
    return Connections(frontends, chosen)


async def commit(kernel: Kernel, batch: Batch) -> int:
    """Returns the number of commands, those not counted that take away what packets left. Raises KernelError, in nftables'
    words, where the kernel refuses."""
    if not batch:
        return 0
    applied = await kernel.apply((CommitNft(batch),))
    if applied.failures:
        failure = applied.failures[0]
        raise KernelError(f"nftables refused the transaction: {failure.message}", failure.errno)
    return sum(not isinstance(command, Afterwards) for command in batch.commands)
