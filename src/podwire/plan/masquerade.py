"""Who is masqueraded on the way out of the cluster, and why.

A pod's packet to anything that is no pod gets the node's address, since nobody out there has a route to pod addresses.
Between pods nothing is ever rewritten, and multicast is left alone (flannel's rules; compat.md D6.8). Services add their own
cases (`services_rules`): these are for packets whose destination was rewritten.
"""

from podwire.model.addr import Family
from podwire.model.nft import Rule
from podwire.model.nftexpr import RETURN, Immediate, Masquerade, jump
from podwire.model.servicetable import NodeFacts
from podwire.plan.nftexprs import Fields, has_mark, multicast, networks_of

CHAIN = "leaving-pods"

KUBE_PROXY_MARK = 0x4000
"""Whoever set it (kube-proxy) also masquerades what has it."""


def entry_rules(family: Family, facts: NodeFacts) -> tuple[Rule, ...]:
    """The rules of the postrouting chain that send this node's pods' packets to `CHAIN`."""
    fields = Fields(family)
    return tuple(
        Rule((*fields.from_network(cidr), Immediate(jump(CHAIN))), "from a pod of this node")
        for cidr in networks_of(family, facts.pod_cidrs)
    )


def chain_rules(family: Family, facts: NodeFacts) -> tuple[Rule, ...]:
    """The content of `CHAIN`."""
    fields = Fields(family)
    inside = networks_of(family, facts.cluster_cidrs) or networks_of(family, facts.pod_cidrs)
    return (
        Rule((*has_mark(KUBE_PROXY_MARK), Immediate(RETURN)), "kube-proxy's"),
        *(Rule((*fields.to_network(cidr), Immediate(RETURN)), "pod to pod: never rewritten") for cidr in inside),
        Rule((*fields.to_network(multicast(family)), Immediate(RETURN)), "multicast"),
        Rule((Masquerade(),), "pod to outside the cluster"),
    )
