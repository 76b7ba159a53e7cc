"""Packets through fake nodes: they arrive as in Linux, and each missing piece is the reason of a drop."""

import ipaddress

import pytest

from podwire.model.addr import IPAddress, mac_for
from podwire.model.ids import HOST, NetnsName
from podwire.model.kernelstate import Address, Bridge, Device, FdbEntry, Link, Neighbour, Route, Veth, Vxlan
from podwire.model.meta import ObjectMeta
from podwire.model.nft import Batch
from podwire.model.objects import Endpoint, EndpointPort, EndpointSlice, Service, ServicePort, ServiceSpec
from podwire.model.ops import (
    AddAddress,
    AddLink,
    ChangeLink,
    CommitNft,
    DelFdb,
    DelLink,
    DelNeighbour,
    DelRoute,
    Op,
    Plan,
    SetFdb,
    SetNeighbour,
    SetRoute,
    SetSysctl,
)
from podwire.model.servicetable import NodeFacts
from podwire.plan.services import ServicePlanner
from podwire.testing import FakeFabric, FakeKernel

POD = NetnsName("pod/p")
UNDERLAY = {"a": ipaddress.ip_address("198.18.0.11"), "b": ipaddress.ip_address("198.18.0.12")}
SUBNETS = {
    4: {"a": ipaddress.ip_network("10.244.1.0/24"), "b": ipaddress.ip_network("10.244.2.0/24")},
    6: {"a": ipaddress.ip_network("fd00:1::/64"), "b": ipaddress.ip_network("fd00:2::/64")},
}


def host(node: str, version: int, number: int) -> IPAddress:
    return SUBNETS[version][node].network_address + number


def node_plan(node: str, peer: str, version: int) -> Plan:
    """One pod behind a bridge, and a VXLAN to the other node."""
    bits = SUBNETS[version][node].prefixlen
    everything = ipaddress.ip_network("0.0.0.0/0" if version == 4 else "::/0")
    tunnel = Link("flannel.1", Vxlan(1, 8472, UNDERLAY[node], "eth0"), mac=mac_for(UNDERLAY[node]))
    forwarding = "net/ipv4/ip_forward" if version == 4 else "net/ipv6/conf/all/forwarding"
    gateway = host(node, version, 1)
    pod = host(node, version, 2)
    far = SUBNETS[version][peer].network_address
    return (
        SetSysctl(forwarding, "1"),
        AddAddress(Address("eth0", ipaddress.ip_interface(f"{UNDERLAY[node]}/15"))),
        AddLink(Link("cni0", Bridge())),
        AddAddress(Address("cni0", ipaddress.ip_interface((gateway, bits)))),
        AddLink(Link("veth1", Veth("eth0", POD), master="cni0"), peer=Link("eth0", Veth("veth1", HOST))),
        AddAddress(Address("eth0", ipaddress.ip_interface((pod, bits))), POD),
        SetRoute(Route(everything, "eth0", gateway), POD),
        AddLink(tunnel),
        SetNeighbour(Neighbour("flannel.1", far, mac_for(UNDERLAY[peer]))),
        SetFdb(FdbEntry("flannel.1", mac_for(UNDERLAY[peer]), UNDERLAY[peer])),
        SetRoute(Route(SUBNETS[version][peer], "flannel.1", far, onlink=True)),
    )


async def two_nodes(version: int) -> tuple[FakeFabric, dict[str, FakeKernel]]:
    kernels = {name: FakeKernel(Link("eth0", Device())) for name in UNDERLAY}
    for name, peer in (("a", "b"), ("b", "a")):
        kernels[name].attach(POD, 0)
        applied = await kernels[name].apply(node_plan(name, peer, version))
        assert applied.ok, applied.failures
    return FakeFabric(kernels), kernels


@pytest.mark.parametrize("version", [4, 6])
async def test_pod_to_pod_across_nodes(version: int) -> None:
    fabric, _ = await two_nodes(version)
    delivery = fabric.send("a", host("b", version, 2), POD)
    assert (delivery.dropped, delivery.node, delivery.ns) == ("", "b", POD)
    assert [(hop.node, hop.dev) for hop in delivery.hops] == [
        ("a", "eth0"),
        ("a", "flannel.1"),
        ("a", "flannel.1"),
        ("b", "flannel.1"),
        ("b", "cni0"),
        ("b", "veth1"),
    ]
    assert delivery.hops[2].what == "encapsulated 198.18.0.11 → 198.18.0.12 VNI 1"


