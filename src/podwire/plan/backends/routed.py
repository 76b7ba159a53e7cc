"""The back ends without an encapsulation of their own: host-gw routes to peers on the same link, alloc leaves it to others."""

from dataclasses import dataclass

from podwire.model.addr import Family, IPNetwork, family_of
from podwire.model.errors import InvalidInput
from podwire.model.kernelstate import NetState
from podwire.plan.backends.contract import EMPTY, Underlay, direct_route, public_addresses, wrong_type
from podwire.plan.leases import Lease, LeaseAttrs


@dataclass(frozen=True, slots=True)
class HostGateways:
    """flannel's host-gw: `subnet via PublicIP`. Raises InvalidInput where peers are told another address than the
    interface's: their routes could not lead here."""

    underlay: Underlay
    families: tuple[Family, ...]

    type = "host-gw"

    def __post_init__(self) -> None:
        for family in self.families:
            told, local = self.underlay.told(family), self.underlay.local(family)
            if told != local:
                raise InvalidInput(
                    f"backend host-gw: the public address {told} is not {self.underlay.device}'s own ({local}), so no "
                    "route can lead to it; leave --public-ip away or choose another backend"
                )

    @property
    def mtu(self) -> int:
        return self.underlay.mtu

    def attrs(self) -> LeaseAttrs:
        return LeaseAttrs(**public_addresses(self.underlay, self.families), backend_type=self.type)

    def plan_base(self, subnets: tuple[IPNetwork, ...]) -> NetState:
        return EMPTY

    def plan_lease(self, lease: Lease) -> NetState:
        routes = [
            direct_route(self.underlay, subnet, address)
            for subnet in lease.subnets
            if not self._fault(lease, subnet) and (address := lease.attrs.address(family_of(subnet)))
        ]
        return NetState(routes=frozenset(routes)) if routes else EMPTY

    def objection(self, lease: Lease) -> str:
        return next(filter(None, (self._fault(lease, subnet) for subnet in lease.subnets)), "")

    def _fault(self, lease: Lease, subnet: IPNetwork) -> str:
        family = family_of(subnet)
        address = lease.attrs.address(family)
        if fault := wrong_type(lease, self.type):
            return fault
        if family not in self.families or address is None:
            return f"{subnet}: not both nodes have an {family.value} address"
        return "" if self.underlay.on_link(address) else f"{subnet}: {address} is not on the link of {self.underlay.device}"


@dataclass(frozen=True, slots=True)
class Allocation:
    """flannel's alloc: subnets are leased, nothing is programmed."""

    underlay: Underlay
    families: tuple[Family, ...]

    type = "alloc"

    @property
    def mtu(self) -> int:
        return self.underlay.mtu

    def attrs(self) -> LeaseAttrs:
        return LeaseAttrs(**public_addresses(self.underlay, self.families), backend_type=self.type)

    def plan_base(self, subnets: tuple[IPNetwork, ...]) -> NetState:
        return EMPTY

    def plan_lease(self, lease: Lease) -> NetState:
        return EMPTY

    def objection(self, lease: Lease) -> str:
        return ""
