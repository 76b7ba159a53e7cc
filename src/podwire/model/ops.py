"""Typed kernel operations. A `Plan` is a tuple of them, in the order in which they are safe; every one names its namespace."""

from dataclasses import dataclass, field

from podwire.model.ids import HOST, NetnsName
from podwire.model.kernelstate import Address, FdbEntry, Link, Neighbour, Route, Shaper, WireguardPeer
from podwire.model.nft import Batch


@dataclass(frozen=True, slots=True)
class AddLink:
    """Create a link. For a veth, `peer` is the other end (its namespace: `link.kind.peer_ns`)."""

    link: Link
    peer: Link | None = None
    ns: NetnsName = HOST


@dataclass(frozen=True, slots=True)
class ChangeLink:
    """Bring an existing link's mtu, mac, master, hairpin, alias and up flag to `link`'s (None fields stay)."""

    link: Link
    ns: NetnsName = HOST


@dataclass(frozen=True, slots=True)
class DelLink:
    name: str
    ns: NetnsName = HOST


@dataclass(frozen=True, slots=True)
class AddAddress:
    address: Address
    ns: NetnsName = HOST


@dataclass(frozen=True, slots=True)
class DelAddress:
    address: Address
    ns: NetnsName = HOST


@dataclass(frozen=True, slots=True)
class SetRoute:
    """Add, or replace the route with the same key (NLM_F_CREATE|NLM_F_REPLACE)."""

    route: Route
    ns: NetnsName = HOST


@dataclass(frozen=True, slots=True)
class DelRoute:
    route: Route
    ns: NetnsName = HOST


@dataclass(frozen=True, slots=True)
class SetNeighbour:
    neighbour: Neighbour
    ns: NetnsName = HOST


@dataclass(frozen=True, slots=True)
class DelNeighbour:
    neighbour: Neighbour
    ns: NetnsName = HOST


@dataclass(frozen=True, slots=True)
class SetFdb:
    entry: FdbEntry
    ns: NetnsName = HOST


@dataclass(frozen=True, slots=True)
class DelFdb:
    entry: FdbEntry
    ns: NetnsName = HOST


@dataclass(frozen=True, slots=True)
class SetWireguardPeer:
    """Add the peer, or bring it to exactly this."""

    peer: WireguardPeer
    ns: NetnsName = HOST


@dataclass(frozen=True, slots=True)
class DelWireguardPeer:
    peer: WireguardPeer
    ns: NetnsName = HOST


@dataclass(frozen=True, slots=True)
class SetShaper:
    """Give a device this token bucket in place of what queue it has."""

    dev: str
    shaper: Shaper
    ns: NetnsName = HOST


@dataclass(frozen=True, slots=True)
class SetSysctl:
    key: str
    value: str
    ns: NetnsName = HOST


@dataclass(frozen=True, slots=True)
class CommitNft:
    """One nftables transaction: all of it or nothing."""

    batch: Batch
    ns: NetnsName = HOST


Op = (
    AddLink | ChangeLink | DelLink | AddAddress | DelAddress | SetRoute | DelRoute | SetNeighbour | DelNeighbour
    | SetFdb | DelFdb | SetWireguardPeer | DelWireguardPeer | SetShaper | SetSysctl | CommitNft
)  # fmt: skip

Plan = tuple[Op, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """One operation that the kernel refused: its errno and the kernel's own words where it gave any (extended ack)."""

    op: Op
    errno: int
    message: str


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of a plan. Independent operations go on after a failure; the caller observes again and retries."""

    done: int
    failures: tuple[Failure, ...] = field(default=())

    @property
    def ok(self) -> bool:
        return not self.failures
