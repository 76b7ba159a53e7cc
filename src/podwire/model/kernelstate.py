"""A network namespace's state as a value: what a plan wants and what `Kernel.observe` reads, in the same types.

In a *desired* value `None` means "whatever it is"; an *observed* value has every field set.
Ownership on read-back never depends on name shapes: links carry `OWNER_ALIAS` in their ifalias, routes `ROUTE_PROTOCOL`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from podwire.model.addr import IPAddress, IPInterface, IPNetwork
from podwire.model.ids import HOST, NetnsName

OWNER_ALIAS = "podwire"
"""ifalias of our links, alone or followed by `:<what for>`, e.g. `podwire:shop/web-7d4b9`."""

ROUTE_PROTOCOL = 112
"""rtm_protocol of our routes ("p"; the numbers above 99 are free for daemons, /etc/iproute2/rt_protos)."""


@dataclass(frozen=True, slots=True)
class Device:
    """A link that podwire did not make and only configures (an uplink, `lo`)."""


@dataclass(frozen=True, slots=True)
class Dummy:
    """A device that leads nowhere: it holds addresses."""


@dataclass(frozen=True, slots=True)
class Bridge:
    """A Linux bridge (STP off, no VLAN filtering)."""


@dataclass(frozen=True, slots=True)
class Veth:
    """One end of a pair. `peer` is made with it, in namespace `peer_ns`, as a second `Link` of that namespace's state.

    On observation `peer`/`peer_ns` are empty where the other end is not visible."""

    peer: str = ""
    peer_ns: NetnsName = HOST


@dataclass(frozen=True, slots=True)
class Vxlan:
    """A VXLAN device with static forwarding (flannel's shape; compat.md D3)."""

    vni: int
    port: int
    local: IPAddress
    underlay: str
    learning: bool = False
    gbp: bool = False
    """Group Based Policy: the packet mark's lower 16 bits travel in the VXLAN header."""


@dataclass(frozen=True, slots=True)
class Ipip:
    """An IPv4-in-IPv4 tunnel from `local` to wherever a route's gateway is."""

    local: IPAddress


@dataclass(frozen=True, slots=True)
class Tun:
    """A persistent TUN device (no packet information): its packets go to the process that attaches to it."""


@dataclass(frozen=True, slots=True)
class Wireguard:
    """A WireGuard device. `private_key`: base64, as `wg genkey` makes it (the kernel would set the same three bits)."""

    port: int
    private_key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Shaper:
    """What leaves a device is held to `rate` (bits per second) after a burst of `burst` bits: a token bucket.

    Observation says that there is one, not how wide: with zeros."""

    rate: int
    burst: int


LinkKind = Device | Dummy | Bridge | Veth | Vxlan | Ipip | Tun | Wireguard


@dataclass(frozen=True, slots=True)
class Link:
    """A network device. Key: name. `hairpin` only means something for a bridge port."""

    name: str
    kind: LinkKind
    mtu: int | None = None
    mac: str | None = None
    up: bool = True
    master: str | None = None
    hairpin: bool | None = None
    alias: str = ""
    shaper: Shaper | None = None

    @property
    def owned(self) -> bool:
        return self.alias == OWNER_ALIAS or self.alias.startswith(OWNER_ALIAS + ":")


@dataclass(frozen=True, slots=True)
class Address:
    """An address on a device. Key: all of it. IPv6 ones are set with IFA_F_NODAD: the addresses are ours."""

    dev: str
    interface: IPInterface


@dataclass(frozen=True, slots=True)
class NextHop:
    """One leg of a multipath route."""

    via: IPAddress
    dev: str


@dataclass(frozen=True, slots=True)
class Route:
    """A route in the main table. Key: (dst, metric). Either `dev` (with optional `via`), or `nexthops` for multipath, or
    `blackhole`: what takes it is dropped without a word.

    `metric` 0 is the kernel's default (0 for IPv4, 1024 for IPv6; observe gives 0 for it). `protocol`: who made it; only those
    with ROUTE_PROTOCOL are observed."""

    dst: IPNetwork
    dev: str = ""
    via: IPAddress | None = None
    src: IPAddress | None = None
    onlink: bool = False
    metric: int = 0
    nexthops: tuple[NextHop, ...] = ()
    protocol: int = ROUTE_PROTOCOL
    blackhole: bool = False


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A permanent ARP/ND entry. Key: (dev, ip)."""

    dev: str
    ip: IPAddress
    mac: str


@dataclass(frozen=True, slots=True)
class FdbEntry:
    """A permanent VXLAN forwarding entry (`self`). Key: (dev, mac)."""

    dev: str
    mac: str
    dst: IPAddress


@dataclass(frozen=True, slots=True)
class WireguardPeer:
    """Who is at the other end of a WireGuard device. Key: (dev, public_key).

    `allowed`: the networks behind the peer, sorted; what comes from elsewhere is dropped. `endpoint`: its address and UDP
    port; not observed (None), because WireGuard follows a peer that answers from another. `psk`: base64 or empty."""

    dev: str
    public_key: str
    allowed: tuple[IPNetwork, ...]
    endpoint: tuple[IPAddress, int] | None = None
    keepalive: int = 0
    psk: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class NetState:
    """One namespace. nftables live beside this, in `model.nft`, because they are planned incrementally."""

    links: Mapping[str, Link] = field(default_factory=dict)
    addresses: frozenset[Address] = frozenset()
    routes: frozenset[Route] = frozenset()
    neighbours: frozenset[Neighbour] = frozenset()
    fdb: frozenset[FdbEntry] = frozenset()
    sysctls: Mapping[str, str] = field(default_factory=dict)
    """Path below /proc/sys → value, e.g. {"net/ipv4/ip_forward": "1"}."""
    wireguard: frozenset[WireguardPeer] = frozenset()
