"""Back ends: how packets get from node to node, each a planner behind one contract (`contract.Backend`)."""

from podwire.model.addr import Family, IPNetwork
from podwire.model.errors import InvalidInput
from podwire.model.netconf import (
    AllocBackend,
    HostGwBackend,
    IpipBackend,
    NetConfig,
    UdpBackend,
    VxlanBackend,
    WireguardBackend,
)
from podwire.plan.backends.contract import Backend, Underlay
from podwire.plan.backends.ipip import IpipTunnel
from podwire.plan.backends.routed import Allocation, HostGateways
from podwire.plan.backends.udp import UdpTunnel
from podwire.plan.backends.vxlan import Vxlans
from podwire.plan.backends.wireguard import WireguardKeys, WireguardTunnel

__all__ = ["Backend", "UdpTunnel", "Underlay", "WireguardKeys", "make_backend"]

IPV6_MIN_MTU = 1280
"""RFC 8200, section 5. The kernel switches IPv6 off on a device that has less."""


def make_backend(config: NetConfig, underlay: Underlay, node: str, keys: WireguardKeys | None = None) -> Backend:
    """The back end that the configuration asks for, on this node's underlay. `keys`: needed by wireguard alone.

    Raises InvalidInput where the underlay lacks an address that the back end needs, or room for IPv6."""
    made = _make(config, underlay, node, keys)
    if Family.IPV6 in config.families and made.mtu < IPV6_MIN_MTU:
        raise InvalidInput(
            f"backend {made.type}: packets of {made.mtu} bytes would be the largest between nodes, and IPv6 needs "
            f"{IPV6_MIN_MTU}; give Backend a larger MTU, take an interface with a larger one, or switch IPv6 off"
        )
    return made


def _make(config: NetConfig, underlay: Underlay, node: str, keys: WireguardKeys | None) -> Backend:
    backend = config.backend
    families = config.families
    if not isinstance(backend, WireguardBackend) or backend.mode == "separate":
        _require(underlay, families, backend.type)
    match backend:
        case VxlanBackend():
            return Vxlans(backend, underlay, node, families)
        case HostGwBackend():
            return HostGateways(underlay, families)
        case AllocBackend():
            return Allocation(underlay, families)
        case IpipBackend():
            return IpipTunnel(backend, underlay)
        case UdpBackend():
            return UdpTunnel(backend, underlay, _ipv4(config))
        case WireguardBackend():
            if keys is None:
                raise ValueError("wireguard needs the node's keys")
            return WireguardTunnel(backend, underlay, config.networks, keys)


def _require(underlay: Underlay, families: tuple[Family, ...], type_: str) -> None:
    for family in families:
        if underlay.local(family) is None or underlay.told(family) is None:
            raise InvalidInput(
                f"backend {type_}: interface {underlay.device} has no {family.value} address, but the network configuration "
                f"enables {family.value}; choose another interface or switch the family off"
            )


def _ipv4(config: NetConfig) -> IPNetwork:
    network = config.network(Family.IPV4)
    assert network is not None, "parse_net_config lets udp have IPv4 only"
    return network
