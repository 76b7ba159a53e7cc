"""What every subnet manager offers: the network's configuration, a lease for this node, and the peers' leases, kept true.

    manager = EtcdSubnets(client, …)                       or KubeSubnets(…)
    config = await manager.network_config()                and `next_config` for each later one
    manager.subscribe(listener)                            peers that are known already are told at once
    lease = await manager.acquire(attrs)
    await manager.run()                                    until cancelled

A lease is held or not. While it is not (it ran out unrenewed, was revoked, or somebody else has it now), nobody may be given
an address out of it; what has one already goes on, since the peers decide whom they send to. The manager then gets a new lease
by itself, the same subnets if nobody else has them, and tells.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Protocol

from podwire.model.netconf import NetConfig
from podwire.plan.leases import Lease, LeaseAttrs


class Holding(enum.Enum):
    """NONE: no lease yet. HELD: the subnets are ours. LAPSED: they may be somebody else's now."""

    NONE = "none"
    HELD = "held"
    LAPSED = "lapsed"


@dataclass(frozen=True, slots=True)
class OwnLease:
    """This node's lease. `lease` stays when it lapses: it is what the node's pods still have. `why`: the reason, for people.
    `until`: when it runs out if nobody renews it, in seconds since boot (CLOCK_BOOTTIME); to look at, not told as a change."""

    lease: Lease | None = None
    holding: Holding = Holding.NONE
    why: str = ""
    until: float = field(default=inf, compare=False)

    @property
    def held(self) -> Lease | None:
        return self.lease if self.holding is Holding.HELD else None


@dataclass(slots=True)
class SubnetCounters:
    """For metrics and status pages; only ever grow."""

    acquired: int = 0
    renewed: int = 0
    renew_failures: int = 0
    lost: int = 0
    races: int = 0
    relists: int = 0


class SubnetListener(Protocol):
    """Called in the order of what happens; must return at once."""

    def peer_changed(self, node: str, lease: Lease | None) -> None:
        """Another node's lease is this from now on; None: it has none any more."""
        ...

    def own_changed(self, own: OwnLease) -> None: ...


class SubnetManager(Protocol):
    """See the module. Not to be used by two tasks at once, but for reading."""

    @property
    def own(self) -> OwnLease: ...

    @property
    def peers(self) -> Mapping[str, Lease]:
        """A live view by `Lease.node`, without this node's own. All backends: whoever plans leaves out what is not his."""
        ...

    @property
    def counters(self) -> SubnetCounters: ...

    async def network_config(self) -> NetConfig:
        """The configuration; waits until there is one. Raises InvalidInput or Unsupported for one that cannot be used."""
        ...

    async def next_config(self) -> NetConfig:
        """Waits until the configuration is another than was read last, and returns it. Raises as `network_config` does, perhaps
        more than once for the same; after that the next good one is returned, whichever it is."""
        ...

    def suits(self, config: NetConfig) -> bool:
        """Whether this node's lease, if it has one, would be kept under that configuration."""
        ...

    def subscribe(self, listener: SubnetListener) -> None:
        """Tell the listener what is known now, and every change from then on."""
        ...

    async def acquire(self, attrs: LeaseAttrs) -> Lease:
        """Get this node its lease and say `attrs` of it; tries until it has one. The peers known by then have been told."""
        ...

    async def update(self, attrs: LeaseAttrs) -> None:
        """Say other `attrs` of this node from now on; tries until that is told, or there is no lease of which to tell it (the
        next one will). For another task than the one that is in `run`."""
        ...

    async def run(self) -> None:
        """Keep the lease and follow the peers until cancelled. Call after `acquire`."""
        ...

    async def release(self) -> None:
        """Give the lease up, so that others may have it at once, and get none again. For a node that leaves for good.

        Raises what the store answers."""
        ...
