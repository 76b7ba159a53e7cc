"""flannel's network configuration: what it says, checked, with flannel's defaults filled in.

The text is JSON, in etcd below `<prefix>/config` or in a file (`/etc/kube-flannel/net-conf.json`). Keys are compared without
regard to case, as Go does; of two spellings the later counts. Rules and defaults are those of flannel 0.28
(pkg/subnet/config.go, pkg/backend/*): a subnet network holds at least four subnets, the first is not given out.
"""

import ipaddress
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from podwire.model.addr import Family, IPAddress, IPNetwork, family_of
from podwire.model.errors import InvalidInput

DEFAULT_VNI = 1
DEFAULT_VXLAN_PORT = 8472
"""What a Linux VXLAN device takes where it is told no port; flannel's Port 0. (iproute2's default is the IANA port 4789.)"""
DEFAULT_UDP_PORT = 8285
DEFAULT_WIREGUARD_PORT = 51820
DEFAULT_WIREGUARD_PORT_V6 = 51821

MAX_MTU = 65535
WIREGUARD_MODES = ("separate", "auto", "ipv4", "ipv6")


@dataclass(frozen=True, slots=True, kw_only=True)
class VxlanBackend:
    """`mtu`: of packets that leave the node, 0 for the underlay's. `direct_routing`: no tunnel to peers on the same link."""

    vni: int = DEFAULT_VNI
    port: int = DEFAULT_VXLAN_PORT
    gbp: bool = False
    learning: bool = False
    direct_routing: bool = False
    mtu: int = 0

    type = "vxlan"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostGwBackend:
    """Plain routes to the peers, which must be on the same link."""

    type = "host-gw"


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocBackend:
    """Subnets are leased; somebody else carries the packets."""

    type = "alloc"


@dataclass(frozen=True, slots=True, kw_only=True)
class UdpBackend:
    """IPv4 packets in UDP datagrams, by a process."""

    port: int = DEFAULT_UDP_PORT

    type = "udp"


@dataclass(frozen=True, slots=True, kw_only=True)
class IpipBackend:
    """IPv4 in IPv4."""

    direct_routing: bool = False

    type = "ipip"


@dataclass(frozen=True, slots=True, kw_only=True)
class WireguardBackend:
    """`mode`: `separate` has one device a family, the others one device for both. `keepalive` in seconds, 0: none.
    `psk`: base64, never shown. `mtu` as for vxlan."""

    port: int = DEFAULT_WIREGUARD_PORT
    port_v6: int = DEFAULT_WIREGUARD_PORT_V6
    psk: str = field(default="", repr=False)
    keepalive: int = 0
    mode: str = "separate"
    mtu: int = 0

    type = "wireguard"


BackendConfig = VxlanBackend | HostGwBackend | AllocBackend | UdpBackend | IpipBackend | WireguardBackend

BACKEND_TYPES = tuple(
    kind.type for kind in (VxlanBackend, HostGwBackend, AllocBackend, UdpBackend, IpipBackend, WireguardBackend)
)


