"""The fixed part of the Services' nftables: the sets, the base chains, and the rules that look packets up in the maps.

Their number does not grow with Services; only with the distinct sizes of pools (of a coarse scale) and affinity time-outs in
use. No element holds a verdict: the kernel answers a change of such a one by validating the whole table, element by
element, where a number in its place costs the same among a hundred thousand as alone.
Named in order of a packet's way:

    prerouting ─► (source ranges) ─► from outside and in `outside`? pick-local ─► inside
    output     ─► (source ranges) ─► inside
    inside     ─► in `services`? pick ─► refuse, drop
    pick       ─► where this client went before ; `pools` says N? one of N `endpoints` ; refuse
    postrouting ─► rewritten? remember (count, affinity), rewritten (masquerade) ; leaving-pods (masquerade out of the cluster)
    input      ─► rewritten? remember (count, affinity)
    remember   ─► has the Service's port a memory? its number on the packet, remember-for ; the other memory's, if it has two
    remember-for ─► `sticky` says N seconds, and the backend is one of the memory's `members`? so long in `affinity`

A memory is a number that stands for a port of a Service (services_affinity.py). It has just been looked up itself when it is
needed as part of a key of `affinity`: nftables can do that in one step, but the program `nft` cannot print it. So the packet
carries the number, as its priority, as long as the rules need it. The first packets of connections to a port with affinity go
on with priority 0, whatever they had by their type of service, or of the processes or rules that they came from.
"""

import ipaddress
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from podwire.model.addr import Family
from podwire.model.nft import BaseHook, Chain, FieldType, Hook, NftSet, Rule, TableRef, ip_field
from podwire.model.nftexpr import (
    ACCEPT,
    DROP,
    RETURN,
    Cmp,
    CmpOp,
    Constant,
    Counter,
    Dnat,
    Dynset,
    DynsetOp,
    Immediate,
    Lookup,
    Masquerade,
    Meta,
    MetaKey,
    Numgen,
    Reject,
    SetMeta,
    Verdict,
    goto,
    jump,
)
from podwire.model.servicetable import NodeFacts, Pool
from podwire.plan import masquerade
from podwire.plan.nftexprs import (
    Expressions,
    Fields,
    destination_rewritten,
    from_interface,
    from_this_machine,
    is_protocol,
    networks_of,
)

TABLE = "podwire"
"""The name of our tables, one in family `ip` and one in `ip6`."""

REFUSE = "refuse"
NO_LOCAL = "no-local-endpoints"
_INSIDE, _REWRITTEN, _REMEMBER = "inside", "rewritten", "remember"

_AFFINITY_SIZE = 1 << 20
_AFFINITY_DEFAULT_S = 10800
"""Kubernetes' default; every element says its own."""

_CONNECTIONS_SIZE = 1 << 20
"""Pairs of frontends and endpoints. What comes when it is full is not counted."""

_LOCAL_CLIENTS, _LOCAL_CLIENT_S = 1 << 16, 2
"""Addresses that a pod of this node used: noted where its packet comes in, asked for where the same packet goes out."""

_LOOPBACK_NETWORK = ipaddress.ip_network("127.0.0.0/8")
_DSTNAT, _SRCNAT = -100, 100
_TCP = 6


PICK, PICK_LOCAL, REMEMBER_FOR = "pick", "pick-local", "remember-for"
NUMBERED = (PICK, PICK_LOCAL, REMEMBER_FOR)
"""Chains that have rules for each number in use: sizes of pools, seconds."""


class Number(NamedTuple):
    """One of them, and the chain that has rules for it."""

    chain: str
    value: int


_DROPPED = (1 << 32) - 1
LEFT = (1 << 32) - 2
"""In the place of a number of backends: others lead these packets where they belong."""


@lru_cache(maxsize=4096)
def pack_number(value: int) -> bytes:
    return value.to_bytes(4, "big")


EXACT = 16
"""Pools of up to so many backends have a rule each; larger ones share those of their size."""

USUAL = 1024
"""Pools of up to so many backends have their rules at all times."""

_DRAWS = 4
"""How often a random number is drawn that may be nobody's. At most one in three is: one connection in eighty goes on to those
indices of which each has a backend."""


