"""Services → nftables elements, incrementally: one Service changed costs what it holds, not what exists."""

from podwire.model.nft import Batch, Ruleset
from podwire.model.servicetable import Frontend, NodeFacts
from podwire.plan.serviceledger import ServiceLedger
from podwire.plan.services_affinity import Numbers
from podwire.plan.services_maps import FamilyMaps, frontend_key, resynced, taken
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
        return taken(self._maps.values())

    def resync(self, observed: Ruleset, *, leavings: bool = False) -> Batch:
        """The smallest transaction from what the kernel holds to what is desired now, which then counts as taken. `leavings`:
        what packets left may be of anyone, for it is not known whether the last batch was carried out to its end."""
        return resynced(self._maps.values(), observed, leavings=leavings)

    def memories(self, frontend: Frontend) -> Numbers:
        """By which numbers the clients of a frontend that is programmed are remembered."""
        return self._maps[len(frontend.address)].memories(frontend_key(frontend))

    def desired(self) -> Ruleset:
        """All that the kernel shall hold."""
        return Ruleset({maps.table: maps.state() for maps in self._maps.values()})
