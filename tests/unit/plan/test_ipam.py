import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.model.addr import IPNetwork
from podwire.plan.ipam import AddressesExhausted, gateway, pick_address, pod_range

V4 = ipaddress.ip_network("10.244.3.0/24")
V6 = ipaddress.ip_network("fd00:10:244:3::/64")


@pytest.mark.parametrize(
    ("prefix", "first"), [(V4, "10.244.3.2"), (V6, "fd00:10:244:3::2"), (ipaddress.ip_network("10.0.0.0/30"), "10.0.0.2")]
)
def test_first_pod_address_is_behind_the_gateway(prefix: IPNetwork, first: str) -> None:
    assert gateway(prefix) == prefix.network_address + 1
    assert str(pick_address(prefix, set())) == first


def test_goes_round_behind_the_last_one_given() -> None:
    last = ipaddress.ip_address("10.244.3.254")
    assert str(pick_address(V4, set(), ipaddress.ip_address("10.244.3.9"))) == "10.244.3.10"
    assert str(pick_address(V4, set(), last)) == "10.244.3.2"
    taken = {ipaddress.ip_address("10.244.3.2")}
    assert str(pick_address(V4, taken, last)) == "10.244.3.3"


def test_last_one_given_in_a_former_subnet_says_nothing() -> None:
    assert str(pick_address(V4, set(), ipaddress.ip_address("10.244.9.7"))) == "10.244.3.2"


def test_a_full_prefix_names_itself() -> None:
    prefix = ipaddress.ip_network("10.0.0.0/29")
    taken = {prefix.network_address + n for n in range(8)}
    with pytest.raises(AddressesExhausted, match=r"10\.0\.0\.0/29"):
        pick_address(prefix, taken)


@pytest.mark.parametrize("prefix", ["10.0.0.0/31", "10.0.0.0/32", "fd00::/128", "fd00::/127"])
def test_prefixes_without_room_are_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="no room"):
        pod_range(ipaddress.ip_network(prefix))


@given(st.integers(20, 30), st.sets(st.integers(0, 70)), st.none() | st.integers(0, 70))
def test_never_gives_what_is_taken_or_reserved(length: int, taken: set[int], after: int | None) -> None:
    prefix = ipaddress.ip_network((int(ipaddress.ip_address("10.64.0.0")), length))
    used = {prefix.network_address + n for n in taken}
    try:
        given_one = pick_address(prefix, used, None if after is None else prefix.network_address + after)
    except AddressesExhausted:
        assert prefix.num_addresses - 3 <= len(used)
        return
    assert given_one in prefix
    assert given_one not in used
    assert given_one not in (prefix.network_address, prefix.network_address + 1, prefix.broadcast_address)


@given(st.integers(28, 30))
def test_every_address_comes_before_one_comes_again(length: int) -> None:
    prefix = ipaddress.ip_network((int(ipaddress.ip_address("10.64.0.0")), length))
    first, last = pod_range(prefix)
    seen = []
    current = None
    for _ in range(last - first + 1):
        current = pick_address(prefix, set(), current)
        seen.append(current)
    assert len(set(seen)) == len(seen) == last - first + 1
