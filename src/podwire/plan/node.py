"""A node's desired state, in independent units: the base (bridge, tunnels, forwarding), one per peer, one per pod."""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass

from podwire.model.addr import Family, IPAddress, IPInterface, IPNetwork, family_of, mac_for
from podwire.model.ids import HOST
from podwire.model.kernelstate import OWNER_ALIAS, Address, Bridge, Link, NetState, Route
from podwire.plan.backends.contract import Backend
from podwire.plan.ipam import gateway
from podwire.plan.naming import BRIDGE, vtep_mac
from podwire.plan.overlay import DEFAULT_PORT, DEFAULT_VNI, Peer, Tunnel, overhead, plan_peer, plan_tunnel
from podwire.plan.podlinks import PodAttachment, plan_pod
from podwire.plan.states import Unit as Unit
from podwire.plan.states import union as union
from podwire.plan.states import union_units as union_units


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeNetwork:
    """What is fixed about a node's network once it has its subnets. `node_ips` and `pod_cidrs`: at most one of each family.

    `routed_pods`: a node's pods reach each other through the node's IP stack and not over its bridge, see `bridge_switches`.
    `service_route`: add a route to the Service ranges through the bridge. Needed on a node without a default route, where
    the node's own processes would get "network unreachable" before NAT can act."""

    name: str
    node_ips: tuple[IPAddress, ...]
    pod_cidrs: tuple[IPNetwork, ...]
    service_cidrs: tuple[IPNetwork, ...] = ()
    uplink: str = "eth0"
    underlay_mtu: int = 1500
    vni: int = DEFAULT_VNI
    port: int = DEFAULT_PORT
    service_route: bool = False
    routed_pods: bool = False
    known_mtu: int = 0
    """Of pods' links, where it is known and how packets get to other nodes is not."""
    backend: Backend | None = None
    """How packets get to other nodes, where it is not by VXLAN as `vni` and `port` say."""

    @property
    def tunnels(self) -> tuple[Tunnel, ...]:
        """One for each family that has a subnet and an underlay address."""
        locals_ = {family_of(ip): ip for ip in self.node_ips}
        return tuple(
            Tunnel(
                subnet=cidr,
                local=locals_[family_of(cidr)],
                mac=vtep_mac(self.name, family_of(cidr)),
                underlay=self.uplink,
                underlay_mtu=self.underlay_mtu,
                vni=self.vni,
                port=self.port,
            )
            for cidr in self.pod_cidrs
            if family_of(cidr) in locals_
        )

    @property
    def pod_mtu(self) -> int:
        """What fits through every tunnel that a pod's packet may take."""
        if self.known_mtu:
            return self.known_mtu
        if self.backend is not None:
            return self.backend.mtu
        return self.underlay_mtu - max((overhead(family_of(cidr)) for cidr in self.pod_cidrs), default=50)

    @property
    def gateways(self) -> tuple[IPAddress, ...]:
        return tuple(gateway(cidr) for cidr in self.pod_cidrs)

    @property
    def bridge_mac(self) -> str:
        return mac_for(self.gateways[0])

    def attachment(self, uid: str, namespace: str, name: str, ips: Iterable[IPAddress]) -> PodAttachment:
        """A pod with these addresses on this node. Raises ValueError for an address outside the node's subnets."""
        pairs = [(ip, self._subnet(ip)) for ip in ips]
        return PodAttachment(
            uid=uid,
            namespace=namespace,
            name=name,
            ips=tuple(_interface(ip, ip.max_prefixlen if self.routed_pods else cidr.prefixlen) for ip, cidr in pairs),
            gateways=tuple(gateway(cidr) for _, cidr in pairs),
            gateway_mac=self.bridge_mac,
            mtu=self.pod_mtu,
        )

    def _subnet(self, ip: IPAddress) -> IPNetwork:
        for cidr in self.pod_cidrs:
            if ip in cidr:
                return cidr
        raise ValueError(f"{ip} is in none of node {self.name}'s subnets {', '.join(map(str, self.pod_cidrs))}")


def plan_base(network: NodeNetwork) -> NetState:
    """The node before it has peers or pods."""
    base = _bridge(network)
    if network.backend is not None:
        return union([base, network.backend.plan_base(network.pod_cidrs)])
    return union([base, *(plan_tunnel(tunnel) for tunnel in network.tunnels)])


def plan_node(network: NodeNetwork, peers: Iterable[Peer], pods: Iterable[PodAttachment]) -> Unit:
    """Everything, by namespace: the union of all units."""
    units: list[Unit] = [{HOST: plan_base(network)}, *({HOST: plan_peer(peer)} for peer in peers), *map(plan_pod, pods)]
    return union_units(units)


def _bridge(network: NodeNetwork) -> NetState:
    link = Link(BRIDGE, Bridge(), mtu=network.pod_mtu, mac=network.bridge_mac, alias=OWNER_ALIAS)
    addresses = {Address(BRIDGE, _interface(gateway(cidr), cidr.prefixlen)) for cidr in network.pod_cidrs}
    routed = network.service_cidrs if network.service_route else ()
    families = {family_of(cidr) for cidr in network.pod_cidrs}
    routes = {Route(cidr, dev=BRIDGE) for cidr in routed if family_of(cidr) in families}
    switches = _sysctls(families) | ({} if network.routed_pods else bridge_switches(network))
    return NetState(links={BRIDGE: link}, addresses=frozenset(addresses), routes=frozenset(routes), sysctls=switches)


def bridge_switches(network: NodeNetwork) -> dict[str, str]:
    """An answer between two pods of one bridge must meet conntrack, or a Service's DNAT is not undone. These switches see to
    that; they need the module br_netfilter, which an ordinary user cannot load. Without it pods must be routed: they get
    host addresses, so that all they send goes to the node's own MAC."""
    names = {Family.IPV4: "net/bridge/bridge-nf-call-iptables", Family.IPV6: "net/bridge/bridge-nf-call-ip6tables"}
    return {names[family_of(cidr)]: "1" for cidr in network.pod_cidrs}


def _sysctls(families: set[Family]) -> dict[str, str]:
    """Forwarding and what must hold so that no packet is lost to a default.

    * rp_filter 2 (the larger of `all` and the device's counts): with one direction tunnelled and the other direct, strict
      filtering drops.
    * no ICMP redirects: a pod would learn a wrong way to a Service's address from them.
    * accept_dad 0: duplicate address detection costs 1-2 s and the addresses are ours."""
    wanted: dict[str, str] = {}
    if Family.IPV4 in families:
        wanted |= {
            "net/ipv4/ip_forward": "1",
            "net/ipv4/conf/all/rp_filter": "2",
            "net/ipv4/conf/all/send_redirects": "0",
            "net/ipv4/conf/default/send_redirects": "0",
        }
    if Family.IPV6 in families:
        wanted |= {
            "net/ipv6/conf/all/forwarding": "1",
            "net/ipv6/conf/default/accept_dad": "0",
            "net/ipv6/conf/default/accept_ra": "0",
        }
    return wanted


def _interface(ip: IPAddress, length: int) -> IPInterface:
    return ipaddress.ip_interface(f"{ip}/{length}")
