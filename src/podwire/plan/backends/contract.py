"""What every back end offers the node: what it says of itself in its lease, its own devices, and a unit for each peer."""

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol, TypedDict

from podwire.model.addr import Family, IPAddress, IPInterface, IPNetwork, family_of
from podwire.model.kernelstate import OWNER_ALIAS, Address, Link, LinkKind, NetState, Route
from podwire.plan.leases import Lease, LeaseAttrs

EMPTY = NetState()


@dataclass(frozen=True, slots=True, kw_only=True)
class Underlay:
    """The interface that carries the overlay's packets.

    interfaces: its addresses with their networks, at most one of each family. public: the addresses that peers are told, at
    most one of each family; they differ from the interface's behind a NAT."""

    device: str
    mtu: int
    interfaces: tuple[IPInterface, ...]
    public: tuple[IPAddress, ...]

    def local(self, family: Family) -> IPAddress | None:
        return next((i.ip for i in self.interfaces if family_of(i) is family), None)

    def told(self, family: Family) -> IPAddress | None:
        return next((address for address in self.public if family_of(address) is family), None)

    def on_link(self, address: IPAddress) -> bool:
        """Whether the address is on the interface's own network, so that no router lies between."""
        return any(i.version == address.version and address in i.network for i in self.interfaces)


class Backend(Protocol):
    """How packets get from node to node. Pure: the states are the caller's to program."""

    @property
    def type(self) -> str:
        """flannel's name for it."""
        ...

    @property
    def mtu(self) -> int:
        """The largest packet of a pod that every peer can be sent, whichever family."""
        ...

    def attrs(self) -> LeaseAttrs:
        """What this node's lease says."""
        ...

    def plan_base(self, subnets: tuple[IPNetwork, ...]) -> NetState:
        """The node's devices, with its own lease's subnets (at most one of each family)."""
        ...

    def plan_lease(self, lease: Lease) -> NetState:
        """What is needed to reach a peer; empty where `objection` has one against all of its subnets."""
        ...

    def objection(self, lease: Lease) -> str:
        """Why (some of) the peer's subnets cannot be reached, for the log; empty where all can."""
        ...


def own_address(subnet: IPNetwork) -> IPInterface:
    """The subnet's own address as a host address: traffic of the node itself leaves a tunnel with it."""
    own = subnet.network_address
    return ipaddress.ip_interface(f"{own}/{own.max_prefixlen}")


def device(name: str, kind: LinkKind, mtu: int, subnets: tuple[IPNetwork, ...], mac: str | None = None) -> NetState:
    """A tunnel device that is ours, with the own address of each subnet."""
    link = Link(name, kind, mtu=mtu, mac=mac, alias=OWNER_ALIAS)
    return NetState(links={name: link}, addresses=frozenset(Address(name, own_address(subnet)) for subnet in subnets))


def direct_route(underlay: Underlay, subnet: IPNetwork, gateway: IPAddress) -> Route:
    return Route(subnet, dev=underlay.device, via=gateway)


def wrong_type(lease: Lease, wanted: str) -> str:
    """The objection against a lease of another back end."""
    found = lease.attrs.backend_type or "none"
    return "" if found == wanted else f"its backend is {found}, not {wanted}"


class PublicAddresses(TypedDict):
    public_ip: IPv4Address | None
    public_ipv6: IPv6Address | None


def public_addresses(underlay: Underlay, families: Iterable[Family]) -> PublicAddresses:
    """The part of `LeaseAttrs` that all back ends fill alike."""
    told = {family: underlay.told(family) for family in families}
    four, six = told.get(Family.IPV4), told.get(Family.IPV6)
    return {
        "public_ip": four if isinstance(four, IPv4Address) else None,
        "public_ipv6": six if isinstance(six, IPv6Address) else None,
    }
