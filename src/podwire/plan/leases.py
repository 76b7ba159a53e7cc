"""Leases: which node owns which subnet and how it is reached, in flannel's words. Pure: texts to values and back.

In etcd a lease is a key, `<prefix>/subnets/10.5.34.0-24` or `…/10.5.34.0-24&fd00:5:34::-64`, and a JSON value; with the "kube"
manager it is the podCIDR and the annotations of a Node. Names and formats are those of flannel 0.28 (pkg/subnet, pkg/lease).
What others wrote is kept as they wrote it: backend data stay JSON text, and fields that nobody here knows are written back.
"""

import ipaddress
import json
import re
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address
from typing import Any, TypeVar

from podwire.model.addr import Family, IPAddress, IPNetwork, family_of
from podwire.model.objects import Node
from podwire.plan.overlay import REMEMBERED, Peer

A = TypeVar("A", IPv4Address, IPv6Address)

ANNOTATION_PREFIX = "flannel.alpha.coreos.com"

_KEY = re.compile(r"(\d+\.\d+\.\d+\.\d+)-(\d+)(?:&([0-9a-f:.]+)-(\d+))?")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_KNOWN = ("PublicIP", "PublicIPv6", "BackendType", "BackendData", "BackendV6Data")


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseAttrs:
    """How the owner of a lease is reached. `backend_data`, `backend_v6_data`: compact JSON text, "" where there is none.

    `extra`: fields that others wrote and we do not know, as (name, JSON text)."""

    public_ip: IPv4Address | None = None
    public_ipv6: IPv6Address | None = None
    backend_type: str = ""
    backend_data: str = ""
    backend_v6_data: str = ""
    extra: tuple[tuple[str, str], ...] = ()

    def address(self, family: Family) -> IPAddress | None:
        return self.public_ip if family is Family.IPV4 else self.public_ipv6

    def data(self, family: Family) -> str:
        return self.backend_data if family is Family.IPV4 else self.backend_v6_data

    def same_node(self, other: "LeaseAttrs") -> bool:
        """Whether both are of one node, going by its address: the IPv4 one, or where there is none the other."""
        if self.public_ip is not None or other.public_ip is not None:
            return self.public_ip == other.public_ip
        return self.public_ipv6 is not None and self.public_ipv6 == other.public_ipv6


@dataclass(frozen=True, slots=True)
class Lease:
    """`node` owns `subnets`, at most one of each family, IPv4 first. It is the Node's name, or in etcd the key's last part."""

    node: str
    subnets: tuple[IPNetwork, ...]
    attrs: LeaseAttrs

    def subnet(self, family: Family) -> IPNetwork | None:
        return next((subnet for subnet in self.subnets if family_of(subnet) is family), None)

    def overlaps(self, subnets: Iterable[IPNetwork]) -> bool:
        return any(overlap(mine, other) for mine in self.subnets for other in subnets)


def overlap(one: IPNetwork, other: IPNetwork) -> bool:
    """As `ipaddress` has it, but ten times as fast: every lease is compared with every other."""
    if one.version != other.version:
        return False
    shift = one.max_prefixlen - min(one.prefixlen, other.prefixlen)
    return int(one.network_address) >> shift == int(other.network_address) >> shift


# --- etcd: keys and values ----------------------------------------------------------------------------------------------


def subnet_key(subnets: Iterable[IPNetwork]) -> str:
    """The last part of a lease's key. IPv6 alone stands behind an empty IPv4 part, `0.0.0.0-0`."""
    by_family = {family_of(subnet): subnet for subnet in subnets}
    first = by_family.get(Family.IPV4, ipaddress.IPv4Network("0.0.0.0/0"))
    key = f"{first.network_address}-{first.prefixlen}"
    second = by_family.get(Family.IPV6)
    return f"{key}&{second.network_address}-{second.prefixlen}" if second else key


@lru_cache(maxsize=REMEMBERED)
def parse_subnet_key(text: str) -> tuple[IPNetwork, ...]:
    """The subnets that a key's last part names; empty where it is none of flannel's."""
    match = _KEY.fullmatch(text)
    if match is None:
        return ()
    subnets: list[IPNetwork] = []
    try:
        if match[1] != "0.0.0.0":
            subnets.append(ipaddress.IPv4Network(f"{match[1]}/{match[2]}"))
        if match[3]:
            subnets.append(ipaddress.IPv6Network(f"{match[3]}/{match[4]}"))
    except ValueError:
        return ()
    return tuple(subnets)


