"""The parameters of a lab: defaults, checks with messages for people, and the way through JSON."""

import json

import pytest

from podwire.lab.spec import LabSpec, check_name, parse_port_range
from podwire.model.addr import Family
from podwire.model.errors import InvalidInput


def test_defaults_are_those_of_the_design() -> None:
    spec = LabSpec()
    assert {f: str(net) for f, net in spec.service_prefixes.items()} == {
        Family.IPV4: "10.96.0.0/12",
        Family.IPV6: "fd00:10:96::/112",
    }
    assert [str(net) for net in spec.pod_prefixes.values()] == ["10.244.0.0/16", "fd00:10:244::/56"]
    assert [str(net) for net in spec.balancer_pools.values()] == ["203.0.113.0/24", "2001:db8:2::/112"]


@pytest.mark.parametrize("ip_family", ["ipv4", "ipv6", "dual"])
def test_every_prefix_exists_for_exactly_the_families(ip_family: str) -> None:
    spec = LabSpec(ip_family=ip_family)
    for prefixes in (spec.service_prefixes, spec.pod_prefixes, spec.balancer_pools):
        assert tuple(prefixes) == spec.families


def test_given_ranges_may_come_in_any_order() -> None:
    spec = LabSpec(service_cidrs=("fd01::/112", "10.0.0.0/20"))
    assert [str(net) for net in spec.service_prefixes.values()] == ["10.0.0.0/20", "fd01::/112"]


@pytest.mark.parametrize(
    "cidrs", [("10.96.0.0/12",), ("10.0.0.0/16", "10.1.0.0/16"), ("10.96.0.0/12", "fd00::/64"), ("ten",), ("10.0.0.1/16",)]
)
def test_ranges_that_do_not_fit_are_refused(cidrs: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInput, match="service range"):
        LabSpec(service_cidrs=cidrs)


@pytest.mark.parametrize("name", ["a", "ci-1234", "x" * 40])
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a/b", "..", "a b", "x" * 41, "ü"])
def test_names_that_cannot_be_directories_or_host_names_are_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="lab name"):
        check_name(name)


@pytest.mark.parametrize("nodes", [0, -1, 10_000])
def test_silly_numbers_of_nodes_are_refused(nodes: int) -> None:
    with pytest.raises(InvalidInput, match="number of nodes"):
        LabSpec(nodes=nodes)


def test_members_of_an_etcd_that_is_not_there_are_refused() -> None:
    assert LabSpec(subnet_manager="etcd", etcd_members=3).etcd_members == 3
    with pytest.raises(InvalidInput, match="add --subnet-manager etcd"):
        LabSpec(etcd_members=3)


def test_port_ranges() -> None:
    assert parse_port_range("30000-32767") == (30000, 32767)
    for text in ("30000", "a-b", "1-2-3", ""):
        with pytest.raises(InvalidInput, match="write it as"):
            parse_port_range(text)
    with pytest.raises(InvalidInput, match="node port range"):
        LabSpec(node_ports=(32767, 30000))


def test_a_spec_survives_json() -> None:
    spec = LabSpec("ci", 5, "ipv6", ("fd01::/112",), (31000, 31999))
    assert LabSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    ("cidr", "use"), [("10.244.0.0/16", "pods"), ("198.18.0.0/16", "nodes"), ("203.0.113.0/28", "load balancers")]
)
def test_services_do_not_take_the_labs_own_addresses(cidr: str, use: str) -> None:
    with pytest.raises(InvalidInput, match=f"overlaps .* for {use}"):
        LabSpec(ip_family="ipv4", service_cidrs=(cidr,))
