"""flannel's vxlan: one device a family, per peer a neighbour, a forwarding entry and an onlink route; or, with DirectRouting,
a plain route to a peer on the same link. Only the sender decides that, so each side must accept both ways."""

import json
import re
from dataclasses import dataclass

from podwire.model.addr import Family, IPNetwork, family_of
from podwire.model.kernelstate import NetState, Vxlan
from podwire.model.netconf import VxlanBackend
from podwire.plan.backends.contract import Underlay, device, direct_route, public_addresses, wrong_type
from podwire.plan.leases import Lease, LeaseAttrs, vxlan_data
from podwire.plan.naming import vtep_device, vtep_mac
from podwire.plan.overlay import Peer, overhead, plan_peer
from podwire.plan.states import union

_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


@dataclass(frozen=True, slots=True)
class Vxlans:
    """`node`: the name from which the device's MAC follows, so that one made anew keeps the peers' entries true.
    `families`: those that have a subnet."""

    config: VxlanBackend
    underlay: Underlay
    node: str
    families: tuple[Family, ...]

    type = "vxlan"

    @property
    def mtu(self) -> int:
        return min(self._device_mtu(family) for family in self.families)

    def _device_mtu(self, family: Family) -> int:
        return (self.config.mtu or self.underlay.mtu) - overhead(family)

    def attrs(self) -> LeaseAttrs:
        data = {family: vxlan_data(self.config.vni, vtep_mac(self.node, family)) for family in self.families}
        return LeaseAttrs(
            **public_addresses(self.underlay, self.families),
            backend_type=self.type,
            backend_data=data.get(Family.IPV4, ""),
            backend_v6_data=data.get(Family.IPV6, ""),
        )

    def plan_base(self, subnets: tuple[IPNetwork, ...]) -> NetState:
        return union([self._device(subnet) for subnet in subnets])

    def _device(self, subnet: IPNetwork) -> NetState:
        family = family_of(subnet)
        local = self.underlay.local(family)
        assert local is not None, "make_backend has seen to it"
        kind = Vxlan(self.config.vni, self.config.port, local, self.underlay.device, gbp=self.config.gbp)
        name = vtep_device(family, self.config.vni)
        return device(name, kind, self._device_mtu(family), (subnet,), vtep_mac(self.node, family))

    def plan_lease(self, lease: Lease) -> NetState:
        units = [self._unit(lease, subnet) for subnet in lease.subnets if not self._fault(lease, subnet)]
        # One node's leases are planned by every other: what is remembered (plan_peer) is worth sharing.
        return union(units) if len(units) != 1 else units[0]

    def _unit(self, lease: Lease, subnet: IPNetwork) -> NetState:
        family = family_of(subnet)
        address = lease.attrs.address(family)
        assert address is not None
        if self.config.direct_routing and self.underlay.on_link(address):
            return NetState(routes=frozenset({direct_route(self.underlay, subnet, address)}))
        return plan_peer(Peer(lease.node, subnet, address, _vtep(lease, family)[1], self.config.vni))

    def objection(self, lease: Lease) -> str:
        return next(filter(None, (self._fault(lease, subnet) for subnet in lease.subnets)), "")

    def _fault(self, lease: Lease, subnet: IPNetwork) -> str:
        family = family_of(subnet)
        if fault := wrong_type(lease, self.type):
            return fault
        if family not in self.families:
            return f"{subnet}: this node has no {family.value} subnet"
        if lease.attrs.address(family) is None:
            return f"{subnet}: it tells no {family.value} address of its node"
        vni, mac = _vtep(lease, family)
        if vni != self.config.vni:
            return f"{subnet}: its VNI is {vni}, not {self.config.vni}"
        return "" if _MAC.fullmatch(mac) else f"{subnet}: it tells no MAC of its tunnel"


def _vtep(lease: Lease, family: Family) -> tuple[object, str]:
    """(VNI, MAC) as the lease tells them."""
    text = lease.attrs.data(family)
    document = json.loads(text) if text else None
    if not isinstance(document, dict):
        return None, ""
    return document.get("VNI"), str(document.get("VtepMAC", "")).lower()
