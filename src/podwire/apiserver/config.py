"""How one API server is set up."""

import hashlib
import hmac
import secrets
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any

from podwire.apiserver.auth import User
from podwire.apiserver.pki import Authority
from podwire.model.addr import IPAddress


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True)
class KubeletAccess:
    """How the server reaches the nodes' agents for logs and exec. Without `tls` it speaks plain HTTP.

    `token` is the same for all nodes; with `key` each has its own, so that none can speak to another's agent."""

    token: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = None
    key: bytes = field(default=b"", repr=False)

    def token_of(self, node: str) -> str:
        if not self.key:
            return self.token
        return hmac.new(self.key, f"kubelet:{node}".encode(), hashlib.sha256).hexdigest()


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """`tokens`: bearer token → user; with none at all, everyone is let in as anonymous (tests, sockets nobody else reaches).

    `service_cidrs`: --service-cluster-ip-range, one network per family, the primary one first.
    `advertise`: this server's addresses as pods reach it, the endpoints of Service default/kubernetes at `advertise_port`.
    `identity`: this server's own name among several on one store; each keeps a Lease, and all that are alive are endpoints.
    `authority`: signs the certificates of nodes that join and is trusted for clients'; None: nobody joins, tokens only.
    `cluster_settings`: what a node is told when it joins.
    `now` and `choose` (n → a number in 0..n-1) are the clock and the dice.
    """

    tokens: Mapping[str, User] = field(default_factory=dict, repr=False)
    service_cidrs: tuple[IPv4Network | IPv6Network, ...] = (ip_network("10.96.0.0/12"),)
    node_ports: range = range(30000, 32768)
    advertise: tuple[IPAddress, ...] = ()
    advertise_port: int = 6443
    kubelet: KubeletAccess = KubeletAccess()
    identity: str = ""
    authority: Authority | None = None
    cluster_settings: Mapping[str, Any] = field(default_factory=dict)
    signing_key: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    build: str = "0.1.0"
    bookmark_seconds: float = 60.0
    history_seconds: float = 300.0
    """How long changes stay: a watch can resume, and a list be paged through, for at least this long."""
    event_seconds: float = 3600.0
    """How long Events are kept (kube-apiserver --event-ttl)."""
    presence_seconds: float = 10.0
    """How often one of several servers shows that it lives; after four times that in silence it counts as gone."""
    now: Callable[[], datetime] = utc_now
    choose: Callable[[int], int] = secrets.randbelow
