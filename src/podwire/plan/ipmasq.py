"""What `--ip-masq` asks for, with flannel's semantics: a table of our own, beside whatever else the host's firewall has.

In this order (compat.md D4): what others marked for masquerade is left to them; from and to this node's own pods within the
network nothing is rewritten, nor what comes in for them; a pod's packet to anything else (but multicast) gets the node's
address, and so does what this node forwards from outside to pods of other nodes, so that the answer comes back through it.
"""

from collections.abc import Iterable, Sequence

from podwire.model.addr import Family, IPNetwork
from podwire.model.nft import BaseHook, Chain, ChainState, Hook, Rule, Ruleset, TableRef, TableState
from podwire.model.nftexpr import RETURN, Cmp, CmpOp, Immediate, Masquerade
from podwire.plan.masquerade import KUBE_PROXY_MARK
from podwire.plan.nftexprs import Expressions, Fields, has_mark, multicast

TABLE = "podwire-overlay"
"""In families ip and ip6; also there, empty of chains, where masquerade is off."""

_SRCNAT = 100


def masquerade_rules(networks: Iterable[IPNetwork], subnets: Sequence[IPNetwork], *, fully_random: bool = True) -> Ruleset:
    """The rules for the pod networks and this node's own subnets (at most one of each family)."""
    by_version: dict[int, IPNetwork] = {network.version: network for network in networks}
    own: dict[int, IPNetwork] = {subnet.version: subnet for subnet in subnets}
    tables: dict[TableRef, TableState] = {}
    for family in Family:
        network, subnet = by_version.get(family.version), own.get(family.version)
        chains: dict[str, ChainState] = {}
        if network is not None and subnet is not None:
            base = Chain("postrouting", BaseHook("nat", Hook.POSTROUTING, _SRCNAT))
            chains["postrouting"] = ChainState(base, _rules(family, network, subnet, Masquerade(fully_random)))
        tables[TableRef(family, TABLE)] = TableState(chains)
    return Ruleset(tables)


def no_rules() -> Ruleset:
    """Our tables without content: masquerade is off."""
    return masquerade_rules((), ())


def _rules(family: Family, network: IPNetwork, subnet: IPNetwork, masquerade: Masquerade) -> tuple[Rule, ...]:
    fields = Fields(family)
    back = Immediate(RETURN)
    return (
        Rule((*has_mark(KUBE_PROXY_MARK), back), "kube-proxy's"),
        Rule((*fields.from_network(subnet), *fields.to_network(network), back), "own pod to pod"),
        Rule((*fields.to_network(subnet), back), "to an own pod"),
        Rule((*fields.from_network(network), *_not(fields.to_network(multicast(family))), masquerade), "pod to outside"),
        Rule((*fields.to_network(network), masquerade), "from outside to another node's pod"),
    )


def _not(match: Expressions) -> Expressions:
    """The opposite of a match of one field."""
    *before, last = match
    assert isinstance(last, Cmp)
    assert all(not isinstance(expression, Cmp) for expression in before)
    return (*before, Cmp(CmpOp.NEQ if last.op is CmpOp.EQ else CmpOp.EQ, last.sreg, last.data))
