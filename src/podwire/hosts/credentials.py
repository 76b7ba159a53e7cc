"""A server's secrets on disk. Servers that share a store share `pki/` (copy the directory), and nothing else.

<data>/pki/ca.crt, ca.key      the cluster's authority
<data>/pki/sa.key              signs service accounts' tokens, and derives the nodes' tokens from their names
<data>/admin.kubeconfig        for kubectl; written anew at each start
<data>/identity                this server's own name
"""

import secrets
import socket
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from podwire.apiserver.auth import MASTERS
from podwire.apiserver.pki import Authority, KeyPair, client_kubeconfig, expiry, load_pair
from podwire.hosts.errors import HostError
from podwire.hosts.files import make_private, read, write

SERVER_NAMES = (
    "localhost",
    "127.0.0.1",
    "::1",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
)

_NAMES = (
    "pki",
    "identity",
    "admin.kubeconfig",
    "inside.sock",
    "podwire.db",
    "podwire.db.lock",
    "podwire.db-wal",
    "podwire.db-shm",
)
_PKI_NAMES = ("ca.crt", "ca.key", "sa.key")

RENEW_BEFORE = timedelta(days=120)
"""Certificates live a year; with so much of it left they are replaced."""


class ServerCredentials:
    """Loaded, or made where there are none. Raises HostError."""

    def __init__(self, data: Path) -> None:
        self._data = data
        pki = data / "pki"
        make_private(data, _NAMES)
        make_private(pki, _PKI_NAMES)
        self.authority = _authority(pki)
        self.signing_key = _kept(pki / "sa.key", lambda: secrets.token_hex(32).encode())
        self.identity = _kept(data / "identity", _new_identity).decode()

    @property
    def admin_kubeconfig(self) -> Path:
        return self._data / "admin.kubeconfig"

    def write_admin_kubeconfig(self, server: str) -> None:
        """Access to everything, by a certificate."""
        pair = self.authority.issue("kubernetes-admin", (), datetime.now(UTC), organisations=(MASTERS,))
        text = client_kubeconfig("podwire", server, self.authority.pair.certificate, pair)
        write(self.admin_kubeconfig, text.encode())

    def serving(self, hosts: Iterable[str]) -> "ServingCertificate":
        return ServingCertificate(self.authority, tuple(dict.fromkeys((*hosts, *SERVER_NAMES))))


class ServingCertificate:
    """The server's own certificate, which lives in memory and is renewed in place."""

    def __init__(self, authority: Authority, hosts: tuple[str, ...]) -> None:
        self._authority, self._hosts = authority, hosts
        self._pair = self._issue()
        self.context = authority.server_context(self._pair, ask_clients=True)

    def renew_if_due(self) -> None:
        """Connections from now on see the new one."""
        if expiry(self._pair.certificate) - datetime.now(UTC) < RENEW_BEFORE:
            self._pair = self._issue()
            load_pair(self.context, self._pair)

    def _issue(self) -> KeyPair:
        return self._authority.issue("kube-apiserver", self._hosts, datetime.now(UTC))


def _authority(pki: Path) -> Authority:
    certificate, key = read(pki / "ca.crt"), read(pki / "ca.key")
    if certificate and key:
        return Authority(KeyPair(certificate, key))
    if certificate or key:
        raise HostError(f"{pki} has only one of ca.crt and ca.key: copy both from the server where the cluster began")
    made = Authority.create("podwire", datetime.now(UTC))
    write(pki / "ca.key", made.pair.key)
    write(pki / "ca.crt", made.pair.certificate, 0o644)
    return made


def _kept(path: Path, make: Callable[[], bytes]) -> bytes:
    found = read(path)
    if found:
        return found.strip()
    made = make()
    write(path, made + b"\n")
    return made


def _new_identity() -> bytes:
    return f"{socket.gethostname().partition('.')[0].lower()}-{secrets.token_hex(4)}".encode()
