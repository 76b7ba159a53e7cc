"""The overlay between nodes, in flannel's shape (VXLAN, static forwarding, "kube subnet manager"): a podwire node and a
flannel node form one network.

A node tells its peers about itself in annotations of its Node object. Per family there is one tunnel device and, for every
other node, in this order: a permanent neighbour (the peer subnet's own address → the peer's tunnel MAC), a permanent
forwarding entry (tunnel MAC → the peer's underlay address) and an onlink route (peer subnet via its own address).
Names and formats are those of flannel 0.28 (pkg/subnet/kube, pkg/backend/vxlan).
"""

import ipaddress
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from podwire.model.addr import Family, IPAddress, IPInterface, IPNetwork, family_of
from podwire.model.kernelstate import OWNER_ALIAS, Address, FdbEntry, Link, Neighbour, NetState, Route, Vxlan
from podwire.model.objects import Node
from podwire.plan.naming import vtep_device

PREFIX = "flannel.alpha.coreos.com/"
DEFAULT_VNI = 1
DEFAULT_PORT = 8472
"""flannel's UDP port. (The kernel's own default, through iproute2, is the IANA port 4789: always say it.)"""

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


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
    """Another node's end for one family, as its Node object tells it."""

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


@lru_cache(maxsize=16384)
def plan_peer(peer: Peer) -> NetState:
    """The peer's unit: neighbour, forwarding entry, route. Remembered: all nodes of a process plan the same peers."""
    device = vtep_device(peer.family, peer.vni)
    own = peer.subnet.network_address
    return NetState(
        routes=frozenset({Route(peer.subnet, dev=device, via=own, onlink=True)}),
        neighbours=frozenset({Neighbour(device, own, peer.mac)}),
        fdb=frozenset({FdbEntry(device, peer.mac, peer.public_ip)}),
    )


def annotations(ends: Iterable[tuple[IPAddress, str]], vni: int = DEFAULT_VNI) -> dict[str, str]:
    """What a node says of itself: `ends` are its underlay address and tunnel MAC, for each family it has.

    The JSON is compact and VNI comes first, because flannel finds its own MAC in it by cutting the text at `:"`."""
    told = {PREFIX + "kube-subnet-manager": "true", PREFIX + "backend-type": "vxlan"}
    for address, mac in ends:
        data, public = _keys(family_of(address))
        told[data] = json.dumps({"VNI": vni, "VtepMAC": mac}, separators=(",", ":"))
        told[public] = str(address)
    return told


def peers_of(node: Node, vni: int = DEFAULT_VNI) -> tuple[Peer, ...]:
    """How to reach a node's pods, per family; empty where it does not say so (yet), or says it in another backend's terms."""
    told = node.metadata.annotations
    if told.get(PREFIX + "kube-subnet-manager") != "true" or told.get(PREFIX + "backend-type") != "vxlan":
        return ()
    return _peers(node.metadata.name, _cidr_texts(node), tuple(told.get(key, "") for key in _PEER_KEYS), vni)


def pod_cidrs(node: Node) -> tuple[IPNetwork, ...]:
    """The node's subnets, at most one of each family; what does not parse is left out."""
    return _networks(_cidr_texts(node))


def _cidr_texts(node: Node) -> tuple[str, ...]:
    return node.spec.pod_cidrs or ((node.spec.pod_cidr,) if node.spec.pod_cidr else ())


def _networks(texts: tuple[str, ...]) -> tuple[IPNetwork, ...]:
    by_family: dict[Family, IPNetwork] = {}
    for text in texts:
        try:
            network = ipaddress.ip_network(text)
        except ValueError:
            continue
        by_family.setdefault(family_of(network), network)
    return tuple(by_family.values())


def _keys(family: Family) -> tuple[str, str]:
    if family is Family.IPV4:
        return PREFIX + "backend-data", PREFIX + "public-ip"
    return PREFIX + "backend-v6-data", PREFIX + "public-ipv6"


_PEER_KEYS = tuple(key for data, public in map(_keys, Family) for key in (data, public, public + "-overwrite"))


@lru_cache(maxsize=4096)
def _peers(name: str, cidrs: tuple[str, ...], told: tuple[str, ...], vni: int) -> tuple[Peer, ...]:
    """`told`: the values of _PEER_KEYS. Remembered, because every agent of a process reads every node."""
    values = dict(zip(_PEER_KEYS, told, strict=True))
    found = (_peer(name, subnet, values, vni) for subnet in _networks(cidrs))
    return tuple(peer for peer in found if peer)


def _peer(name: str, subnet: IPNetwork, told: Mapping[str, str], vni: int) -> Peer | None:
    data_key, public_key = _keys(family_of(subnet))
    try:
        data = json.loads(told[data_key])
        public = ipaddress.ip_address(told[public_key + "-overwrite"] or told[public_key])
    except ValueError:
        return None
    if not isinstance(data, dict) or data.get("VNI") != vni or family_of(public) is not family_of(subnet):
        return None
    mac = str(data.get("VtepMAC", "")).lower()
    return Peer(name, subnet, public, mac, vni) if _MAC.fullmatch(mac) else None
