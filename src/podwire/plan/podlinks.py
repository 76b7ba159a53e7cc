"""A pod's piece of the network: a veth pair, the node's end a port of the bridge, the pod's end with addresses and the
default route through the bridge's address.

All MACs follow from addresses, so both sides get permanent neighbour entries: a pod's first packet waits for no ARP or ND,
and the kernel's neighbour table, whose limit (gc_thresh3, 1024 by default) is one for all namespaces of a machine, does not
count permanent entries.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from podwire.model.addr import IPAddress, IPInterface, IPNetwork, family_of, mac_for
from podwire.model.ids import HOST, NetnsName, pod_netns
from podwire.model.kernelstate import Address, Device, Link, Neighbour, NetState, Route, Shaper, Veth
from podwire.plan.naming import BRIDGE, POD_DEVICE, host_veth, pod_alias


@dataclass(frozen=True, slots=True)
class PodAttachment:
    """What is to be known of a pod to plumb it. `ips` have the node's subnet as their prefix, or where pods are routed none
    but themselves; `gateways` are the bridge's addresses, one for each of `ips` in the same order; `gateway_mac` is the
    bridge's.

    The rest is for pods of container engines: `device` is the name of the pod's end; `wanted_mac` its MAC, where that shall
    not follow from the address; `host_mac` that of the node's end; `default_routes` False: another interface of the pod has
    them; `routes`: more destinations, through a gateway (None: the bridge); `to_pod`, `from_pod`: limits of bandwidth."""

    uid: str
    namespace: str
    name: str
    ips: tuple[IPInterface, ...]
    gateways: tuple[IPAddress, ...]
    gateway_mac: str
    mtu: int
    device: str = POD_DEVICE
    wanted_mac: str = ""
    host_mac: str | None = None
    default_routes: bool = True
    routes: tuple[tuple[IPNetwork, IPAddress | None], ...] = ()
    to_pod: Shaper | None = None
    from_pod: Shaper | None = None

    @property
    def mac(self) -> str:
        return self.wanted_mac or mac_for(self.ips[0].ip)


def plan_pod(pod: PodAttachment) -> Mapping[NetnsName, NetState]:
    """The pod's unit of desired state: its part of the node's namespace, and its own namespace whole."""
    return {HOST: _node_side(pod), pod_netns(pod.uid): _pod_side(pod)}


def fresh_pod_namespace() -> NetState:
    """What a network namespace holds when it has just been made."""
    return NetState(links={"lo": Link("lo", Device(), up=False)})


def _node_side(pod: PodAttachment) -> NetState:
    name = host_veth(pod.uid)
    link = Link(
        name,
        Veth(peer=pod.device, peer_ns=pod_netns(pod.uid)),
        mtu=pod.mtu,
        mac=pod.host_mac,
        master=BRIDGE,
        hairpin=True,
        alias=pod_alias(pod.namespace, pod.name),
        shaper=pod.to_pod,
    )
    neighbours = frozenset(Neighbour(BRIDGE, ip.ip, pod.mac) for ip in pod.ips)
    return NetState(links={name: link}, neighbours=neighbours)


def _pod_side(pod: PodAttachment) -> NetState:
    end = Link(
        pod.device,
        Veth(peer=host_veth(pod.uid), peer_ns=HOST),
        mtu=pod.mtu,
        mac=pod.mac,
        alias=pod_alias(pod.namespace, pod.name),
        shaper=pod.from_pod,
    )
    routed = all(ip.network.prefixlen == ip.max_prefixlen for ip in pod.ips)
    return NetState(
        links={"lo": Link("lo", Device()), pod.device: end},
        addresses=frozenset(Address(pod.device, ip) for ip in pod.ips),
        routes=frozenset(_routes(pod, onlink=routed)),
        neighbours=frozenset(Neighbour(pod.device, via, pod.gateway_mac) for via in pod.gateways),
        sysctls=_no_redirects(pod.device) if routed and any(ip.version == 6 for ip in pod.ips) else {},
    )


def _no_redirects(device: str) -> Mapping[str, str]:
    """A routed pod must not learn the short way to another: its answers would miss the node's conntrack. (In IPv4 the node
    can be told not to send redirects.)"""
    return {f"net/ipv6/conf/{device}/accept_redirects": "0"}


def _routes(pod: PodAttachment, *, onlink: bool) -> Iterator[Route]:
    if pod.default_routes:
        yield from (Route(family_of(via).any, dev=pod.device, via=via, onlink=onlink) for via in pod.gateways)
    through = {via.version: via for via in pod.gateways}
    for dst, via in pod.routes:
        if via is not None or dst.version in through:
            yield Route(dst, dev=pod.device, via=via or through[dst.version], onlink=onlink)
