"""What a host's overlay is made of: the network configuration, the interface to the other hosts, the back end on it.

Each of them may change while the agent runs. Another setup is made of what there is then, and takes the place of the old one
as a whole.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from podwire.agent.overlayd.files import wireguard_keys
from podwire.agent.overlayd.host import Host
from podwire.model.addr import Family, IPAddress, IPNetwork, family_of
from podwire.model.kernelstate import NetState
from podwire.model.netconf import NetConfig, WireguardBackend
from podwire.plan.backends import Backend, Underlay, make_backend
from podwire.plan.overlayhost import plan_overlay_host, switches_to_read
from podwire.plan.underlay import Routing, Wish, choose_underlay, follow_underlay

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Two are equal if the host would be the same with either. `switches`: as they were before we set them."""

    config: NetConfig
    underlay: Underlay
    backend: Backend
    switches: Mapping[str, str] = field(compare=False)

    def base(self, subnets: tuple[IPNetwork, ...], *, blackhole: bool) -> NetState:
        """The host's own part of the kernel's state, with these subnets."""
        return plan_overlay_host(self.backend, self.underlay, subnets, self.switches, blackhole=blackhole)


@dataclass(frozen=True, slots=True, kw_only=True)
class SetupMaker:
    """`node`, `wish`, `can_reach`, `wireguard_key`: see `OverlayOptions`."""

    host: Host
    node: str
    wish: Wish
    can_reach: IPAddress | None
    wireguard_key: Path

    def make(self, config: NetConfig, devices: NetState, current: Setup | None = None) -> Setup:
        """Out of the host's devices and their addresses. The interface of `current` is kept while it has its addresses.

        Raises InvalidInput or Unsupported for what cannot be used on this host, OSError for WireGuard's key file."""
        self.host.require(config.backend.type)
        underlay = self._kept(config, devices, current) or self._chosen(config, devices)
        looked_at = current and (current.config.networks, current.underlay.interfaces)
        if looked_at != (config.networks, underlay.interfaces):
            _warn_of_overlap(config, underlay)
        keys = wireguard_keys(self.wireguard_key) if isinstance(config.backend, WireguardBackend) else None
        same = current is not None and current.underlay.device == underlay.device
        read = {key: self.host.read_switch(key) for key in switches_to_read(underlay)}
        return Setup(
            config=config,
            underlay=underlay,
            backend=make_backend(config, underlay, self.node, keys),
            switches=current.switches if current is not None and same else read,
        )

    def _kept(self, config: NetConfig, devices: NetState, current: Setup | None) -> Underlay | None:
        if current is None or current.config.families != config.families:
            return None
        kept = follow_underlay(current.underlay, devices)
        if kept is None or (_all_needed(config) and len(kept.interfaces) < len(config.families)):
            return None
        return kept

    def _chosen(self, config: NetConfig, devices: NetState) -> Underlay:
        wish, families, all_needed = self.wish, config.families, _all_needed(config)
        if self.can_reach is not None and not (wish.names or wish.patterns):
            source = self.host.source_towards(self.can_reach)
            wish = Wish(names=(str(source),) if source else (f"towards {self.can_reach}",), public=wish.public)
            return choose_underlay(devices, wish, Routing(devices={}), families, all_needed=all_needed)
        default = {family: self.host.default_device(family) for family in families}
        sources = (self.host.source_towards(_elsewhere(family)) for family in families)
        routing = Routing(devices=default, sources=tuple(filter(None, sources)))
        return choose_underlay(devices, wish, routing, families, all_needed=all_needed)


def _warn_of_overlap(config: NetConfig, underlay: Underlay) -> None:
    for interface in underlay.interfaces:
        network = config.network(family_of(interface))
        if network is not None and interface.ip in network:
            log.warning(
                "the pod network %s contains this host's own address %s: a host that leases the subnet around it cuts this one "
                "off; take a network that no host is in",
                network,
                interface.ip,
            )


def _all_needed(config: NetConfig) -> bool:
    """Whether each family of the network needs an address of that family on the interface."""
    return not (isinstance(config.backend, WireguardBackend) and config.backend.mode != "separate")


def _elsewhere(family: Family) -> IPAddress:
    """Addresses for documentation: whoever asks how they are reached learns of the default route."""
    return IPv4Address("192.0.2.1") if family is Family.IPV4 else IPv6Address("2001:db8::1")
