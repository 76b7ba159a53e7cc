"""flannel's ipip: IPv4 in IPv4 through one device, an onlink route per peer; DirectRouting as with vxlan."""

from dataclasses import dataclass

from podwire.model.addr import Family, IPNetwork
from podwire.model.kernelstate import Ipip, NetState, Route
from podwire.model.netconf import IpipBackend
from podwire.plan.backends.contract import EMPTY, Underlay, device, direct_route, public_addresses, wrong_type
from podwire.plan.leases import Lease, LeaseAttrs

DEVICE = "flannel.ipip"
OVERHEAD = 20
"""The outer IPv4 header."""


@dataclass(frozen=True, slots=True)
class IpipTunnel:
    config: IpipBackend
    underlay: Underlay

    type = "ipip"

    @property
    def mtu(self) -> int:
        return self.underlay.mtu - OVERHEAD

    def attrs(self) -> LeaseAttrs:
        return LeaseAttrs(**public_addresses(self.underlay, (Family.IPV4,)), backend_type=self.type)

    def plan_base(self, subnets: tuple[IPNetwork, ...]) -> NetState:
        local = self.underlay.local(Family.IPV4)
        assert local is not None, "make_backend has seen to it"
        return device(DEVICE, Ipip(local), self.mtu, subnets)

    def plan_lease(self, lease: Lease) -> NetState:
        address, subnet = lease.attrs.public_ip, lease.subnet(Family.IPV4)
        if self.objection(lease) or address is None or subnet is None:
            return EMPTY
        if self.config.direct_routing and self.underlay.on_link(address):
            return NetState(routes=frozenset({direct_route(self.underlay, subnet, address)}))
        return NetState(routes=frozenset({Route(subnet, dev=DEVICE, via=address, onlink=True)}))

    def objection(self, lease: Lease) -> str:
        if fault := wrong_type(lease, self.type):
            return fault
        missing = lease.attrs.public_ip is None or lease.subnet(Family.IPV4) is None
        return "it has no IPv4 subnet or tells no IPv4 address" if missing else ""
