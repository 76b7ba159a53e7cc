"""Where things are in a lab: distinct, stable, on the underlay, in every family."""

import ipaddress

import pytest

from podwire.lab.spec import MAX_NODES, UNDERLAY, LabSpec
from podwire.lab.topology import FABRIC, Topology, node_index, node_name
from podwire.model.addr import Family
from podwire.model.ids import HOST
from podwire.model.kernelstate import Veth
from podwire.model.ops import AddAddress, AddLink, SetNeighbour, SetRoute

FAMILIES = {"ipv4": (Family.IPV4,), "ipv6": (Family.IPV6,), "dual": (Family.IPV4, Family.IPV6)}


def topology(ip_family: str) -> Topology:
    spec = LabSpec(ip_family=ip_family)
    return Topology(spec.families, spec.balancer_pools)


@pytest.mark.parametrize("ip_family", FAMILIES)
def test_every_place_has_its_own_addresses_and_mac(ip_family: str) -> None:
    lab = topology(ip_family)
    places = [lab.api, lab.world, lab.balancer, *(lab.node(i) for i in range(1, MAX_NODES + 1))]
    for family in FAMILIES[ip_family]:
        addresses = [place.addresses[family] for place in places]
        assert len(set(addresses)) == len(addresses)
        assert all(address in UNDERLAY[family] for address in addresses)
    assert len({place.mac for place in places}) == len(places)
    assert all(set(place.addresses) == set(FAMILIES[ip_family]) for place in places)


def test_a_node_is_found_where_its_index_says() -> None:
    node = topology("dual").node(1)
    assert node.name == "node-1"
    assert [str(address) for address in node.addresses.values()] == ["198.18.0.11", "2001:db8:1::11"]


@pytest.mark.parametrize("index", [1, 9, 10, MAX_NODES])
def test_names_and_indexes_are_each_others_inverse(index: int) -> None:
    assert node_index(node_name(index)) == index


@pytest.mark.parametrize("name", ["world", "node", "node-0", "node-01", f"node-{MAX_NODES + 1}", "node1", "my-node-1"])
def test_other_names_are_no_nodes(name: str) -> None:
    assert node_index(name) is None


@pytest.mark.parametrize("index", [0, -1, MAX_NODES + 1])
def test_indexes_out_of_range_are_refused(index: int) -> None:
    with pytest.raises(ValueError, match="not within"):
        topology("dual").node(index)


@pytest.mark.parametrize("ip_family", FAMILIES)
def test_a_nodes_plan_cables_it_to_the_fabric_and_points_at_the_world(ip_family: str) -> None:
    lab = topology(ip_family)
    place = lab.node(7)
    plan = lab.plan_node(place)
    links = [op for op in plan if isinstance(op, AddLink)]
    assert [(op.link.name, op.link.master, op.link.kind) for op in links] == [("node-7", FABRIC, Veth("eth0", place.netns))]
    assert [op.peer.name for op in links if op.peer] == ["eth0"]
    routes = [op.route for op in plan if isinstance(op, SetRoute)]
    assert [(route.dst, route.via) for route in routes] == [(f.any, lab.world.addresses[f]) for f in lab.families]
    addresses = [op.address.interface for op in plan if isinstance(op, AddAddress) and op.ns == place.netns]
    assert [address.ip for address in addresses] == list(place.addresses.values())


def test_nodes_and_the_api_server_know_each_others_mac_for_good() -> None:
    lab = topology("ipv4")
    node, api = lab.node(1), lab.api
    ops = [op for op in lab.plan_neighbours((node,), (api, node)) if isinstance(op, SetNeighbour)]
    assert {(op.ns, op.neighbour.dev, str(op.neighbour.ip), op.neighbour.mac) for op in ops} == {
        (HOST, FABRIC, "198.18.0.11", node.mac),
        (node.netns, "eth0", "198.18.0.1", api.mac),
    }
    bridge = next(op.link for op in lab.plan_fabric() if isinstance(op, AddLink))
    assert bridge.mac == api.mac


def test_the_world_reaches_balanced_addresses_through_the_balancer() -> None:
    lab = topology("dual")
    routes = {op.route.dst: op.route.via for op in lab.plan_world() if isinstance(op, SetRoute)}
    assert routes == {
        ipaddress.ip_network("203.0.113.0/24"): ipaddress.ip_address("198.18.2.1"),
        ipaddress.ip_network("2001:db8:2::/112"): ipaddress.ip_address("2001:db8:1::2:1"),
    }
