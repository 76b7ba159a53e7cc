"""The fixed part of the Services' nftables: the sets, the base chains, and the rules that look packets up in the maps.

Their number does not grow with Services; only with the distinct sizes of pools (`pick-<N>`) and affinity time-outs in use.
Named in order of a packet's way:

    prerouting ─► (source ranges) ─► from outside? `outside` map ─► inside ─► `services` map ─► pick-N / sticky-N / refuse
    output     ─► (source ranges) ─► inside
    postrouting ─► rewritten? rewritten (affinity, masquerade) ;  leaving-pods (masquerade out of the cluster)
"""

import enum
import ipaddress
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from podwire.model.addr import Family
from podwire.model.nft import BaseHook, Chain, FieldType, Hook, NftSet, Rule, TableRef, ip_field
from podwire.model.nftexpr import (
    DROP,
    RETURN,
    Counter,
    Dnat,
    Dynset,
    DynsetOp,
    Immediate,
    Lookup,
    Masquerade,
    Numgen,
    Reject,
    Verdict,
    goto,
    jump,
)
from podwire.model.servicetable import NodeFacts
from podwire.plan import masquerade
from podwire.plan.nftexprs import Fields, destination_rewritten, from_this_machine, is_protocol, networks_of

TABLE = "podwire"
"""The name of our tables, one in family `ip` and one in `ip6`."""

REFUSE = "refuse"
NO_LOCAL = "no-local-endpoints"
_INSIDE, _REWRITTEN = "inside", "rewritten"

_AFFINITY_SIZE = 1 << 20
_AFFINITY_DEFAULT_S = 10800
"""Kubernetes' default; every element says its own."""

_LOOPBACK_NETWORK = ipaddress.ip_network("127.0.0.0/8")
_DSTNAT, _SRCNAT = -100, 100
_TCP = 6


class ChainKind(enum.StrEnum):
    """Chains that exist once for each number in use. `.value` is the name's beginning."""

    PICK = "pick"
    STICKY = "sticky"
    PICK_LOCAL = "pick-local"
    STICKY_LOCAL = "sticky-local"
    REMEMBER = "remember"


class ChainKey(NamedTuple):
    """pick-<backends>, sticky-<backends>, remember-<seconds>."""

    kind: ChainKind
    number: int

    @property
    def name(self) -> str:
        return f"{self.kind.value}-{self.number}"


_PICK_OF_STICKY = {ChainKind.STICKY: ChainKind.PICK, ChainKind.STICKY_LOCAL: ChainKind.PICK_LOCAL}


@lru_cache(maxsize=4096)
def chain_verdict(key: ChainKey) -> Verdict:
    """How a map's element leads to the chain: affinity is only noted on the way, everything else ends there."""
    return jump(key.name) if key.kind is ChainKind.REMEMBER else goto(key.name)


REFUSED = goto(REFUSE)
DROPPED = goto(NO_LOCAL)


@dataclass(frozen=True, slots=True)
class Sets:
    """All sets and maps of one family's table."""

    services: NftSet
    outside: NftSet
    endpoints: NftSet
    local_endpoints: NftSet
    affinity: NftSet
    sticky: NftSet
    masquerade: NftSet
    keep_source: NftSet
    hairpin: NftSet
    cluster_ips: NftSet
    restricted: NftSet
    source_ranges: NftSet

    def all(self) -> tuple[NftSet, ...]:
        return (
            self.endpoints, self.local_endpoints, self.affinity, self.sticky, self.masquerade, self.keep_source, self.hairpin,
            self.cluster_ips, self.source_ranges, self.restricted, self.services, self.outside,
        )  # fmt: skip


@lru_cache(maxsize=2)
def sets_of(family: Family) -> Sets:
    ip = ip_field(family)
    frontend = Fields(family).frontend_key
    indexed = (*frontend, FieldType.INDEX)
    backend = (ip, FieldType.PORT)
    return Sets(
        services=NftSet("services", frontend, verdicts=True, counters=True),
        outside=NftSet("outside", frontend, verdicts=True, counters=True),
        endpoints=NftSet("endpoints", indexed, data=backend, counters=True),
        local_endpoints=NftSet("local-endpoints", indexed, data=backend, counters=True),
        affinity=NftSet("affinity", (ip, *frontend), data=backend, timeout_s=_AFFINITY_DEFAULT_S, size=_AFFINITY_SIZE),
        sticky=NftSet("sticky", frontend, verdicts=True),
        masquerade=NftSet("masquerade", frontend),
        keep_source=NftSet("keep-source", frontend),
        hairpin=NftSet("hairpin", (ip, ip)),
        cluster_ips=NftSet("cluster-ips", (ip,)),
        restricted=NftSet("restricted", frontend),
        source_ranges=NftSet("source-ranges", (*frontend, ip), interval=True),
    )


def table_ref(family: Family) -> TableRef:
    return TableRef(family, TABLE)