def pool_size(backends: int) -> int:
    """Out of how many indices to draw one. Above `EXACT` only 24, 32, 48, 64, 96, … (at least two thirds of the indices then
    have a backend): a rule that comes makes the kernel look at all elements of its maps, so that there have to be few."""
    if backends <= EXACT:
        return backends
    power = 1 << (backends - 1).bit_length()
    return power * 3 // 4 if backends <= power * 3 // 4 else power


def _size_below(size: int) -> int:
    """The next smaller size of a pool: all of its indices have a backend."""
    return size * 2 // 3 if size % 3 == 0 else size * 3 // 4


_SIZES = tuple(sorted({pool_size(backends) for backends in range(EXACT + 1, USUAL + 1)}))
_SIZE_CHAINS = {(chain, size): f"{chain}-{size}" for chain in (PICK, PICK_LOCAL) for size in _SIZES}
"""The usual sizes above `EXACT` have a chain each: a connection to a larger pool passes them by one comparison, not by five."""


def pool_number(pool: Pool) -> bytes:
    """What `pools` and `local-pools` say of a frontend: its pool's size, 0 to refuse, or to drop."""
    return pack_number(pool_size(len(pool.backends)) or (_DROPPED if pool.drop else 0))


@dataclass(frozen=True, slots=True)
class Sets:
    """All sets and maps of one family's table.

    `services` and `outside` hold the frontends and count their connections; `pools` and `local_pools` say out of how many
    indices to draw one of its `endpoints` or `local_endpoints`; `connections` counts those that one of these got.
    `memories`: by which number a frontend's clients are remembered in `affinity`; `other_memories`: and by which other, where
    its port has two pools; `sticky`: for how many seconds, by number; `members`: with which backends, those of one pool."""

    services: NftSet
    outside: NftSet
    endpoints: NftSet
    local_endpoints: NftSet
    pools: NftSet
    local_pools: NftSet
    connections: NftSet
    affinity: NftSet
    members: NftSet
    sticky: NftSet
    memories: NftSet
    other_memories: NftSet
    masquerade: NftSet
    keep_source: NftSet
    hairpin: NftSet
    cluster_ips: NftSet
    local_clients: NftSet
    restricted: NftSet
    source_ranges: NftSet

    def all(self) -> tuple[NftSet, ...]:
        return (
            self.endpoints, self.local_endpoints, self.pools, self.local_pools, self.connections, self.affinity,
            self.members, self.sticky, self.memories, self.other_memories, self.masquerade, self.keep_source, self.hairpin,
            self.cluster_ips, self.local_clients, self.source_ranges, self.restricted, self.services, self.outside,
        )  # fmt: skip


@lru_cache(maxsize=2)
def sets_of(family: Family) -> Sets:
    ip = ip_field(family)
    frontend = Fields(family).frontend_key
    indexed = (*frontend, FieldType.INDEX)
    backend, number, memory = (ip, FieldType.PORT), (FieldType.NUMBER,), (FieldType.PRIORITY,)
    return Sets(
        services=NftSet("services", frontend, counters=True),
        outside=NftSet("outside", frontend, counters=True),
        endpoints=NftSet("endpoints", indexed, data=backend),
        local_endpoints=NftSet("local-endpoints", indexed, data=backend),
        pools=NftSet("pools", frontend, data=number),
        local_pools=NftSet("local-pools", frontend, data=number),
        connections=NftSet("connections", (*frontend, *backend), counters=True, size=_CONNECTIONS_SIZE, dynamic=True),
        affinity=NftSet(
            "affinity", (ip, *memory), data=backend, timeout_s=_AFFINITY_DEFAULT_S, size=_AFFINITY_SIZE, dynamic=True
        ),
        members=NftSet("members", (*memory, *backend)),
        sticky=NftSet("sticky", memory, data=number),
        memories=NftSet("memories", frontend, data=memory),
        other_memories=NftSet("other-memories", frontend, data=memory),
        masquerade=NftSet("masquerade", frontend),
        keep_source=NftSet("keep-source", frontend),
        hairpin=NftSet("hairpin", (ip, ip)),
        cluster_ips=NftSet("cluster-ips", (ip,)),
        local_clients=NftSet("local-clients", (ip,), timeout_s=_LOCAL_CLIENT_S, size=_LOCAL_CLIENTS, dynamic=True),
        restricted=NftSet("restricted", frontend),
        source_ranges=NftSet("source-ranges", (*frontend, ip), interval=True),
    )