@dataclass(frozen=True, slots=True)
class SubnetRange:
    """The subnets of one family that may be leased: those of `length` from `first` to `last`, both included."""

    network: IPNetwork
    length: int
    first: IPAddress
    last: IPAddress

    @property
    def count(self) -> int:
        return ((int(self.last) - int(self.first)) >> self._shift) + 1

    def at(self, index: int) -> IPNetwork:
        """The subnet number `index`, from 0 to `count` - 1. Raises IndexError outside."""
        if not 0 <= index < self.count:
            raise IndexError(f"subnet {index} of {self.count}")
        address = type(self.first)(int(self.first) + (index << self._shift))
        return ipaddress.ip_network(f"{address}/{self.length}")

    def __contains__(self, subnet: object) -> bool:
        """Whether a subnet may be leased here (flannel's isSubnetConfigCompat)."""
        if not isinstance(subnet, ipaddress.IPv4Network | ipaddress.IPv6Network):
            return False
        same_kind = subnet.version == self.network.version and subnet.prefixlen == self.length
        return same_kind and int(self.first) <= int(subnet.network_address) <= int(self.last)

    def __iter__(self) -> Iterator[IPNetwork]:
        return (self.at(index) for index in range(self.count))

    @property
    def _shift(self) -> int:
        return family_of(self.network).bits - self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class NetConfig:
    """A network configuration that holds together.

    networks: the pod network of each family that is enabled, IPv4 first. ranges: what may be leased, by family; empty where
    subnets are not leased (the "kube" manager). warnings: sentences for the log about what is allowed but odd."""

    networks: tuple[IPNetwork, ...]
    ranges: Mapping[Family, SubnetRange]
    backend: BackendConfig
    enable_nftables: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def families(self) -> tuple[Family, ...]:
        return tuple(map(family_of, self.networks))

    def network(self, family: Family) -> IPNetwork | None:
        return next((network for network in self.networks if family_of(network) is family), None)


def parse_net_config(text: str | bytes, *, source: str = "network config", leased: bool = True) -> NetConfig:
    """The configuration in `text`, which stands in `source` (for messages).

    leased: subnets are leased from the networks, so that SubnetLen, SubnetMin and SubnetMax count; False for the "kube"
    manager, where each Node has its podCIDR. Raises InvalidInput for what is wrong."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise InvalidInput(f"{source} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise InvalidInput(f"{source} must be a JSON object with a Network and a Backend, but is {_kind(document)}")
    keys = _Keys(document, source)
    networks, ranges = [], {}
    for family, enabled in ((Family.IPV4, keys.flag("EnableIPv4", True)), (Family.IPV6, keys.flag("EnableIPv6", False))):
        given = _subnet_keys(keys, family)
        if not enabled:
            continue
        if given.network is None:
            raise InvalidInput(f"{source}: {given.prefix}Network is missing; give the pod network, such as {_EXAMPLE[family]}")
        networks.append(given.network)
        if leased:
            ranges[family] = _range(given, source)
    if not networks:
        raise InvalidInput(f"{source}: EnableIPv4 and EnableIPv6 are both false; enable at least one")
    nftables = keys.flag("EnableNFTables", False)
    backend = _backend(keys)
    keys.unknown()
    _check_families(backend, tuple(networks), source)
    return NetConfig(
        networks=tuple(networks), ranges=ranges, backend=backend, enable_nftables=nftables, warnings=tuple(keys.warnings)
    )


_EXAMPLE = {Family.IPV4: '"10.244.0.0/16"', Family.IPV6: '"fd00:10:244::/56"'}


class _Keys:
    """One JSON object, read key by key without regard to case; null counts as absent, as in Go."""

    def __init__(self, document: Mapping[str, Any], source: str) -> None:
        self._values = {key.lower(): (key, value) for key, value in document.items()}
        self._read: set[str] = set()
        self.source = source
        self.warnings: list[str] = []

    def get(self, key: str) -> Any:
        self._read.add(key.lower())
        return self._values.get(key.lower(), (key, None))[1]

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise InvalidInput(f"{self.source}: {key} must be true or false, but is {_kind(value)}")
        return value

    def number(self, key: str, default: int, lowest: int, highest: int) -> int:
        """An integer; 0 and absence are the default, since flannel cannot tell them apart either."""
        value = self.get(key)
        if value is None or (value == 0 and not isinstance(value, bool)):
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidInput(f"{self.source}: {key} must be a whole number, but is {_kind(value)}")
        if not lowest <= value <= highest:
            raise InvalidInput(f"{self.source}: {key} is {value}; it must be between {lowest} and {highest}")
        return value

    def text(self, key: str) -> str:
        value = self.get(key)
        if value is None:
            return ""
        if not isinstance(value, str):
            raise InvalidInput(f"{self.source}: {key} must be a string, but is {_kind(value)}")
        return value

    def unknown(self) -> None:
        """Warn of keys that nobody read: most are misspelt, and flannel says nothing of them."""
        for lower, (key, _) in self._values.items():
            if lower not in self._read:
                self.warnings.append(f"{self.source}: {key} is not known and has no effect")


@dataclass(frozen=True, slots=True)
class _SubnetKeys:
    """What is said of one family's subnets. `prefix`: of the key names."""

    prefix: str
    network: IPNetwork | None
    length: int
    first: IPAddress | None
    last: IPAddress | None


