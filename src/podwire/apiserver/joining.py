"""How a machine becomes a node: it shows a bootstrap token and gets a certificate for its own key, and the cluster's settings.

Tokens are Secrets `kube-system/bootstrap-token-<id>` of type bootstrap.kubernetes.io/token, as kubeadm makes and lists them.
"""

import base64
import hmac
import ipaddress
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import msgspec
from aiohttp import web

from podwire.apiserver import status
from podwire.apiserver.auth import BOOTSTRAPPERS, NODES, User
from podwire.apiserver.config import ServerConfig
from podwire.apiserver.hub import Hub
from podwire.apiserver.kinds import REGISTRY
from podwire.apiserver.noderules import NODE_PREFIX, node_of
from podwire.apiserver.pki import Authority
from podwire.apiserver.storage import encode, key_of
from podwire.model import resources
from podwire.model.addr import IPNetwork
from podwire.model.meta import Json
from podwire.model.servicecidr import ServiceCIDR
from podwire.model.timestamps import parse_time

CA_PATH, JOIN_PATH, RENEW_PATH = "/podwire/v1/ca", "/podwire/v1/join", "/podwire/v1/renew"

TOKEN = re.compile(r"([a-z0-9]{6})\.([a-z0-9]{16})")
"""kubeadm's form of a bootstrap token: public id, secret."""

_NODE_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


class JoinRequest(msgspec.Struct, frozen=True):
    """`request` is a PEM certificate signing request, `addresses` those under which the node's agent serves."""

    name: str
    request: str
    addresses: tuple[str, ...] = ()


class Joining:
    """Needs `config.authority`."""

    def __init__(self, hub: Hub, config: ServerConfig, authority: Authority) -> None:
        self._hub, self._config, self._authority = hub, config, authority

    def bootstrap_user(self, authorization: str, now: datetime) -> User | None:
        """The user of a bootstrap token that is valid at `now`."""
        found = TOKEN.fullmatch(authorization.partition(" ")[2].strip())
        if found is None:
            return None
        entry = self._hub.shelf(_kind(resources.SECRETS)).get(
            key_of(resources.SECRETS, "kube-system", f"bootstrap-token-{found[1]}")
        )
        secret = {} if entry is None else entry.document(_kind(resources.SECRETS))
        if secret.get("type") != "bootstrap.kubernetes.io/token":
            return None
        data = {key: base64.b64decode(value).decode() for key, value in (secret.get("data") or {}).items()}
        right = hmac.compare_digest(data.get("token-secret", "").encode(), found[2].encode())
        if not right or data.get("usage-bootstrap-authentication") != "true":
            return None
        if data.get("expiration") and parse_time(data["expiration"]) <= now:
            return None
        return User(f"system:bootstrap:{found[1]}", (BOOTSTRAPPERS, "system:authenticated"))

    async def ca(self, request: web.Request) -> web.Response:
        """The authority's certificate, for anyone: who joins compares its fingerprint with that in the token."""
        return web.Response(body=self._authority.pair.certificate, content_type="application/x-pem-file")

    async def join(self, request: web.Request, user: User) -> web.Response:
        """Raises StatusError: 403 for whoever is no bootstrapper, 409 for the name of a node that lives."""
        if BOOTSTRAPPERS not in user.groups:
            raise _forbidden("only a bootstrap token lets a node join; `podwire token` makes one")
        wanted = await _read(request)
        if not _NODE_NAME.fullmatch(wanted.name):
            raise status.bad_request(f"{wanted.name!r} is no name for a node: lower-case letters, digits, '-' and '.'")
        entry = self._hub.shelf(_kind(resources.NODES)).get(key_of(resources.NODES, "", wanted.name))
        if entry is not None and _ready(entry.document(_kind(resources.NODES))):
            why = "a node of this name is there and ready; choose another with --name, or let that one leave first"
            raise status.conflict(resources.NODES, wanted.name, why)
        return self._answer(wanted, self._config.now())

    async def renew(self, request: web.Request, user: User) -> web.Response:
        """A new certificate for a node that shows its old one."""
        wanted = await _read(request)
        if not node_of(user) or wanted.name != node_of(user):
            raise _forbidden("a node may renew only its own certificate")
        return self._answer(wanted, self._config.now())

    def _answer(self, wanted: JoinRequest, now: datetime) -> web.Response:
        hosts = [wanted.name, *map(self._checked, wanted.addresses)]
        user = f"{NODE_PREFIX}{wanted.name}"
        certificate = self._authority.sign(wanted.request.encode(), user, hosts, now, (NODES,))
        document: Json = {
            "name": wanted.name,
            "certificate": certificate.decode(),
            "authority": self._authority.pair.certificate.decode(),
            "kubeletToken": self._config.kubelet.token_of(wanted.name),
            "cluster": dict(self._config.cluster_settings),
        }
        return web.Response(body=encode(document), content_type="application/json")

    def _service_ranges(self) -> Iterator[IPNetwork]:
        yield from self._config.service_cidrs
        for entry in self._hub.shelf(_kind(resources.SERVICECIDRS)).all():
            yield from msgspec.json.decode(entry.raw, type=ServiceCIDR).networks

    def _checked(self, text: str) -> str:
        """A node may serve at its own addresses, not in the API server's name."""
        try:
            address = ipaddress.ip_address(text)
        except ValueError as error:
            raise status.bad_request(f"{text!r} is no address") from error
        if address in self._config.advertise or any(address in network for network in self._service_ranges()):
            raise _forbidden(f"{text} is the API server's address or a Service's")
        return str(address)


async def _read(request: web.Request) -> JoinRequest:
    try:
        return msgspec.json.decode(await request.read(), type=JoinRequest)
    except msgspec.MsgspecError as error:
        raise status.bad_request(f"this is no request to join: {error}") from error


def _ready(node: Json) -> bool:
    return any(
        c.get("type") == "Ready" and c.get("status") == "True" for c in (node.get("status") or {}).get("conditions") or ()
    )


def _forbidden(why: str) -> status.StatusError:
    return status.StatusError(403, "Forbidden", f"forbidden: {why}")


def _kind(resource: resources.Resource) -> Any:
    kind = REGISTRY.by_kind(resource.api_version, resource.kind)
    assert kind is not None
    return kind
