import ipaddress
from dataclasses import replace

import plannodes
import pytest

from podwire.model.addr import Family
from podwire.model.ids import HOST, pod_netns
from podwire.model.kernelstate import Address, Bridge, Route, Veth
from podwire.plan.naming import host_veth
from podwire.plan.node import NodeNetwork, plan_base, plan_node
from podwire.plan.podlinks import plan_pod


def test_base_has_bridge_gateways_and_tunnels() -> None:
    base = plan_base(plannodes.network())
    assert sorted(base.links) == ["cni0", "flannel-v6.1", "flannel.1"]
    assert isinstance(base.links["cni0"].kind, Bridge)
    held = {(a.dev, str(a.interface)) for a in base.addresses}
    assert held == {
        ("cni0", "10.244.1.1/24"),
        ("cni0", "fd00:10:244:1::1/64"),
        ("flannel.1", "10.244.1.0/32"),
        ("flannel-v6.1", "fd00:10:244:1::/128"),
    }
    assert base.sysctls["net/ipv4/ip_forward"] == base.sysctls["net/ipv6/conf/all/forwarding"] == "1"
    assert base.sysctls["net/bridge/bridge-nf-call-iptables"] == base.sysctls["net/bridge/bridge-nf-call-ip6tables"] == "1"


@pytest.mark.parametrize(("family", "tunnel"), [(Family.IPV4, "flannel.1"), (Family.IPV6, "flannel-v6.1")])
def test_one_family_plans_nothing_of_the_other(family: Family, tunnel: str) -> None:
    state = plan_node(plannodes.network(families=[family]), plannodes.peers(2, [family]), [])[HOST]
    assert sorted(state.links) == ["cni0", tunnel]
    assert {a.interface.version for a in state.addresses} == {family.version}
    assert {r.dst.version for r in state.routes} == {family.version}
    other = "ipv6" if family is Family.IPV4 else "ipv4"
    assert not any(other in key for key in state.sysctls)


def test_a_subnet_without_an_underlay_address_has_no_tunnel() -> None:
    net = NodeNetwork(
        name="n1",
        node_ips=(ipaddress.ip_address("198.18.0.11"),),
        pod_cidrs=(plannodes.subnet(1, Family.IPV4), plannodes.subnet(1, Family.IPV6)),
    )
    assert sorted(plan_base(net).links) == ["cni0", "flannel.1"]


def test_service_route_is_for_nodes_without_a_default_route() -> None:
    net = plannodes.network(families=[Family.IPV4])
    assert plan_base(net).routes == frozenset()
    asked = NodeNetwork(
        name=net.name, node_ips=net.node_ips, pod_cidrs=net.pod_cidrs, service_cidrs=net.service_cidrs, service_route=True
    )
    assert plan_base(asked).routes == {Route(ipaddress.ip_network("10.96.0.0/12"), dev="cni0")}


def test_pod_has_both_families_and_permanent_neighbours() -> None:
    net = plannodes.network()
    pod = plannodes.pod(net, 4)
    unit = plan_pod(pod)
    veth = host_veth("uid-4")
    link = unit[HOST].links[veth]
    assert isinstance(link.kind, Veth)
    assert (link.kind.peer, link.kind.peer_ns) == ("eth0", pod_netns("uid-4"))
    assert (link.master, link.hairpin, link.mtu, link.alias) == ("cni0", True, 1430, "podwire:default/pod-4")
    inside = unit[pod_netns("uid-4")]
    assert inside.addresses == {
        Address("eth0", ipaddress.ip_interface("10.244.1.5/24")),
        Address("eth0", ipaddress.ip_interface("fd00:10:244:1::5/64")),
    }
    assert {(str(r.dst), str(r.via)) for r in inside.routes} == {
        ("0.0.0.0/0", "10.244.1.1"),
        ("::/0", "fd00:10:244:1::1"),
    }
    assert inside.links["lo"].up
    assert {(n.dev, str(n.ip), n.mac) for n in unit[HOST].neighbours} == {
        ("cni0", "10.244.1.5", inside.links["eth0"].mac),
        ("cni0", "fd00:10:244:1::5", inside.links["eth0"].mac),
    }
    assert {n.mac for n in inside.neighbours} == {plan_base(net).links["cni0"].mac}


def test_routed_pods_have_nothing_but_themselves_on_the_link() -> None:
    net = replace(plannodes.network(), routed_pods=True)
    assert not any("bridge" in key for key in plan_base(net).sysctls)
    inside = plan_pod(plannodes.pod(net, 4))[pod_netns("uid-4")]
    assert {str(a.interface) for a in inside.addresses} == {"10.244.1.5/32", "fd00:10:244:1::5/128"}
    assert {(str(r.dst), str(r.via), r.onlink) for r in inside.routes} == {
        ("0.0.0.0/0", "10.244.1.1", True),
        ("::/0", "fd00:10:244:1::1", True),
    }
    assert inside.sysctls == {"net/ipv6/conf/eth0/accept_redirects": "0"}


def test_an_address_of_another_node_is_refused() -> None:
    with pytest.raises(ValueError, match="in none of node n1's subnets"):
        plannodes.network().attachment("u", "default", "p", [ipaddress.ip_address("10.244.9.4")])