def _subnet_keys(keys: _Keys, family: Family) -> _SubnetKeys:
    prefix = "" if family is Family.IPV4 else "IPv6"
    return _SubnetKeys(
        prefix,
        _network(keys, prefix + "Network", family),
        keys.number(prefix + "SubnetLen", 0, 1, family.bits),
        _address(keys, prefix + "SubnetMin", family),
        _address(keys, prefix + "SubnetMax", family),
    )


def _network(keys: _Keys, key: str, family: Family) -> IPNetwork | None:
    text = keys.text(key)
    if not text:
        return None
    try:
        if "/" not in text:
            raise ValueError("it has no prefix length")
        network = ipaddress.ip_network(text, strict=False)
    except ValueError as error:
        raise InvalidInput(f"{keys.source}: {key} {text!r} is no network ({error}); write it as {_EXAMPLE[family]}") from error
    if family_of(network) is not family:
        raise InvalidInput(f"{keys.source}: {key} {text} must be an {family.value} network")
    if not network.prefixlen or network.is_multicast or network.is_loopback or network.is_link_local:
        raise InvalidInput(f"{keys.source}: pods cannot have addresses of {key} {text}; take a private network")
    return network


def _address(keys: _Keys, key: str, family: Family) -> IPAddress | None:
    text = keys.text(key)
    if not text:
        return None
    try:
        address = ipaddress.ip_address(text)
    except ValueError as error:
        raise InvalidInput(f"{keys.source}: {key} {text!r} is no IP address") from error
    if family_of(address) is not family:
        raise InvalidInput(f"{keys.source}: {key} {text} must be an {family.value} address")
    return None if int(address) == 0 else address


def _range(given: _SubnetKeys, source: str) -> SubnetRange:
    network, prefix = given.network, given.prefix
    assert network is not None
    bits = family_of(network).bits
    length = given.length or _default_length(network, f"{source}: {prefix}Network")
    longest = bits - 2
    if length > longest:
        raise InvalidInput(f"{source}: {prefix}SubnetLen {length} leaves no room for pods; the longest is {longest}")
    if length < network.prefixlen + 2:
        raise InvalidInput(
            f"{source}: {prefix}SubnetLen {length} divides {network} into fewer than four subnets; "
            f"it must be at least {network.prefixlen + 2}"
        )
    size = 1 << (bits - length)
    ends: dict[str, IPAddress] = {}
    for key, address, default in (
        ("SubnetMin", given.first, int(network.network_address) + size),
        ("SubnetMax", given.last, int(network.broadcast_address) + 1 - size),
    ):
        end = address if address is not None else type(network.network_address)(default)
        if end not in network:
            raise InvalidInput(f"{source}: {prefix}{key} {end} lies outside {network}")
        if int(end) % size:
            raise InvalidInput(f"{source}: {prefix}{key} {end} is not the first address of a /{length} subnet")
        ends[key] = end
    if int(ends["SubnetMin"]) > int(ends["SubnetMax"]):
        raise InvalidInput(f"{source}: {prefix}SubnetMin {ends['SubnetMin']} lies above {prefix}SubnetMax {ends['SubnetMax']}")
    return SubnetRange(network, length, ends["SubnetMin"], ends["SubnetMax"])


