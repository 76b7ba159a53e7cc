"""Which subnet a node leases: its own again, its last one, or a free one. Pure; what is there and chance are arguments.

Better than flannel 0.28 (pkg/subnet/etcd/local_manager.go), whose order this is, in that
* the last subnet is taken only if nobody else has it, whoever that is,
* a lease that overlaps another (two nodes of a dual-stack network raced for one subnet) is seen and given up by the later,
* a free subnet is taken from the whole range and not from its first hundred, so that many nodes at once seldom collide,
* nodes without an IPv4 address are told apart by the IPv6 one.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from podwire.model.addr import IPNetwork, family_of
from podwire.model.errors import PodwireError
from podwire.model.netconf import NetConfig, SubnetRange
from podwire.plan.leases import Lease, LeaseAttrs, overlap


class SubnetsExhausted(PodwireError):
    """Every subnet of a range is leased or reserved."""

    def __init__(self, subnets: SubnetRange) -> None:
        self.subnets = subnets
        super().__init__(
            f"all {subnets.count} subnets of {subnets.network} are leased: give the network configuration a larger Network "
            "or a longer SubnetLen, or delete the leases of nodes that are gone"
        )


@dataclass(frozen=True, slots=True)
class StoredLease:
    """A lease as etcd has it. `lease_id` 0: it never expires (a reservation). Revisions are etcd's, of the key."""

    lease: Lease
    created: int
    modified: int
    lease_id: int


@dataclass(frozen=True, slots=True)
class Reuse:
    """Go on with the own lease."""

    stored: StoredLease


@dataclass(frozen=True, slots=True)
class Remove:
    """The own lease cannot be used (any more): `why`. Delete it and choose again."""

    stored: StoredLease
    why: str


@dataclass(frozen=True, slots=True)
class Create:
    subnets: tuple[IPNetwork, ...]


Choice = Reuse | Remove | Create


def choose(
    config: NetConfig,
    leases: Sequence[StoredLease],
    own: LeaseAttrs,
    last: tuple[IPNetwork, ...],
    pick: Callable[[int], int],
    strangers: frozenset[int] = frozenset(),
) -> Choice:
    """What a node that says `own` of itself does next, given all leases there are.

    last: the subnets it had before, as far as it remembers. pick: a number from 0 up to below its argument, at random.
    strangers: creation revisions of leases that have the node's address but are held by somebody else.
    Raises SubnetsExhausted."""
    mine = sorted(
        (s for s in leases if s.lease.attrs.same_node(own) and s.created not in strangers),
        key=lambda s: (s.lease.subnets != last, s.created),
    )
    for stored in mine:
        if not fits(config, stored.lease.subnets):
            return Remove(stored, "the network configuration has no such subnet any more")
        if earlier := conflict(stored, leases):
            return Remove(stored, f"{earlier.lease.node} was there before and overlaps it")
    if mine:
        # Two leases of one node: the others are removed one by one, the last that was in use stays.
        return Reuse(mine[0]) if len(mine) == 1 else Remove(mine[-1], f"{mine[0].lease.node} is this node's, too")
    taken = frozenset(subnet for s in leases for subnet in s.lease.subnets)
    if last and fits(config, last) and _free(last, taken):
        return Create(last)
    return Create(tuple(_free_subnet(subnets, taken, pick) for subnets in config.ranges.values()))


def fits(config: NetConfig, subnets: Iterable[IPNetwork]) -> bool:
    """Whether these are exactly one subnet of each range of the configuration."""
    by_family = {family_of(subnet): subnet for subnet in subnets}
    return by_family.keys() == config.ranges.keys() and all(by_family[f] in r for f, r in config.ranges.items())


def conflict(stored: StoredLease, leases: Iterable[StoredLease]) -> StoredLease | None:
    """The lease that was made before `stored` and overlaps it, if there is one: who came later gives way."""
    for other in leases:
        if other.created < stored.created and other.lease.overlaps(stored.lease.subnets):
            return other
    return None


def _free(subnets: Iterable[IPNetwork], taken: Iterable[IPNetwork]) -> bool:
    return not any(overlap(mine, other) for mine in subnets for other in taken)


def _free_subnet(subnets: SubnetRange, taken: frozenset[IPNetwork], pick: Callable[[int], int]) -> IPNetwork:
    """The first free one at or behind a random place, going round."""
    odd = [t for t in taken if t.version == subnets.network.version and t.prefixlen != subnets.length]
    start = pick(subnets.count)
    for step in range(subnets.count):
        candidate = subnets.at((start + step) % subnets.count)
        if candidate not in taken and _free((candidate,), odd):
            return candidate
    raise SubnetsExhausted(subnets)
