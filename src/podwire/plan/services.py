"""Services → nftables elements, incrementally: one Service changed costs what it holds, not what exists."""

from collections.abc import Iterator

from podwire.model.nft import Afterwards, Batch, Ruleset
from podwire.model.servicetable import NodeFacts
from podwire.plan.nftdiff import diff_ruleset, order_changes
from podwire.plan.serviceledger import ServiceLedger
from podwire.plan.services_maps import FamilyMaps
from podwire.plan.services_rules import TABLE

__all__ = ["TABLE", "NodeFacts", "ServicePlanner"]


class ServicePlanner(ServiceLedger[FamilyMaps]):
    """Holds one node's desired Service rules. Feed it objects, take the transaction that brings the kernel up to date.

    The first batch taken builds everything from nothing, static rules (chains, masquerade) included. If the kernel's state
    is not what was last taken (agent start, repair, a failed commit), use `resync` instead of `take_batch`."""

    def __init__(self, facts: NodeFacts) -> None:
        super().__init__(facts, FamilyMaps)

    def take_batch(self) -> Batch:
        """The smallest transaction from what was last taken to what is desired now; empty (falsy) if there is none."""
        phases = [order_changes(maps.table, *maps.take_changes()) for maps in self._maps.values()]
        ordered = [command for phase in zip(*phases, strict=True) for commands in phase for command in commands]
        return Batch((*ordered, *self._leavings()))

    def resync(self, observed: Ruleset) -> Batch:
        """The smallest transaction from what the kernel holds to what is desired now, which then counts as taken."""
        for maps in self._maps.values():
            maps.adopt_order(observed)
            maps.take_changes()
        batch = diff_ruleset(self.desired(), observed)
        stale = any(maps.table in observed.tables for maps in self._maps.values())
        return batch + Batch(tuple(self._leavings(everything=True))) if stale and batch else batch

    def desired(self) -> Ruleset:
        """All that the kernel shall hold."""
        return Ruleset({maps.table: maps.state() for maps in self._maps.values()})

    def _leavings(self, *, everything: bool = False) -> Iterator[Afterwards]:
        return (command for maps in self._maps.values() for command in maps.take_leavings(everything=everything))