def table_ref(family: Family) -> TableRef:
    return TableRef(family, TABLE)


_BASES = {
    "prerouting": BaseHook("nat", Hook.PREROUTING, _DSTNAT),
    "output": BaseHook("nat", Hook.OUTPUT, _DSTNAT),
    "input": BaseHook("nat", Hook.INPUT, _SRCNAT),
    "postrouting": BaseHook("nat", Hook.POSTROUTING, _SRCNAT),
}


def fixed_chains() -> tuple[Chain, ...]:
    regular = (REFUSE, NO_LOCAL, *_SIZE_CHAINS.values(), *NUMBERED, _REMEMBER, _INSIDE, _REWRITTEN, masquerade.CHAIN)
    return (*(Chain(name) for name in regular), *(Chain(name, base) for name, base in _BASES.items()))


def fixed_rules(family: Family, facts: NodeFacts) -> dict[str, tuple[Rule, ...]]:
    """The rules of every chain but the numbered ones, chains that are jumped to first."""
    return {
        REFUSE: _refuse(family),
        NO_LOCAL: (Rule((Counter(), Immediate(DROP)), "other nodes have endpoints, this one has none"),),
        **_size_rules(family),
        _INSIDE: _inside(family, facts),
        _REWRITTEN: _rewritten(family, facts),
        masquerade.CHAIN: masquerade.chain_rules(family, facts),
        "prerouting": _prerouting(family, facts),
        "output": (_source_ranges(family), Rule((Immediate(goto(_INSIDE)),))),
        # What goes to an endpoint on the node itself never gets to postrouting.
        "input": (Rule((*destination_rewritten(), Immediate(jump(_REMEMBER)))),),
        "postrouting": (
            Rule((*destination_rewritten(), Immediate(jump(_REWRITTEN)))),
            *masquerade.entry_rules(family, facts),
        ),
    }


def _refuse(family: Family) -> tuple[Rule, ...]:
    ipv6 = family is Family.IPV6
    return (
        Rule((*is_protocol(_TCP), Counter(), Reject(tcp_reset=True, family_is_ipv6=False)), "nobody serves this"),
        Rule((Counter(), Reject(tcp_reset=False, family_is_ipv6=ipv6)), "nobody serves this"),
    )


def _source_ranges(family: Family) -> Rule:
    f, sets = Fields(family), sets_of(family)
    key = f.frontend()
    return Rule(
        (*key, Lookup(sets.restricted.name, 0), *key, f.saddr(f.frontend_registers),
         Lookup(sets.source_ranges.name, 0, inverted=True), Counter(), Immediate(DROP)),
        "loadBalancerSourceRanges",
    )  # fmt: skip


def _prerouting(family: Family, facts: NodeFacts) -> tuple[Rule, ...]:
    f, sets = Fields(family), sets_of(family)
    guarded = (_LOOPBACK_NETWORK,) if facts.loopback else ()
    return (
        # A connection that this machine makes to itself has passed `output`, so nat chains see it here no more
        # (CVE-2020-8558: with route_localnet, others could reach what listens on 127.0.0.1).
        *(
            Rule((*f.to_network(cidr), Counter(), Immediate(DROP)), "127.0.0.1 is for this machine alone")
            for cidr in networks_of(family, guarded)
        ),
        _source_ranges(family),
        *(
            Rule((*f.from_network(cidr), Immediate(goto(_INSIDE))), "from a pod of this node")
            for cidr in networks_of(family, facts.local_pods)
        ),
        *(_from_interface(family, name) for name in facts.local_interfaces),
        Rule(
            (*f.frontend(), Lookup(sets.outside.name, 0), Immediate(goto(PICK_LOCAL))),
            "externalTrafficPolicy: Local",
        ),
        Rule((Immediate(goto(_INSIDE)),)),
    )


def _from_interface(family: Family, name: str) -> Rule:
    """Where the packet leaves, the device it came by is not known any more if it was bridged."""
    f, sets = Fields(family), sets_of(family)
    note = Dynset(DynsetOp.UPDATE, sets.local_clients.name, 0, timeout_s=_LOCAL_CLIENT_S)
    return Rule((*from_interface(name), f.saddr(0), note, Immediate(goto(_INSIDE))), "from a pod of this node")