_BASES = {
    "prerouting": BaseHook("nat", Hook.PREROUTING, _DSTNAT),
    "output": BaseHook("nat", Hook.OUTPUT, _DSTNAT),
    "postrouting": BaseHook("nat", Hook.POSTROUTING, _SRCNAT),
}


def fixed_chains() -> tuple[Chain, ...]:
    regular = (REFUSE, NO_LOCAL, _INSIDE, _REWRITTEN, masquerade.CHAIN)
    return (*(Chain(name) for name in regular), *(Chain(name, base) for name, base in _BASES.items()))


def fixed_rules(family: Family, facts: NodeFacts) -> dict[str, tuple[Rule, ...]]:
    """The rules of every fixed chain, chains that are jumped to first."""
    return {
        REFUSE: _refuse(family),
        NO_LOCAL: (Rule((Counter(), Immediate(DROP)), "other nodes have endpoints, this one has none"),),
        _INSIDE: _inside(family, facts),
        _REWRITTEN: _rewritten(family, facts),
        masquerade.CHAIN: masquerade.chain_rules(family, facts),
        "prerouting": _prerouting(family, facts),
        "output": (_source_ranges(family), Rule((Immediate(goto(_INSIDE)),))),
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
        Rule((*f.frontend(), Lookup(sets.outside.name, 0, verdict=True)), "externalTrafficPolicy: Local"),
        Rule((Immediate(goto(_INSIDE)),)),
    )


def _inside(family: Family, facts: NodeFacts) -> tuple[Rule, ...]:
    f, sets = Fields(family), sets_of(family)
    return (
        Rule((*f.frontend(), Lookup(sets.services.name, 0, verdict=True))),
        Rule((f.daddr(0), Lookup(sets.cluster_ips.name, 0), Immediate(goto(REFUSE))), "no such port on this ClusterIP"),
        *(
            Rule((*f.to_network(cidr), Counter(), Immediate(DROP)), "no Service has this ClusterIP")
            for cidr in networks_of(family, facts.service_cidrs)
        ),
    )


def _rewritten(family: Family, facts: NodeFacts) -> tuple[Rule, ...]:
    f, sets = Fields(family), sets_of(family)
    frontend = f.original_frontend()
    to_cluster_ip = (f.original_daddr(0), Lookup(sets.cluster_ips.name, 0), Masquerade())
    return (
        Rule((*frontend, Lookup(sets.sticky.name, 0, verdict=True)), "sessionAffinity"),
        Rule((*frontend, Lookup(sets.masquerade.name, 0), Masquerade()), "externalTrafficPolicy: Cluster"),
        Rule((f.saddr(0), f.daddr(f.addr), Lookup(sets.hairpin.name, 0), Masquerade()), "a pod to itself"),
        *((Rule(to_cluster_ip, "to a ClusterIP: masquerade all"),) if facts.masquerade_all else ()),
        *(
            Rule((*f.from_network(cidr), Immediate(RETURN)), "from a pod of this node")
            for cidr in networks_of(family, facts.local_pods)
        ),
        Rule(to_cluster_ip, "to a ClusterIP, from no pod"),
        Rule(
            (*from_this_machine(), *frontend, Lookup(sets.keep_source.name, 0), Masquerade()),
            "externalTrafficPolicy: Local, from the node itself",
        ),
    )


def numbered_chain_rules(family: Family, key: ChainKey) -> tuple[Rule, ...]:
    """The rules of a chain that exists for a number."""
    f, sets = Fields(family), sets_of(family)
    ipv6 = family is Family.IPV6
    rewrite = Dnat(family_is_ipv6=ipv6, reg_address=0, reg_port=f.addr)
    match key.kind:
        case ChainKind.PICK | ChainKind.PICK_LOCAL:
            pool = sets.endpoints if key.kind is ChainKind.PICK else sets.local_endpoints
            index = f.frontend_registers
            lookup = Lookup(pool.name, 0, dreg=0)
            return (Rule((*f.frontend(), Numgen(index, key.number), lookup, rewrite), f"one of {key.number}"),)
        case ChainKind.STICKY | ChainKind.STICKY_LOCAL:
            known = (f.saddr(0), *f.frontend(f.addr), Lookup(sets.affinity.name, 0, dreg=0), rewrite)
            pick = ChainKey(_PICK_OF_STICKY[key.kind], key.number)
            return (Rule(known, "where this client went before"), Rule((Immediate(goto(pick.name)),)))
        case ChainKind.REMEMBER:
            data = f.addr + f.frontend_registers
            note = Dynset(DynsetOp.UPDATE, sets.affinity.name, 0, data, timeout_s=key.number)
            return (Rule((f.saddr(0), *f.original_frontend(f.addr), *f.backend(data), note), "where this client goes"),)


def needed_by(key: ChainKey) -> ChainKey | None:
    """The chain that `key`'s rules lead to."""
    kind = _PICK_OF_STICKY.get(key.kind)
    return ChainKey(kind, key.number) if kind else None
