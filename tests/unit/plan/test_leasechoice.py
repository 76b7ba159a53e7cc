"""Which subnet a node leases."""

import ipaddress
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.model.addr import IPNetwork
from podwire.model.netconf import NetConfig, parse_net_config
from podwire.plan.leasechoice import Create, Remove, Reuse, StoredLease, SubnetsExhausted, choose, conflict, fits
from podwire.plan.leases import Lease, LeaseAttrs, subnet_key

BACKEND = '"Backend":{"Type":"vxlan"}'
CONFIG = parse_net_config(f'{{"Network":"10.5.0.0/22","SubnetLen":24,{BACKEND}}}')
DUAL = parse_net_config(
    f'{{"Network":"10.5.0.0/22","SubnetLen":24,"EnableIPv6":true,"IPv6Network":"fd00:5::/62","IPv6SubnetLen":64,{BACKEND}}}'
)
ME = LeaseAttrs(public_ip=IPv4Address("192.168.0.1"))
OTHER = LeaseAttrs(public_ip=IPv4Address("192.168.0.2"))


def nets(*texts: str) -> tuple[IPNetwork, ...]:
    return tuple(map(ipaddress.ip_network, texts))


def stored(attrs: LeaseAttrs, *texts: str, created: int = 1, lease_id: int = 7) -> StoredLease:
    subnets = nets(*texts)
    return StoredLease(Lease(subnet_key(subnets), subnets, attrs), created, created, lease_id)


def chosen(leases: list[StoredLease], *last: str, config: NetConfig = CONFIG, pick: int = 0) -> object:
    return choose(config, leases, ME, nets(*last), lambda count: min(pick, count - 1))


def test_its_own_lease_comes_first() -> None:
    mine = stored(ME, "10.5.2.0/24")
    assert chosen([stored(OTHER, "10.5.1.0/24"), mine], "10.5.3.0/24") == Reuse(mine)


def test_its_own_lease_outside_the_network_is_removed() -> None:
    mine = stored(ME, "10.9.2.0/24")
    found = chosen([mine])
    assert isinstance(found, Remove)
    assert found.stored == mine


def test_of_two_own_leases_the_last_used_stays() -> None:
    one, two = stored(ME, "10.5.1.0/24", created=1), stored(ME, "10.5.2.0/24", created=2)
    found = chosen([one, two], "10.5.2.0/24")
    assert isinstance(found, Remove)
    assert found.stored == one


def test_the_last_subnet_if_nobody_has_it() -> None:
    assert chosen([], "10.5.3.0/24") == Create(nets("10.5.3.0/24"))
    assert chosen([stored(OTHER, "10.5.3.0/24")], "10.5.3.0/24") == Create(nets("10.5.1.0/24"))
    assert chosen([stored(OTHER, "10.5.3.0/25")], "10.5.3.0/24") == Create(nets("10.5.1.0/24"))
    assert chosen([], "10.5.0.0/24") == Create(nets("10.5.1.0/24")), "the first subnet of a network is not given out"


def test_free_subnets_go_round() -> None:
    assert chosen([stored(OTHER, "10.5.3.0/24")], pick=2) == Create(nets("10.5.1.0/24"))
    with pytest.raises(SubnetsExhausted, match=r"all 3 subnets of 10\.5\.0\.0/22"):
        chosen([stored(OTHER, f"10.5.{n}.0/24") for n in (1, 2, 3)])


def test_both_families_are_chosen_apart() -> None:
    found = chosen([stored(OTHER, "10.5.1.0/24", "fd00:5:0:3::/64")], config=DUAL, pick=2)
    assert found == Create(nets("10.5.3.0/24", "fd00:5:0:1::/64"))
    assert not fits(DUAL, nets("10.5.1.0/24"))


def test_who_came_later_gives_way() -> None:
    early = stored(OTHER, "10.5.1.0/24", "fd00:5:0:1::/64", created=5)
    late = stored(ME, "10.5.2.0/24", "fd00:5:0:1::/64", created=6)
    assert conflict(late, [early, late]) == early
    assert conflict(early, [early, late]) is None
    found = chosen([early, late], config=DUAL)
    assert isinstance(found, Remove)
    assert found.stored == late


def test_a_stranger_with_our_address_is_left_alone() -> None:
    theirs = stored(ME, "10.5.1.0/24", created=9)
    found = choose(CONFIG, [theirs], ME, (), lambda count: 0, strangers=frozenset({9}))
    assert found == Create(nets("10.5.2.0/24"))


def test_nodes_with_only_ipv6_are_told_apart() -> None:
    """All of them say 0.0.0.0 for their IPv4 address."""
    config = parse_net_config(
        f'{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:5::/62","IPv6SubnetLen":64,{BACKEND}}}'
    )
    one, two = LeaseAttrs(public_ipv6=IPv6Address("fd00::1")), LeaseAttrs(public_ipv6=IPv6Address("fd00::2"))
    found = choose(config, [stored(one, "fd00:5:0:1::/64")], two, (), lambda count: 0)
    assert found == Create(nets("fd00:5:0:2::/64"))


@given(st.lists(st.integers(0, 2**32), max_size=80), st.integers(2, 6))
def test_whoever_asks_gets_a_subnet_that_nobody_has(seeds: list[int], bits: int) -> None:
    config = parse_net_config(f'{{"Network":"10.5.0.0/16","SubnetLen":{16 + bits},{BACKEND}}}')
    (subnets,) = config.ranges.values()
    leases: list[StoredLease] = []
    for number, seed in enumerate(seeds):
        node = LeaseAttrs(public_ip=IPv4Address(0x0A000001 + number))
        try:
            found = choose(config, leases, node, (), lambda count, s=seed: s % count)  # type: ignore[misc]
        except SubnetsExhausted:
            assert len(leases) == subnets.count
            return
        assert isinstance(found, Create)
        assert fits(config, found.subnets)
        assert not any(other.lease.overlaps(found.subnets) for other in leases)
        leases.append(StoredLease(Lease(subnet_key(found.subnets), found.subnets, node), number, number, 1))
