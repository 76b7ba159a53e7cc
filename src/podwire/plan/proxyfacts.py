"""What a proxy on somebody else's node has to know about it: its Node object, its interfaces and the configuration."""

import ipaddress
from collections.abc import Iterable

from podwire.model.addr import IPAddress, IPNetwork
from podwire.model.kernelstate import NetState
from podwire.model.objects import Node
from podwire.model.proxyconfig import PRIMARY, ProxyConfig
from podwire.model.proxymode import ProxyMode
from podwire.model.servicetable import NodeFacts
from podwire.plan.ipvs import DEVICE

ZONE_LABEL = "topology.kubernetes.io/zone"


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
        loopback=_loopback(config),
    )


def _loopback(config: ProxyConfig) -> bool:
    """kube-proxy's back ends differ: iptables listens on 127.0.0.1 unless told not to, nftables and ipvs do not."""
    if config.proxy_mode is not ProxyMode.IPTABLES or not config.iptables.localhost_node_ports:
        return False
    wanted = config.node_port_networks
    return not config.node_port_addresses or any(ipaddress.ip_address("127.0.0.1") in network for network in wanted)


def primary_addresses(config: ProxyConfig, node: Node) -> tuple[IPAddress, ...]:
    """The node's own: its InternalIPs, and of a family that has none the first ExternalIP. A `bindAddress` that is one host's
    takes the place of those of its family (kube-proxy's detectNodeIPs)."""
    internal = tuple(ipaddress.ip_address(text) for text in node.internal_ips)
    external = [ipaddress.ip_address(text) for text in node.external_ips]
    found = [*internal]
    for version in (4, 6):
        if not any(ip.version == version for ip in internal):
            found += [ip for ip in external if ip.version == version][:1]
    if (bound := config.bind_ip) is not None:
        found = [bound, *(ip for ip in found if ip.version != bound.version)]
    return tuple(found)


def own_addresses(state: NetState) -> tuple[IPAddress, ...]:
    """Those of the host's interfaces that others can name it by."""
    # The addresses of virtual servers are Services', and not the node's own.
    held = (a.interface.ip for a in state.addresses if a.dev != DEVICE)
    return tuple(sorted((ip for ip in held if not _unfit(ip)), key=lambda ip: (ip.version, int(ip))))


def _node_port_addresses(config: ProxyConfig, node: Node, state: NetState) -> tuple[IPAddress, ...]:
    primary, own = primary_addresses(config, node), own_addresses(state)
    if not config.node_port_addresses:
        # kube-proxy's iptables and ipvs listen on all addresses of the node, its nftables on the primary ones.
        return primary if config.proxy_mode is ProxyMode.NFTABLES else tuple(dict.fromkeys((*primary, *own)))
    chosen = [ip for ip in own if any(ip in network for network in config.node_port_networks)]
    if PRIMARY in config.node_port_addresses:
        chosen = [*primary, *chosen]
    return tuple(dict.fromkeys(chosen))


def _unfit(ip: IPAddress) -> bool:
    """127/8 has a switch of its own, and link-local addresses are no places that others can name."""
    return ip.is_loopback or (ip.version == 6 and ip.is_link_local)


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