def encode_attrs(attrs: LeaseAttrs) -> bytes:
    """A lease's value, byte for byte as flannel's Go writes it: order of fields, compact, a missing IPv6 address is null."""
    fields = [
        f'"PublicIP":"{attrs.public_ip or "0.0.0.0"}"',
        f'"PublicIPv6":"{attrs.public_ipv6}"' if attrs.public_ipv6 else '"PublicIPv6":null',
    ]
    if attrs.backend_type:
        fields.append(f'"BackendType":{json.dumps(attrs.backend_type)}')
    known = (("BackendData", attrs.backend_data), ("BackendV6Data", attrs.backend_v6_data))
    fields += [f"{json.dumps(name)}:{text}" for name, text in (*known, *attrs.extra) if text]
    return ("{" + ",".join(fields) + "}").encode()


def decode_attrs(value: bytes) -> LeaseAttrs | None:
    """The attributes in a lease's value; None for what is no JSON object with addresses where flannel has them.

    Field names are compared without regard to case, as Go does."""
    try:
        document = json.loads(value)
    except ValueError:
        return None
    if not isinstance(document, dict):
        return None
    known = {name.lower(): name for name in _KNOWN}
    fields = {known[key.lower()]: item for key, item in document.items() if key.lower() in known}
    try:
        v4 = ipaddress.IPv4Address(fields.get("PublicIP") or "0.0.0.0")
        v6 = ipaddress.IPv6Address(fields["PublicIPv6"]) if fields.get("PublicIPv6") else None
    except ValueError:
        return None
    return LeaseAttrs(
        public_ip=v4 if int(v4) else None,
        public_ipv6=v6 if v6 and int(v6) else None,
        backend_type=sys.intern(str(fields.get("BackendType") or "")),  # thousands have the same
        backend_data=_text(fields.get("BackendData")),
        backend_v6_data=_text(fields.get("BackendV6Data")),
        extra=tuple((key, compact(item)) for key, item in document.items() if key.lower() not in known),
    )


@lru_cache(maxsize=REMEMBERED)
def decode_lease(key: str, value: bytes) -> Lease | None:
    """The lease in etcd under a key's last part; None for what flannel would skip."""
    subnets, attrs = parse_subnet_key(key), decode_attrs(value)
    return Lease(key, subnets, attrs) if subnets and attrs else None


def compact(document: Any) -> str:
    """JSON as Go writes it: nothing between the tokens."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False)


def _text(document: Any) -> str:
    return "" if document is None else compact(document)


# --- the "kube" manager: annotations ------------------------------------------------------------------------------------

_ANNOTATIONS = ("backend-type", "backend-data", "backend-v6-data", "public-ip", "public-ipv6")
_READ = ("kube-subnet-manager", *_ANNOTATIONS, "public-ip-overwrite", "public-ipv6-overwrite")


def annotation(prefix: str, name: str) -> str:
    """An annotation's key. A prefix may have a slash of its own (`example.org/flannel`), which a name follows behind a dash."""
    if "/" not in prefix:
        return f"{prefix}/{name}"
    return prefix + name if prefix.endswith(("/", "-")) else f"{prefix}-{name}"


def encode_annotations(attrs: LeaseAttrs, families: Collection[Family], prefix: str = ANNOTATION_PREFIX) -> dict[str, str]:
    """What a node says of itself on its Node, for the families it has subnets of. Without data flannel writes `null`.

    The data are compact JSON, since flannel finds its own MAC in them by cutting the text at `:"`."""
    told = {"kube-subnet-manager": "true", "backend-type": attrs.backend_type}
    if Family.IPV4 in families:
        told |= {"backend-data": attrs.backend_data or "null", "public-ip": str(attrs.public_ip or "0.0.0.0")}
    if Family.IPV6 in families:
        told |= {"backend-v6-data": attrs.backend_v6_data or "null", "public-ipv6": str(attrs.public_ipv6 or "::")}
    return {annotation(prefix, name): value for name, value in told.items()}


def lease_of_node(node: Node, prefix: str = ANNOTATION_PREFIX) -> Lease | None:
    """The lease that a Node stands for; None where it has no podCIDR yet or flannel's manager does not serve it."""
    told = node.metadata.annotations
    return _lease_of_node(
        node.metadata.name, _cidr_texts(node), tuple(told.get(annotation(prefix, name), "") for name in _READ)
    )


