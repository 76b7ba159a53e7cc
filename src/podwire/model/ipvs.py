"""IPVS as values: virtual servers and the real ones behind them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from podwire.model.servicetable import Backend


class VirtualKey(NamedTuple):
    """Identity of a virtual server. `address` is packed, `protocol` the IP protocol number."""

    address: bytes
    protocol: int
    port: int


@dataclass(frozen=True, slots=True)
class VirtualServer:
    """`persistence_s`: a client stays with its real server for so long; 0: it does not. `servers`: real server → weight; one of
    weight 0 keeps the connections it has and gets no new ones (but those of persistent clients, see `SWITCHES`)."""

    scheduler: str
    persistence_s: int = 0
    servers: Mapping[Backend, int] = field(default_factory=dict)


SWITCHES = {
    "net/ipv4/vs/conntrack": "1",  # so that postrouting can masquerade what IPVS leads elsewhere
    "net/ipv4/vs/expire_nodest_conn": "1",  # a UDP client of a server that is gone finds another at once
    "net/ipv4/vs/expire_quiescent_template": "1",  # persistence does not hold clients at a server of weight 0
}
"""Sysctls that our use of IPVS needs (Documentation/networking/ipvs-sysctl.rst)."""

STRICT_ARP = {"net/ipv4/conf/all/arp_ignore": "1", "net/ipv4/conf/all/arp_announce": "2"}
"""No ARP answers for addresses of other devices: kube-proxy's --ipvs-strict-arp."""


# --- operations -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SetVirtual:
    """Make a virtual server without real ones, or change its scheduler and persistence (`new` False)."""

    key: VirtualKey
    scheduler: str
    persistence_s: int
    new: bool


@dataclass(frozen=True, slots=True)
class DelVirtual:
    key: VirtualKey


@dataclass(frozen=True, slots=True)
class SetReal:
    key: VirtualKey
    server: Backend
    weight: int
    new: bool


@dataclass(frozen=True, slots=True)
class DelReal:
    """Connections to the server are cut: it should have none left."""

    key: VirtualKey
    server: Backend


IpvsOp = SetVirtual | DelVirtual | SetReal | DelReal
