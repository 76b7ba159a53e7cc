"""flannel's udp: IPv4 packets as UDP payload, carried by a process through a TUN device that has the whole network's route."""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network

from podwire.model.addr import Family, IPNetwork
from podwire.model.kernelstate import NetState, Route, Tun
from podwire.model.netconf import UdpBackend
from podwire.plan.backends.contract import EMPTY, Underlay, device, public_addresses
from podwire.plan.leases import Lease, LeaseAttrs
from podwire.plan.states import union

DEVICE = "flannel0"
OVERHEAD = 28
"""The outer IPv4 and UDP headers."""


@dataclass(frozen=True, slots=True)
class UdpTunnel:
    """The kernel's half. Which peer a packet goes to is not the kernel's to know: see `endpoint`."""

    config: UdpBackend
    underlay: Underlay
    network: IPNetwork

    type = "udp"

    @property
    def local(self) -> IPv4Address:
        """Where this node receives its peers' packets."""
        local = self.underlay.local(Family.IPV4)
        assert isinstance(local, IPv4Address), "make_backend has seen to it"
        return local

    @property
    def mtu(self) -> int:
        return self.underlay.mtu - OVERHEAD

    def attrs(self) -> LeaseAttrs:
        """Neither type nor data, as flannel has it."""
        return LeaseAttrs(**public_addresses(self.underlay, (Family.IPV4,)))

    def plan_base(self, subnets: tuple[IPNetwork, ...]) -> NetState:
        # Not from the kernel's own routes, since the address has no network.
        whole = NetState(routes=frozenset({Route(self.network, dev=DEVICE)}))
        return union([device(DEVICE, Tun(), self.mtu, subnets), whole])

    def plan_lease(self, lease: Lease) -> NetState:
        return EMPTY

    def endpoint(self, lease: Lease) -> tuple[IPv4Network, IPv4Address] | None:
        """The peer's subnet and where its packets are sent; None where `objection` has one."""
        subnet, address = lease.subnet(Family.IPV4), lease.attrs.public_ip
        return (subnet, address) if isinstance(subnet, IPv4Network) and address else None

    def objection(self, lease: Lease) -> str:
        """flannel's udp takes leases of any type."""
        return "" if self.endpoint(lease) else "it has no IPv4 subnet or tells no IPv4 address"
