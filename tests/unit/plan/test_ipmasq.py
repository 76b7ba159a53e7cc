"""The rules behind --ip-masq, in flannel's order (compat.md D4), as nft's debug output would show them."""

import ipaddress

import pytest

from podwire.model.addr import Family
from podwire.model.nft import Ruleset, TableRef
from podwire.plan.ipmasq import TABLE, masquerade_rules, no_rules
from podwire.plan.nftdiff import diff_ruleset

net = ipaddress.ip_network
NETWORKS = (net("10.5.0.0/16"), net("fd05::/48"))
SUBNETS = (net("10.5.34.0/24"), net("fd05:0:0:22::/64"))


def comments(rules: Ruleset, family: Family) -> list[str]:
    chains = rules.tables[TableRef(family, TABLE)].chains
    return [rule.comment for chain in chains.values() for rule in chain.rules]


def test_flannels_order_in_both_families() -> None:
    rules = masquerade_rules(NETWORKS, SUBNETS)
    for family in Family:
        assert comments(rules, family) == [
            "kube-proxy's",
            "own pod to pod",
            "to an own pod",
            "pod to outside",
            "from outside to another node's pod",
        ]


@pytest.mark.parametrize(("family", "multicast"), [(Family.IPV4, "neq reg 0 0xe0000000"), (Family.IPV6, "neq reg 0 0xff00")])
def test_a_pods_multicast_keeps_its_source(family: Family, multicast: str) -> None:
    chain = masquerade_rules(NETWORKS, SUBNETS).tables[TableRef(family, TABLE)].chains["postrouting"]
    outside = str(chain.rules[3])
    assert multicast in outside
    assert "masq fully-random" in outside
    plain = masquerade_rules(NETWORKS, SUBNETS, fully_random=False).tables[TableRef(family, TABLE)].chains["postrouting"]
    assert "[ masq ]" in str(plain.rules[3])


def test_a_family_without_a_subnet_has_no_rules() -> None:
    rules = masquerade_rules(NETWORKS, SUBNETS[:1])
    assert comments(rules, Family.IPV6) == []
    assert len(comments(rules, Family.IPV4)) == 5


def test_switching_off_leaves_empty_tables() -> None:
    on = Ruleset().apply(diff_ruleset(masquerade_rules(NETWORKS, SUBNETS), Ruleset()))
    off = on.apply(diff_ruleset(no_rules(), on))
    assert all(not table.chains for table in off.tables.values())
    assert not diff_ruleset(no_rules(), off)
