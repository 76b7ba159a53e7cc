"""How one API server is set up."""

import secrets
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import IPv4Network, IPv6Network, ip_network

from podwire.apiserver.auth import User
from podwire.model.addr import IPAddress


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class KubeletAccess:
    """How the server reaches the nodes' agents for logs and exec. Without `tls` it speaks plain HTTP."""

    token: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = None


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """`tokens`: bearer token → user; with none at all, everyone is let in as anonymous (tests, sockets nobody else reaches).

    `service_cidrs`: --service-cluster-ip-range, one network per family, the primary one first.
    `advertise`: this server's addresses as pods reach it, the endpoints of Service default/kubernetes at `advertise_port`.
    `now` and `choose` (n → a number in 0..n-1) are the clock and the dice.
    """

    tokens: Mapping[str, User] = field(default_factory=dict, repr=False)
    service_cidrs: tuple[IPv4Network | IPv6Network, ...] = (ip_network("10.96.0.0/12"),)
    node_ports: range = range(30000, 32768)
    advertise: tuple[IPAddress, ...] = ()
    advertise_port: int = 6443
    kubelet: KubeletAccess = KubeletAccess()
    signing_key: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    build: str = "0.1.0"
    bookmark_seconds: float = 60.0
    history_seconds: float = 300.0
    """How long changes stay: a watch can resume, and a list be paged through, for at least this long."""
    event_seconds: float = 3600.0
    """How long Events are kept (kube-apiserver --event-ttl)."""
    now: Callable[[], datetime] = utc_now
    choose: Callable[[int], int] = secrets.randbelow
