"""What a proxy on somebody else's node has to know about it: its Node object, its interfaces and the configuration."""

import ipaddress
from collections.abc import Iterable, Mapping

from podwire.model.addr import Family, IPAddress, IPNetwork
from podwire.model.kernelstate import NetState
from podwire.model.objects import Node
from podwire.model.proxyconfig import LOCALHOST, PRIMARY, ProxyConfig
from podwire.model.proxymode import ProxyMode
from podwire.model.servicetable import NodeFacts
from podwire.plan.ipvs import DEVICE

ZONE_LABEL = "topology.kubernetes.io/zone"

ListeningPlaces = Mapping[Family, frozenset[IPAddress]]
"""Where processes listen for Services that have ClusterIPs of a family. 0.0.0.0 and ::, on all addresses of that family."""

EVERYWHERE: ListeningPlaces = {family: frozenset((ipaddress.IPv4Address(0), ipaddress.IPv6Address(0))) for family in Family}


def proxy_facts(config: ProxyConfig, node: Node, state: NetState, service_cidrs: Iterable[IPNetwork]) -> NodeFacts:
    """Pods' own addresses are none of a proxy's business: nothing is masqueraded but what Services ask for."""
    return NodeFacts(
        name=node.metadata.name,
        node_ips=_node_port_addresses(config, node, state),
        service_cidrs=tuple(service_cidrs),
        zone=node.metadata.labels.get(ZONE_LABEL, ""),
        local_sources=_local_sources(config, node),
        local_interfaces=_local_interfaces(config),
        masquerade_all=config.masquerade_all,
        loopback=_loopback(config, node, state),
    )


def _loopback(config: ProxyConfig, node: Node, state: NetState) -> bool:
    """kube-proxy's back ends differ: iptables listens on 127.0.0.1 unless told not to, nftables and ipvs do not unless told to
    by name."""
    if config.proxy_mode is not ProxyMode.IPTABLES:
        return LOCALHOST in config.node_port_addresses
    if not config.iptables.localhost_node_ports:
        return False
    chosen = _chosen(config, node, state, Family.IPV4)
    return chosen is None or any(ip.is_loopback for ip in chosen)


def primary_addresses(config: ProxyConfig, node: Node) -> tuple[IPAddress, ...]:
    """The node's own, at most one of each family: a `bindAddress` that is one host's, else the first InternalIP, else the first
    ExternalIP (kube-proxy's detectNodeIPs and GetNodeHostIPs)."""
    found = {ip.version: ip for ip in (config.bind_ip,) if ip is not None}
    for text in (*node.internal_ips, *node.external_ips):
        ip = ipaddress.ip_address(text)
        found.setdefault(ip.version, ip)
    return tuple(found.values())


def own_addresses(state: NetState) -> tuple[IPAddress, ...]:
    """Those of the host's interfaces that others can name it by."""
    return tuple(ip for ip in _held(state) if not ip.is_loopback)


def listening_places(config: ProxyConfig, node: Node, state: NetState) -> ListeningPlaces:
    """Where health-check node ports listen: on the addresses that nodePortAddresses chooses; where it chooses none of any
    family, everywhere."""
    chosen = {family: _chosen(config, node, state, family) for family in Family}
    if all(places is None for places in chosen.values()):
        return EVERYWHERE
    return {family: frozenset((family.any.network_address,) if places is None else places) for family, places in chosen.items()}


def depends_on_interfaces(config: ProxyConfig, node: Node) -> bool:
    """Whether what is found here changes when addresses of the host come and go."""
    return not config.primary_node_ports or len(primary_addresses(config, node)) < len(Family)


def _node_port_addresses(config: ProxyConfig, node: Node, state: NetState) -> tuple[IPAddress, ...]:
    everything = (*primary_addresses(config, node), *own_addresses(state))
    found: list[IPAddress] = []
    for family in Family:
        chosen = _chosen(config, node, state, family)
        found += _of(family, everything) if chosen is None else (ip for ip in chosen if not ip.is_loopback)
    return tuple(dict.fromkeys(found))


def _chosen(config: ProxyConfig, node: Node, state: NetState, family: Family) -> tuple[IPAddress, ...] | None:
    """The node's addresses of one family that nodePortAddresses chooses; None: all of them, be it that it says so, that it is
    of the other family only, or that there is no primary one (kube-proxy's NodePortAddresses)."""
    by_name = config.primary_node_ports or PRIMARY in config.node_port_addresses
    primary = _of(family, primary_addresses(config, node)) if by_name else ()
    networks = [network for network in config.node_port_networks if network.version == family.version]
    if family.any in networks:
        return None
    if not networks:
        return primary or None
    chosen = (ip for ip in _of(family, _held(state)) if any(ip in network for network in networks))
    return tuple(dict.fromkeys((*primary, *chosen)))


def _of(family: Family, addresses: Iterable[IPAddress]) -> tuple[IPAddress, ...]:
    return tuple(ip for ip in addresses if ip.version == family.version)


def _held(state: NetState) -> tuple[IPAddress, ...]:
    """The addresses of the host's interfaces, but for link-local ones, which need an interface to be named with."""
    # The addresses of virtual servers are Services', and not the node's own.
    held = (a.interface.ip for a in state.addresses if a.dev != DEVICE)
    return tuple(sorted((ip for ip in held if ip.version == 4 or not ip.is_link_local), key=lambda ip: (ip.version, int(ip))))


def untold_families(config: ProxyConfig, node: Node, facts: NodeFacts) -> tuple[Family, ...]:
    """Those of the node's families in which nothing tells this node's pods from other clients."""
    own = {ip.version for ip in primary_addresses(config, node)}
    return tuple(family for family in Family if family.version in own and not facts.tells_pods(family.version))


def _local_sources(config: ProxyConfig, node: Node) -> tuple[IPNetwork, ...]:
    """Whose traffic counts as that of this node's pods (detectLocalMode), by address. Where neither is said, and no CIDR is
    given, it is the node's own pod CIDR, which is right wherever nodes have one."""
    of_node = tuple(ipaddress.ip_network(text) for text in node.spec.pod_cidrs or filter(None, (node.spec.pod_cidr,)))
    return of_node if config.detect_local_mode == "NodeCIDR" else config.cluster_cidrs or of_node


def _local_interfaces(config: ProxyConfig) -> tuple[str, ...]:
    """The same by the device that packets come in by."""
    match config.detect_local_mode:
        case "BridgeInterface":
            return (config.detect_local.bridge_interface,)
        case "InterfaceNamePrefix":
            return (f"{config.detect_local.interface_name_prefix}*",)
        case _:
            return ()
