"""Pod ranges and load-balancer addresses: nothing is ever given twice."""

import ipaddress
from itertools import combinations
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podwire.controllers.config import ClusterCidr, default_cluster_cidr
from podwire.controllers.loadbalancers import AddressPlan, current_addresses, plan_addresses
from podwire.controllers.nodeipam import assign_pod_cidrs
from podwire.model.addr import IPNetwork
from podwire.model.errors import InvalidInput
from podwire.model.objects import Service

if TYPE_CHECKING:
    from podwire.model.meta import Json

RANGES = (default_cluster_cidr("10.244.0.0/20"), default_cluster_cidr("fd00:10:244::/56"))
POOLS = (ipaddress.ip_network("203.0.113.0/29"), ipaddress.ip_network("2001:db8:2::/125"))


def networks(*texts: str) -> list[IPNetwork]:
    return [ipaddress.ip_network(text) for text in texts]


def test_the_lowest_free_prefixes_are_given_in_order() -> None:
    given = assign_pod_cidrs(networks("10.244.1.0/24", "fd00:10:244::/64"), ["a", "b"], RANGES)
    assert {name: list(map(str, found)) for name, found in given.items()} == {
        "a": ["10.244.0.0/24", "fd00:10:244:1::/64"],
        "b": ["10.244.2.0/24", "fd00:10:244:2::/64"],
    }


def test_prefixes_of_other_sizes_and_from_elsewhere_are_respected() -> None:
    taken = networks("10.244.0.0/22", "10.0.0.0/24", "10.244.4.128/25")
    (found,) = assign_pod_cidrs(taken, ["a"], RANGES[:1]).values()
    assert list(map(str, found)) == ["10.244.5.0/24"]


def test_nodes_beyond_the_range_get_nothing() -> None:
    given = assign_pod_cidrs([], [f"n{i:02}" for i in range(20)], RANGES)
    assert len(given) == 16


@settings(deadline=None)
@given(st.integers(0, 15), st.integers(0, 15))
def test_no_two_nodes_share_a_prefix(first: int, more: int) -> None:
    given = dict(assign_pod_cidrs([], [f"a{i}" for i in range(first)], RANGES))
    taken = [network for found in given.values() for network in found]
    given |= assign_pod_cidrs(taken, [f"b{i}" for i in range(more)], RANGES)
    every = [network for found in given.values() for network in found]
    assert not any(a.version == b.version and a.overlaps(b) for a, b in combinations(every, 2))


@pytest.mark.parametrize("prefix", [8, 33])
def test_a_prefix_that_does_not_fit_is_refused(prefix: int) -> None:
    with pytest.raises(InvalidInput, match="does not fit"):
        ClusterCidr(ipaddress.ip_network("10.244.0.0/16"), prefix)
    with pytest.raises(InvalidInput, match="is no network"):
        default_cluster_cidr("10.244.0.1/16")


def service(name: str, *addresses: str, created: int = 0, families: str = "4", **spec: Any) -> Service:
    meta: Json = {"name": name, "namespace": "shop", "creationTimestamp": f"2026-01-01T00:00:{created:02}Z"}
    document = {
        "metadata": meta,
        "spec": {"type": "LoadBalancer", "ipFamilies": [f"IPv{f}" for f in families]} | spec,
        "status": {"loadBalancer": {"ingress": [{"ip": address} for address in addresses]}},
    }
    return msgspec.convert(document, Service)


def result(*services: Service) -> dict[str, list[str]]:
    """The Services' addresses after the plan."""
    plan = plan_addresses(services, POOLS)
    return {s.key.name: [str(a) for a in plan.assign.get(s.key, current_addresses(s))] for s in services}


def refusal(*services: Service) -> str:
    (reason,) = plan_addresses(services, POOLS).refused.values()
    return reason


def test_addresses_are_given_in_order_and_then_kept() -> None:
    assert result(service("a"), service("b", families="46")) == {
        "a": ["203.0.113.1"],
        "b": ["203.0.113.2", "2001:db8:2::1"],
    }
    kept = service("a", "203.0.113.5")
    assert plan_addresses([kept], POOLS) == AddressPlan()


def test_of_two_with_one_address_the_older_keeps_it() -> None:
    assert result(service("old", "203.0.113.3", created=1), service("new", "203.0.113.3", created=2)) == {
        "old": ["203.0.113.3"],
        "new": ["203.0.113.1"],
    }


def test_a_requested_address_goes_before_free_choice_and_replaces_another() -> None:
    mine = service("mine", "203.0.113.2", created=9, loadBalancerIP="203.0.113.1")
    assert result(service("first"), mine) == {"first": ["203.0.113.2"], "mine": ["203.0.113.1"]}


def test_why_a_request_is_refused() -> None:
    assert "in use by another" in refusal(service("a", "203.0.113.1"), service("b", loadBalancerIP="203.0.113.1"))
    assert "is not in the pool 203.0.113.0/29" in refusal(service("b", loadBalancerIP="192.0.2.1"))
    assert "does not have" in refusal(service("b", loadBalancerIP="2001:db8:2::1"))


def test_a_pool_can_run_out() -> None:
    services = [service(f"s{i}", created=i) for i in range(8)]
    plan = plan_addresses(services, POOLS)
    assert [key.name for key in plan.refused] == ["s6", "s7"]


def test_addresses_are_released() -> None:
    assert result(service("a", "203.0.113.1", type="ClusterIP"), service("b")) == {"a": [], "b": ["203.0.113.1"]}
    assert result(service("a", "203.0.113.1", "2001:db8:2::1", families="4")) == {"a": ["203.0.113.1"]}


def test_services_of_another_load_balancer_are_left_alone() -> None:
    assert plan_addresses([service("a", "192.0.2.1", loadBalancerClass="example.com/theirs")], POOLS) == AddressPlan()


service_strategy = st.builds(
    service,
    st.integers(0, 9).map(str),
    st.integers(0, 9).map(lambda n: f"203.0.113.{n}"),
    created=st.integers(0, 9),
    families=st.sampled_from(["4", "6", "46"]),
    loadBalancerIP=st.one_of(st.just(""), st.integers(0, 9).map(lambda n: f"203.0.113.{n}")),
    type=st.sampled_from(["LoadBalancer", "ClusterIP"]),
)


@settings(deadline=None)
@given(st.lists(service_strategy, max_size=10, unique_by=lambda s: s.key))
def test_no_address_is_ever_shared_and_the_plan_is_stable(services: list[Service]) -> None:
    after = result(*services)
    every = [address for addresses in after.values() for address in addresses]
    assert len(every) == len(set(every))
    settled = [msgspec.structs.replace(s, status=service("x", *after[s.key.name]).status) for s in services]
    assert plan_addresses(settled, POOLS).assign == {}