def told_addresses(node: Node, attrs: LeaseAttrs, prefix: str = ANNOTATION_PREFIX) -> LeaseAttrs:
    """The attributes as a node publishes them: what its operator wrote to override its addresses (behind a NAT) counts."""
    told = node.metadata.annotations
    return replace(
        attrs,
        public_ip=_address(IPv4Address, told.get(annotation(prefix, "public-ip-overwrite"), "")) or attrs.public_ip,
        public_ipv6=_address(IPv6Address, told.get(annotation(prefix, "public-ipv6-overwrite"), "")) or attrs.public_ipv6,
    )


def forced_addresses(node: Node, prefix: str = ANNOTATION_PREFIX) -> tuple[IPAddress, ...]:
    """The addresses that a node's operator wrote on its Node for the node to use as its public ones, whatever it finds."""
    told = node.metadata.annotations
    four = _address(IPv4Address, told.get(annotation(prefix, "node-public-ip"), ""))
    six = _address(IPv6Address, told.get(annotation(prefix, "node-public-ipv6"), ""))
    return tuple(address for address in (four, six) if address is not None)


@lru_cache(maxsize=REMEMBERED)
def _lease_of_node(name: str, cidrs: tuple[str, ...], told: tuple[str, ...]) -> Lease | None:
    """`told`: the values of _READ. Remembered, because every agent of a process reads every node."""
    values = dict(zip(_READ, told, strict=True))
    subnets = networks(cidrs)
    if values["kube-subnet-manager"] != "true" or not subnets:
        return None
    return Lease(
        name,
        subnets,
        LeaseAttrs(
            public_ip=_address(IPv4Address, values["public-ip-overwrite"] or values["public-ip"]),
            public_ipv6=_address(IPv6Address, values["public-ipv6-overwrite"] or values["public-ipv6"]),
            backend_type=values["backend-type"],
            backend_data=_data(values["backend-data"]),
            backend_v6_data=_data(values["backend-v6-data"]),
        ),
    )


def pod_cidrs(node: Node) -> tuple[IPNetwork, ...]:
    """The node's subnets, at most one of each family; what does not parse is left out."""
    return networks(_cidr_texts(node))


def _cidr_texts(node: Node) -> tuple[str, ...]:
    return node.spec.pod_cidrs or ((node.spec.pod_cidr,) if node.spec.pod_cidr else ())


def networks(texts: Iterable[str]) -> tuple[IPNetwork, ...]:
    """At most one network of each family, IPv4 first; what does not parse is left out."""
    by_family: dict[Family, IPNetwork] = {}
    for text in texts:
        try:
            network = ipaddress.ip_network(text)
        except ValueError:
            continue
        by_family.setdefault(family_of(network), network)
    return tuple(by_family[family] for family in Family if family in by_family)


def _address(kind: type[A], text: str) -> A | None:
    try:
        address = kind(text)
    except ValueError:
        return None
    return address if int(address) else None


def _data(text: str) -> str:
    """An annotation's backend data, or nothing for what is not JSON."""
    try:
        return _text(json.loads(text)) if text else ""
    except ValueError:
        return ""


# --- VXLAN --------------------------------------------------------------------------------------------------------------


def vxlan_data(vni: int, mac: str) -> str:
    """A node's backend data for one family."""
    return compact({"VNI": vni, "VtepMAC": mac})


@lru_cache(maxsize=REMEMBERED)
def vxlan_peers(lease: Lease, vni: int) -> tuple[Peer, ...]:
    """How to reach the lease's subnets through VXLAN, per family; nothing where its owner uses another backend."""
    if lease.attrs.backend_type != "vxlan":
        return ()
    found = (_vxlan_peer(lease, subnet, vni) for subnet in lease.subnets)
    return tuple(peer for peer in found if peer)


def _vxlan_peer(lease: Lease, subnet: IPNetwork, vni: int) -> Peer | None:
    family = family_of(subnet)
    address, data = lease.attrs.address(family), lease.attrs.data(family)
    document = json.loads(data) if data else None
    if address is None or not isinstance(document, dict) or document.get("VNI") != vni:
        return None
    mac = str(document.get("VtepMAC", "")).lower()
    return Peer(lease.node, subnet, address, mac, vni) if _MAC.fullmatch(mac) else None
