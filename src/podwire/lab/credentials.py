"""A lab's secrets, made at its start and gone with it: certificate authority, certificates, tokens."""

import secrets
import ssl
from collections.abc import Iterable
from datetime import UTC, datetime

from podwire.apiserver.auth import ADMIN, User
from podwire.apiserver.config import KubeletAccess
from podwire.apiserver.pki import Authority, kubeconfig
from podwire.lab.topology import Place
from podwire.model.addr import IPAddress

_SERVER_NAMES = (
    "localhost",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
)


class Credentials:
    """`inside_token` is for the lab's own parts; the user's is in the kubeconfig and nowhere else."""

    def __init__(self) -> None:
        self._authority = Authority.create("podwire-lab", datetime.now(UTC))
        self._user_token = secrets.token_urlsafe(32)
        self.inside_token = secrets.token_urlsafe(32)
        self.kubelet_token = secrets.token_urlsafe(32)

    @property
    def ca_certificate(self) -> str:
        return self._authority.pair.certificate.decode()

    @property
    def users(self) -> dict[str, User]:
        """Token → user, for the API server."""
        return {self._user_token: ADMIN, self.inside_token: User("system:podwire", ("system:masters", "system:authenticated"))}

    @property
    def kubelet_access(self) -> KubeletAccess:
        """How the API server reaches the nodes."""
        return KubeletAccess(token=self.kubelet_token, tls=self._authority.client_context())

    def server_context(self, addresses: Iterable[IPAddress]) -> ssl.SSLContext:
        """TLS for the API server, which is also known by `addresses`."""
        hosts = ("127.0.0.1", *map(str, addresses), *_SERVER_NAMES)
        return self._authority.server_context(self._authority.issue("kube-apiserver", hosts, datetime.now(UTC)))

    def node_context(self, place: Place) -> ssl.SSLContext:
        """TLS for a node's kubelet API."""
        hosts = (*map(str, place.addresses.values()), place.name)
        pair = self._authority.issue(f"system:node:{place.name}", hosts, datetime.now(UTC), organisations=("system:nodes",))
        return self._authority.server_context(pair)

    def kubeconfig(self, name: str, port: int) -> str:
        """The kubeconfig for a user on the machine. Secret."""
        return kubeconfig(name, f"https://127.0.0.1:{port}", self._authority.pair.certificate, self._user_token)