@pytest.mark.parametrize("version", [4, 6])
async def test_pod_to_its_node_and_back(version: int) -> None:
    fabric, _ = await two_nodes(version)
    assert fabric.send("a", host("a", version, 1), POD).ns == HOST
    back = fabric.send("a", host("a", version, 2))
    assert (back.arrived, back.ns) == (True, POD)


FAR = host("b", 4, 0)
PEER_MAC = mac_for(UNDERLAY["b"])


@pytest.mark.parametrize(
    ("node", "lost", "reason"),
    [
        ("a", DelRoute(Route(SUBNETS[4]["b"], "flannel.1", FAR)), "a has no route to 10.244.2.2"),
        ("a", DelNeighbour(Neighbour("flannel.1", FAR, PEER_MAC)), "has no neighbour entry"),
        ("a", DelFdb(FdbEntry("flannel.1", PEER_MAC, UNDERLAY["b"])), "has no forwarding entry"),
        ("a", SetSysctl("net/ipv4/ip_forward", "0"), "a does not forward"),
        ("a", DelLink("veth1"), "pod/p on a has no route"),
        ("a", ChangeLink(Link("cni0", Bridge(), up=False)), "bridge cni0 is down"),
        ("b", ChangeLink(Link("flannel.1", Device(), mac="0a:58:00:00:00:01")), "has MAC 0a:58:00:00:00:01"),
        ("b", DelLink("flannel.1"), "no VXLAN device"),
        ("b", DelLink("veth1"), "nobody on bridge cni0 answers"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else None,
)
async def test_each_missing_piece_is_the_reason(node: str, lost: Op, reason: str) -> None:
    fabric, kernels = await two_nodes(4)
    kernels[node].drift(lost)
    delivery = fabric.send("a", host("b", 4, 2), POD)
    assert not delivery.arrived
    assert reason in delivery.dropped


SERVICE = Service(
    metadata=ObjectMeta(name="web", namespace="shop", uid="u1"),
    spec=ServiceSpec(
        cluster_ip="10.96.0.20",
        cluster_ips=("10.96.0.20",),
        ip_families=("IPv4",),
        ports=(ServicePort(port=80, target_port=8080, protocol="TCP"),),
    ),
)
SLICE = EndpointSlice(
    metadata=ObjectMeta(name="web-1", namespace="shop", labels={"kubernetes.io/service-name": "web"}),
    endpoints=(Endpoint(addresses=("10.244.2.2",), node_name="b"),),
    ports=(EndpointPort(port=8080),),
)


def planned(node: str, *slices: EndpointSlice) -> Batch:
    facts = NodeFacts(
        name=node,
        node_ips=(UNDERLAY[node],),
        pod_cidrs=(SUBNETS[4][node],),
        cluster_cidrs=(ipaddress.ip_network("10.244.0.0/16"),),
        service_cidrs=(ipaddress.ip_network("10.96.0.0/12"),),
    )
    planner = ServicePlanner(facts)
    planner.set_service(SERVICE.key, SERVICE, slices)
    return planner.take_batch()


async def test_pod_to_a_service_on_another_node() -> None:
    fabric, kernels = await two_nodes(4)
    assert (await kernels["a"].apply((CommitNft(planned("a", SLICE)),))).ok
    delivery = fabric.send("a", ipaddress.ip_address("10.96.0.20"), POD, port=80)
    assert (delivery.dropped, delivery.node, delivery.ns) == ("", "b", POD)
    assert (str(delivery.packet.src), str(delivery.packet.dst), delivery.packet.dport) == ("10.244.1.2", "10.244.2.2", 8080)


async def test_a_service_without_endpoints_is_refused() -> None:
    fabric, kernels = await two_nodes(4)
    assert (await kernels["a"].apply((CommitNft(planned("a")),))).ok
    delivery = fabric.send("a", ipaddress.ip_address("10.96.0.20"), POD, port=80)
    assert not delivery.arrived
    assert delivery.dropped == "a at prerouting: tcp reset"
