"""One address plan for the planners' tests: nodes `n1`, `n2`, … on 198.18.0.0/15 and 2001:db8:1::/48."""

import ipaddress
from collections.abc import Iterable

from podwire.model.addr import Family, IPAddress, IPNetwork
from podwire.model.ids import HOST
from podwire.model.kernelstate import Device, Link, NetState
from podwire.model.meta import ObjectMeta
from podwire.model.objects import Node, NodeSpec
from podwire.plan.leases import LeaseAttrs, encode_annotations, lease_of_node, vxlan_data, vxlan_peers
from podwire.plan.naming import vtep_mac
from podwire.plan.node import NodeNetwork
from podwire.plan.overlay import Peer
from podwire.plan.podlinks import PodAttachment
from podwire.testing import FakeKernel

DUAL = (Family.IPV4, Family.IPV6)
UPLINK = Link("eth0", Device(), mtu=1500)


def node_ip(index: int, family: Family) -> IPAddress:
    base = "198.18.0.10" if family is Family.IPV4 else "2001:db8:1::10"
    return ipaddress.ip_address(base) + index


def subnet(index: int, family: Family) -> IPNetwork:
    return ipaddress.ip_network(f"10.244.{index}.0/24" if family is Family.IPV4 else f"fd00:10:244:{index:x}::/64")


def network(index: int = 1, families: Iterable[Family] = DUAL) -> NodeNetwork:
    families = tuple(families)
    return NodeNetwork(
        name=f"n{index}",
        node_ips=tuple(node_ip(index, family) for family in families),
        pod_cidrs=tuple(subnet(index, family) for family in families),
        service_cidrs=(ipaddress.ip_network("10.96.0.0/12"), ipaddress.ip_network("fd00:10:96::/112")),
    )


def node(index: int, families: Iterable[Family] = DUAL) -> Node:
    """The Node object as podwire's own agent writes it."""
    families = tuple(families)
    ips = {family: node_ip(index, family) for family in families}
    data = {family: vxlan_data(1, vtep_mac(f"n{index}", family)) for family in families}
    four, six = ips.get(Family.IPV4), ips.get(Family.IPV6)
    attrs = LeaseAttrs(
        public_ip=four if isinstance(four, ipaddress.IPv4Address) else None,
        public_ipv6=six if isinstance(six, ipaddress.IPv6Address) else None,
        backend_type="vxlan",
        backend_data=data.get(Family.IPV4, ""),
        backend_v6_data=data.get(Family.IPV6, ""),
    )
    return Node(
        metadata=ObjectMeta(name=f"n{index}", annotations=encode_annotations(attrs, families)),
        spec=NodeSpec(pod_cidrs=tuple(str(subnet(index, family)) for family in families)),
    )


def peers_of(node: Node, vni: int = 1) -> tuple[Peer, ...]:
    """How other nodes reach this one's pods through VXLAN."""
    lease = lease_of_node(node)
    return vxlan_peers(lease, vni) if lease else ()


def peers(index: int, families: Iterable[Family] = DUAL) -> tuple[Peer, ...]:
    return peers_of(node(index, families))


def pod(net: NodeNetwork, number: int) -> PodAttachment:
    ips = [cidr.network_address + 1 + number for cidr in net.pod_cidrs]
    return net.attachment(f"uid-{number}", "default", f"pod-{number}", ips)


def fresh_kernel() -> FakeKernel:
    return FakeKernel(UPLINK)


async def observe_all(kernel: FakeKernel) -> dict[str, NetState]:
    return {ns: await kernel.observe(ns) for ns in kernel.namespaces if ns == HOST or kernel.space(ns).links}
