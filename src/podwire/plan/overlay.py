"""The overlay between nodes, in flannel's shape (VXLAN, static forwarding): a podwire node and a flannel node form one network.

What a node tells of itself is its lease (`podwire.plan.leases`). Per family there is one tunnel device and, for every
other node, in this order: a permanent neighbour (the peer subnet's own address → the peer's tunnel MAC), a permanent
forwarding entry (tunnel MAC → the peer's underlay address) and an onlink route (peer subnet via its own address).
Names and formats are those of flannel 0.28 (pkg/backend/vxlan).
"""

import ipaddress
from dataclasses import dataclass
from functools import lru_cache

from podwire.model.addr import Family, IPAddress, IPInterface, IPNetwork, family_of
from podwire.model.kernelstate import OWNER_ALIAS, Address, FdbEntry, Link, Neighbour, NetState, Route, Vxlan
from podwire.plan.naming import vtep_device

REMEMBERED = 512
"""As many leases as the nodes of a lab have, of two families: its agents, in one process, all read and plan the same ones. An
agent alone does so once for each, and with thousands of peers would only hold more memory."""

DEFAULT_VNI = 1
DEFAULT_PORT = 8472
"""flannel's UDP port. (The kernel's own default, through iproute2, is the IANA port 4789: always say it.)"""


def overhead(underlay: Family) -> int:
    """Bytes that the encapsulation takes from the underlay's MTU: outer IP 20 or 40, UDP 8, VXLAN 8, inner Ethernet 14."""
    return 50 if underlay is Family.IPV4 else 70


@dataclass(frozen=True, slots=True)
class Tunnel:
    """This node's end for one family: its subnet, underlay address and device, and the MAC it tells its peers."""

    subnet: IPNetwork
    local: IPAddress
    mac: str
    underlay: str
    underlay_mtu: int
    vni: int = DEFAULT_VNI
    port: int = DEFAULT_PORT

    @property
    def family(self) -> Family:
        return family_of(self.subnet)

    @property
    def device(self) -> str:
        return vtep_device(self.family, self.vni)

    @property
    def mtu(self) -> int:
        return self.underlay_mtu - overhead(family_of(self.local))


@dataclass(frozen=True, slots=True)
class Peer:
    """Another node's end for one family, as its lease tells it."""

    node: str
    subnet: IPNetwork
    public_ip: IPAddress
    mac: str
    vni: int = DEFAULT_VNI

    @property
    def family(self) -> Family:
        return family_of(self.subnet)


def plan_tunnel(tunnel: Tunnel) -> NetState:
    """The device and its address: the subnet's own, as a host address, since traffic of the node itself leaves with it."""
    own = tunnel.subnet.network_address
    host: IPInterface = ipaddress.ip_interface(f"{own}/{own.max_prefixlen}")
    link = Link(
        tunnel.device,
        Vxlan(vni=tunnel.vni, port=tunnel.port, local=tunnel.local, underlay=tunnel.underlay),
        mtu=tunnel.mtu,
        mac=tunnel.mac,
        alias=OWNER_ALIAS,
    )
    return NetState(links={link.name: link}, addresses=frozenset({Address(tunnel.device, host)}))


@lru_cache(maxsize=REMEMBERED)
def plan_peer(peer: Peer) -> NetState:
    """The peer's unit: neighbour, forwarding entry, route. Remembered: all nodes of a process plan the same peers."""
    device = vtep_device(peer.family, peer.vni)
    own = peer.subnet.network_address
    return NetState(
        routes=frozenset({Route(peer.subnet, dev=device, via=own, onlink=True)}),
        neighbours=frozenset({Neighbour(device, own, peer.mac)}),
        fdb=frozenset({FdbEntry(device, peer.mac, peer.public_ip)}),
    )
