"""Services → nftables elements, incrementally: one Service changed costs what it holds, not what exists."""

from collections.abc import Sequence

from podwire.model.ids import ObjectKey
from podwire.model.nft import Batch, Ruleset
from podwire.model.objects import EndpointSlice, Pod, Service
from podwire.model.servicetable import NodeFacts

__all__ = ["TABLE", "NodeFacts", "ServicePlanner"]

TABLE = "podwire"
"""The name of our tables, one in family `ip` and one in `ip6`."""


class ServicePlanner:
    """Holds one node's desired Service rules. Feed it objects, take the transaction that brings the kernel up to date.

    The first batch taken builds everything from nothing, static rules (chains, masquerade) included. If the kernel's state
    is not what was last taken (agent start, repair, a failed commit), use `resync` instead of `take_batch`."""

    def __init__(self, facts: NodeFacts) -> None:
        self._facts = facts

    def set_facts(self, facts: NodeFacts) -> None:
        """The node changed (address, CIDRs, zone): everything is planned again."""
        self._facts = facts

    def set_service(self, key: ObjectKey, service: Service | None, slices: Sequence[EndpointSlice] = ()) -> None:
        """A Service with all of its slices as they are now; None: it is gone."""

    def set_host_ports(self, uid: str, pod: Pod | None) -> None:
        """A pod of this node that has addresses (status.podIPs) and may have host ports; None: it is gone."""

    def take_batch(self) -> Batch:
        """The smallest transaction from what was last taken to what is desired now; empty (falsy) if there is none."""
        return Batch()

    def resync(self, observed: Ruleset) -> Batch:
        """The smallest transaction from what the kernel holds to what is desired now, which then counts as taken."""
        return Batch()

    def desired(self) -> Ruleset:
        return Ruleset()
