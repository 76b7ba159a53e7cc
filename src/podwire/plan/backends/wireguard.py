"""flannel's wireguard: encrypted, one device a family (mode "separate") or one for both; a peer is its public key with its
subnets as allowed networks, and the whole pod network is routed to the device."""

import base64
import binascii
import json
from dataclasses import dataclass, field

from podwire.model.addr import Family, IPAddress, IPNetwork, family_of
from podwire.model.errors import InvalidInput
from podwire.model.kernelstate import NetState, Route, Wireguard, WireguardPeer
from podwire.model.netconf import WireguardBackend
from podwire.plan.backends.contract import EMPTY, Underlay, device, public_addresses, wrong_type
from podwire.plan.leases import Lease, LeaseAttrs, compact
from podwire.plan.states import union

DEVICE, DEVICE_V6 = "flannel-wg", "flannel-wg-v6"
OVERHEAD = 80
"""The outer IPv6 and UDP headers, WireGuard's own and its tag; flannel counts IPv6 always."""

SEPARATE = "separate"
_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class WireguardKeys:
    """This node's keys, in base64."""

    private: str = field(repr=False)
    public: str


@dataclass(frozen=True, slots=True)
class WireguardTunnel:
    """`networks`: the pod network of each family that has a subnet. Raises InvalidInput for a malformed PSK."""

    config: WireguardBackend
    underlay: Underlay
    networks: tuple[IPNetwork, ...]
    keys: WireguardKeys

    type = "wireguard"

    def __post_init__(self) -> None:
        if self.config.psk and not is_key(self.config.psk):
            raise InvalidInput("backend wireguard: PSK is no WireGuard key; make one with `wg genpsk`")

    @property
    def families(self) -> tuple[Family, ...]:
        return tuple(map(family_of, self.networks))

    @property
    def mtu(self) -> int:
        return (self.config.mtu or self.underlay.mtu) - OVERHEAD

    def attrs(self) -> LeaseAttrs:
        data = {family: compact({"PublicKey": self.keys.public, "Port": self._port(family)}) for family in self.families}
        told = [family for family in Family if self.underlay.told(family)]
        return LeaseAttrs(
            **public_addresses(self.underlay, told),
            backend_type=self.type,
            backend_data=data.get(Family.IPV4, ""),
            backend_v6_data=data.get(Family.IPV6, ""),
        )

    def plan_base(self, subnets: tuple[IPNetwork, ...]) -> NetState:
        by_device: dict[str, list[IPNetwork]] = {}
        for subnet in subnets:
            by_device.setdefault(self._device(family_of(subnet)), []).append(subnet)
        devices = [
            device(name, Wireguard(self._port(family_of(held[0])), self.keys.private), self.mtu, tuple(held))
            for name, held in by_device.items()
        ]
        routes = frozenset(Route(network, dev=self._device(family_of(network))) for network in self.networks)
        return union([*devices, NetState(routes=routes)])

    def plan_lease(self, lease: Lease) -> NetState:
        if wrong_type(lease, self.type):
            return EMPTY
        by_device: dict[str, list[IPNetwork]] = {}
        for subnet in lease.subnets:
            if not self._fault(lease, family_of(subnet)):
                by_device.setdefault(self._device(family_of(subnet)), []).append(subnet)
        peers = [self._peer(lease, name, subnets) for name, subnets in by_device.items()]
        return NetState(wireguard=frozenset(peers)) if peers else EMPTY

    def _peer(self, lease: Lease, name: str, subnets: list[IPNetwork]) -> WireguardPeer:
        family = family_of(subnets[-1])
        key, port = _told(lease, family)
        address = self._endpoint(lease, family)
        return WireguardPeer(
            name,
            key,
            tuple(sorted(subnets, key=lambda n: (n.version, int(n.network_address)))),
            endpoint=(address, port or self._port(family)) if address else None,
            keepalive=self.config.keepalive,
            psk=self.config.psk,
        )

    def objection(self, lease: Lease) -> str:
        if fault := wrong_type(lease, self.type):
            return fault
        return next(filter(None, (self._fault(lease, family_of(subnet)) for subnet in lease.subnets)), "")

    def _fault(self, lease: Lease, family: Family) -> str:
        if family not in self.families:
            return f"this node has no {family.value} subnet"
        if not is_key(_told(lease, family)[0]):
            return f"it tells no public key for {family.value}"
        return "" if self._endpoint(lease, family) else f"it tells no address that mode {self.config.mode} can use"

    def _device(self, family: Family) -> str:
        return DEVICE_V6 if self.config.mode == SEPARATE and family is Family.IPV6 else DEVICE

    def _port(self, family: Family) -> int:
        return self.config.port_v6 if self._device(family) == DEVICE_V6 else self.config.port

    def _endpoint(self, lease: Lease, family: Family) -> IPAddress | None:
        four, six = lease.attrs.public_ip, lease.attrs.public_ipv6
        match self.config.mode:
            case "separate":
                return lease.attrs.address(family)
            case "ipv4":
                return four
            case "ipv6":
                return six
            case _:
                return self._likelier(four, six)

    def _likelier(self, four: IPAddress | None, six: IPAddress | None) -> IPAddress | None:
        """Mode "auto": IPv4 where the peer's is public, else IPv6 where both ends' are, else IPv4 (flannel's order)."""
        if four is None or six is None:
            return four or six
        local4, local6 = self.underlay.local(Family.IPV4), self.underlay.local(Family.IPV6)
        if not four.is_private and local4 is not None:
            return four
        return six if not six.is_private and local6 is not None and not local6.is_private else four


def is_key(text: str) -> bool:
    """Whether this is a key in base64, as `wg` writes it."""
    try:
        return len(base64.b64decode(text, validate=True)) == _KEY_BYTES
    except (binascii.Error, ValueError):
        return False


def _told(lease: Lease, family: Family) -> tuple[str, int]:
    """The public key and port of a lease; flannel before 0.27 told no port."""
    text = lease.attrs.data(family)
    document = json.loads(text) if text else None
    if not isinstance(document, dict):
        return "", 0
    port = document.get("Port")
    return str(document.get("PublicKey", "")), port if isinstance(port, int) and 0 < port < 65536 else 0