def _inside(family: Family, facts: NodeFacts) -> tuple[Rule, ...]:
    f, sets = Fields(family), sets_of(family)
    return (
        Rule((*f.frontend(), Lookup(sets.services.name, 0), Immediate(goto(PICK))), "to a Service"),
        Rule((f.daddr(0), Lookup(sets.cluster_ips.name, 0), Immediate(goto(REFUSE))), "no such port on this ClusterIP"),
        *(
            Rule((*f.to_network(cidr), Counter(), Immediate(DROP)), "no Service has this ClusterIP")
            for cidr in networks_of(family, facts.service_cidrs)
        ),
    )


def _rewritten(family: Family, facts: NodeFacts) -> tuple[Rule, ...]:
    f, sets = Fields(family), sets_of(family)
    frontend = f.original_frontend()
    known = Lookup(sets.local_clients.name, 0)
    to_cluster_ip = (f.original_daddr(0), Lookup(sets.cluster_ips.name, 0), Masquerade())
    return (
        Rule((Immediate(jump(_REMEMBER)),)),
        Rule((*frontend, Lookup(sets.masquerade.name, 0), Masquerade()), "externalTrafficPolicy: Cluster"),
        Rule((f.saddr(0), f.daddr(f.addr), Lookup(sets.hairpin.name, 0), Masquerade()), "a pod to itself"),
        *((Rule(to_cluster_ip, "to a ClusterIP: masquerade all"),) if facts.masquerade_all else ()),
        *(
            Rule((*f.from_network(cidr), Immediate(RETURN)), "from a pod of this node")
            for cidr in networks_of(family, facts.local_pods)
        ),
        *((Rule((f.saddr(0), known, Immediate(RETURN)), "from a pod of this node"),) if facts.local_interfaces else ()),
        *((Rule(to_cluster_ip, "to a ClusterIP, from no pod"),) if facts.tells_pods(family.version) else ()),
        Rule(
            (*from_this_machine(), *frontend, Lookup(sets.keep_source.name, 0), Masquerade()),
            "externalTrafficPolicy: Local, from the node itself",
        ),
    )


# --- chains with a rule for each number -----------------------------------------------------------------------------


def numbered_rules(family: Family, in_use: Mapping[str, Collection[int]]) -> dict[str, tuple[Rule, ...]]:
    """The rules of the numbered chains, and of the one that leads to `REMEMBER_FOR`. A connection's first packet is compared
    with one number after the other, small ones first; each is a lookup."""
    sticky = bool(in_use[REMEMBER_FOR])
    sets = sets_of(family)
    rules: dict[str, tuple[Rule, ...]] = {
        chain: (
            *((_known(family, sets.memories if chain == PICK else sets.other_memories),) if sticky else ()),
            *(_draw(family, chain, _number_is(family, chain, n), n, f"one of {n}") for n in range(1, EXACT + 1)),
            *(_if_number(family, chain, size, goto(_SIZE_CHAINS[chain, size]), f"up to {size}") for size in _SIZES),
            *(rule for number in sorted(in_use[chain]) for rule in _unusual(family, chain, number)),
            _if_number(family, chain, _DROPPED, goto(NO_LOCAL), "no endpoint here"),
            Rule((Immediate(goto(REFUSE)),)),
        )
        for chain in (PICK, PICK_LOCAL)
    }
    remember = (_remembered(family, memories) for memories in (sets.other_memories, sets.memories))
    rules[REMEMBER_FOR] = (*(_remember(family, s) for s in sorted(in_use[REMEMBER_FOR])), _FORGET_NUMBER) if sticky else ()
    rules[_REMEMBER] = (_count(family), *(remember if sticky else ()))
    return rules


def _pools_of(family: Family, chain: str) -> tuple[NftSet, NftSet]:
    """(the map of numbers, the map of backends)"""
    sets = sets_of(family)
    return (sets.pools, sets.endpoints) if chain == PICK else (sets.local_pools, sets.local_endpoints)


def _number_is(family: Family, chain: str, number: int) -> Expressions:
    """Leaves the frontend in the first registers, and the number behind it, where an index goes."""
    f = Fields(family)
    behind = f.frontend_registers
    numbers, _ = _pools_of(family, chain)
    return (*f.frontend(), Lookup(numbers.name, 0, dreg=behind), Cmp(CmpOp.EQ, behind, pack_number(number)))


