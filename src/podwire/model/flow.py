"""Tracked connections (conntrack) as values."""

from dataclasses import dataclass
from typing import NamedTuple

from podwire.model.addr import IPAddress

SEEN_REPLY = 1 << 1
ASSURED = 1 << 2
SRC_NAT = 1 << 4
DST_NAT = 1 << 5
"""Bits of `Flow.status` (IPS_… of linux/netfilter/nf_conntrack_common.h)."""

_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6", 132: "sctp"}


class FlowTuple(NamedTuple):
    """One direction of a connection. Ports are 0 where the protocol has none; for ICMP `sport` is the echo
    identifier and `dport` type and code (type · 256 + code)."""

    src: IPAddress
    dst: IPAddress
    protocol: int
    sport: int = 0
    dport: int = 0

    def __str__(self) -> str:
        v6 = self.src.version == 6
        src, dst = (f"[{self.src}]", f"[{self.dst}]") if v6 else (str(self.src), str(self.dst))
        name = _PROTOCOLS.get(self.protocol, str(self.protocol))
        return f"{src}:{self.sport} → {dst}:{self.dport}/{name}"


@dataclass(frozen=True, slots=True)
class Flow:
    """A connection as conntrack keeps it: its first packet's tuple, and that of the answers, which shows any translation.

    `timeout_s`: how long it is kept without another packet. Counters are (packets, bytes), zeros where accounting is off
    (net.netfilter.nf_conntrack_acct)."""

    original: FlowTuple
    reply: FlowTuple
    status: int = 0
    mark: int = 0
    zone: int = 0
    id: int = 0
    timeout_s: int = 0
    original_counters: tuple[int, int] = (0, 0)
    reply_counters: tuple[int, int] = (0, 0)

    @property
    def source_translated(self) -> bool:
        return bool(self.status & SRC_NAT)

    @property
    def destination_translated(self) -> bool:
        return bool(self.status & DST_NAT)

    @property
    def translated_original(self) -> FlowTuple:
        """The original packet as it leaves the node: source and destination after translation."""
        back = self.reply
        return FlowTuple(back.dst, back.src, back.protocol, back.dport, back.sport)

    def __str__(self) -> str:
        """`10.0.0.1:4242 → 10.96.0.1:80/tcp becomes 10.0.0.1:4242 → 10.244.1.2:8080/tcp`."""
        if self.translated_original == self.original:
            return str(self.original)
        return f"{self.original} becomes {self.translated_original}"