def _default_length(network: IPNetwork, what: str) -> int:
    """flannel's: /24 (/64) where at least four of them fit, else a quarter of the network."""
    usual, smallest = (24, 28) if network.version == 4 else (64, 124)
    if network.prefixlen > smallest:
        raise InvalidInput(f"{what} {network} is too small to be divided among nodes; it must be at least a /{smallest}")
    return usual if network.prefixlen <= usual - 2 else network.prefixlen + 2


# --- the backend ------------------------------------------------------------------------------------------------------


def _backend(keys: _Keys) -> BackendConfig:
    section = keys.get("Backend")
    if section is None:
        keys.warnings.append(
            f"{keys.source}: Backend is missing, which means udp (flannel's code; its documentation says vxlan): slow, "
            'IPv4 only; say "Backend": {"Type": "vxlan"} if you do not want that'
        )
        return UdpBackend()
    if not isinstance(section, dict):
        raise InvalidInput(f"{keys.source}: Backend must be a JSON object with a Type, but is {_kind(section)}")
    inner = _Keys(section, f"{keys.source}: Backend")
    type_ = inner.text("Type").lower()
    if not type_:
        raise InvalidInput(f"{keys.source}: Backend has no Type; it can be {_choices()}")
    reader = _READERS.get(type_)
    if reader is None:
        raise InvalidInput(f"{inner.source}: podwire has no back end {type_!r}; use {_choices()}")
    backend = reader(inner)
    inner.unknown()
    keys.warnings += inner.warnings
    return backend


def _choices() -> str:
    return ", ".join(BACKEND_TYPES[:-1]) + f" or {BACKEND_TYPES[-1]}"


def _vxlan(keys: _Keys) -> VxlanBackend:
    keys.get("MacPrefix")  # Windows only
    if keys.flag("Learning", False):
        keys.warnings.append(f"{keys.source}: Learning has no effect, since all forwarding entries are static")
    return VxlanBackend(
        vni=keys.number("VNI", DEFAULT_VNI, 1, (1 << 24) - 1),
        port=keys.number("Port", DEFAULT_VXLAN_PORT, 1, 65535),
        gbp=keys.flag("GBP", False),
        learning=keys.flag("Learning", False),
        direct_routing=keys.flag("DirectRouting", False),
        mtu=_mtu(keys),
    )


def _wireguard(keys: _Keys) -> WireguardBackend:
    mode = keys.text("Mode") or "separate"
    if mode not in WIREGUARD_MODES:
        raise InvalidInput(f"{keys.source}: Mode {mode!r} must be one of {', '.join(WIREGUARD_MODES)}")
    return WireguardBackend(
        port=keys.number("ListenPort", DEFAULT_WIREGUARD_PORT, 1, 65535),
        port_v6=keys.number("ListenPortV6", DEFAULT_WIREGUARD_PORT_V6, 1, 65535),
        psk=keys.text("PSK"),
        keepalive=keys.number("PersistentKeepaliveInterval", 0, 1, 65535),
        mode=mode,
        mtu=_mtu(keys),
    )


def _mtu(keys: _Keys) -> int:
    return keys.number("MTU", 0, 576, MAX_MTU)


_READERS: Mapping[str, Callable[[_Keys], BackendConfig]] = {
    "vxlan": _vxlan,
    "host-gw": lambda keys: HostGwBackend(),
    "alloc": lambda keys: AllocBackend(),
    "udp": lambda keys: UdpBackend(port=keys.number("Port", DEFAULT_UDP_PORT, 1, 65535)),
    "ipip": lambda keys: IpipBackend(direct_routing=keys.flag("DirectRouting", False)),
    "wireguard": _wireguard,
}


def _check_families(backend: BackendConfig, networks: tuple[IPNetwork, ...], source: str) -> None:
    if isinstance(backend, UdpBackend | IpipBackend) and any(network.version == 6 for network in networks):
        raise InvalidInput(f"{source}: backend {backend.type} carries IPv4 only; set EnableIPv6 to false or use vxlan")


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")