def _if_number(family: Family, chain: str, number: int, verdict: Verdict, comment: str) -> Rule:
    return Rule((*_number_is(family, chain, number), Immediate(verdict)), comment)


def _unusual(family: Family, chain: str, number: int) -> tuple[Rule, ...]:
    if number == LEFT:
        return (_if_number(family, chain, LEFT, ACCEPT, "served by another"),)
    return _some_of(family, chain, number, _number_is(family, chain, number))


@lru_cache(maxsize=2)
def _size_rules(family: Family) -> dict[str, tuple[Rule, ...]]:
    """Of the chains that are for one size."""
    frontend = Fields(family).frontend()
    return {name: _some_of(family, chain, size, frontend) for (chain, size), name in _SIZE_CHAINS.items()}


def _some_of(family: Family, chain: str, size: int, condition: Expressions) -> tuple[Rule, ...]:
    """`condition` leaves the frontend in the first registers."""
    below = _size_below(size)
    attempt = _draw(family, chain, condition, size, f"one of up to {size}")
    return (*(attempt for _ in range(_DRAWS)), _draw(family, chain, condition, below, f"nobody's: one of the first {below}"))


def _draw(family: Family, chain: str, condition: Expressions, indices: int, comment: str) -> Rule:
    f = Fields(family)
    _, backends = _pools_of(family, chain)
    index = Numgen(f.frontend_registers, indices)
    rewrite = Dnat(family_is_ipv6=family is Family.IPV6, reg_address=0, reg_port=f.addr)
    return Rule((*condition, index, Lookup(backends.name, 0, dreg=0), rewrite), comment)


_NUMBER = MetaKey.PRIORITY
"""Where a packet carries the number of a memory."""

_FORGET_NUMBER = Rule((Constant(bytes(4), 0), SetMeta(_NUMBER, 0)), "the number has served")


def _known(family: Family, memories: NftSet) -> Rule:
    f, sets = Fields(family), sets_of(family)
    backend = f.addr + 1
    carry = (*f.frontend(), Lookup(memories.name, 0, dreg=0), SetMeta(_NUMBER, 0))
    known = (f.saddr(0), Meta(_NUMBER, f.addr), Lookup(sets.affinity.name, 0, dreg=backend))
    rewrite = Dnat(family_is_ipv6=family is Family.IPV6, reg_address=backend, reg_port=backend + f.addr)
    return Rule((*carry, *known, rewrite), "where this client went before")


def _count(family: Family) -> Rule:
    """Of ours alone: others' rules rewrite, too, and what IPVS leads is counted by IPVS."""
    f, sets = Fields(family), sets_of(family)
    load = (*destination_rewritten(), *sent_to_a_frontend(family), *f.backend(f.frontend_registers))
    return Rule((*load, Dynset(DynsetOp.ADD, sets.connections.name, 0)), "connections of each endpoint")


def sent_to_a_frontend(family: Family) -> Expressions:
    """Whether that is where the connection was made to, and somebody serves it. Leaves the frontend in the first registers."""
    f, sets = Fields(family), sets_of(family)
    behind = f.frontend_registers
    served = (Lookup(sets.pools.name, 0, dreg=behind), Cmp(CmpOp.NEQ, behind, pack_number(0)))
    return (*f.original_frontend(), *served)


def _remembered(family: Family, memories: NftSet) -> Rule:
    f = Fields(family)
    carry = (Lookup(memories.name, 0, dreg=0), SetMeta(_NUMBER, 0))
    return Rule((*destination_rewritten(), *f.original_frontend(), *carry, Immediate(jump(REMEMBER_FOR))))


def _remember(family: Family, seconds: int) -> Rule:
    f, sets = Fields(family), sets_of(family)
    behind, backend = 1 + f.addr + 1, f.addr + 1
    sticky = (Meta(_NUMBER, 0), Lookup(sets.sticky.name, 0, dreg=behind), Cmp(CmpOp.EQ, behind, pack_number(seconds)))
    # What was on its way to a backend that left, or goes to one of the port's other pool, is not one of them.
    member = (Meta(_NUMBER, 0), *f.backend(1), Lookup(sets.members.name, 0))
    note = Dynset(DynsetOp.UPDATE, sets.affinity.name, 0, backend, timeout_s=seconds)
    return Rule((*sticky, *member, f.saddr(0), Meta(_NUMBER, f.addr), *f.backend(backend), note), "where this client goes")
