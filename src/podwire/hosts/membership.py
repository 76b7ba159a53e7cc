"""A node's membership: what it got when it joined, kept in its state directory, renewed in time, given back at the end.

<state>/node.json     servers, name, addresses, the cluster's settings, the kubelet API's token
<state>/ca.crt        the cluster's authority, checked by the fingerprint in the token when it was fetched
<state>/node.crt, node.key
"""

import contextlib
import logging
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from podwire.apiserver.joining import CA_PATH, JOIN_PATH, RENEW_PATH
from podwire.apiserver.pki import Authority, KeyPair, expiry, fingerprint, load_pair, new_request
from podwire.client.api import ApiClient
from podwire.client.errors import ApiError, NotFound
from podwire.hosts.errors import HostError
from podwire.hosts.files import make_private, read, write
from podwire.model.errors import InvalidInput
from podwire.model.resources import NODES

log = logging.getLogger(__name__)

STATE_DIR = Path("/var/lib/podwire/node")
STATE_NAMES = ("agent", "ca.crt", "node.pem", "node.json")
"""What a node has in its --state-dir; what is removed last makes it a node."""

RENEW_BEFORE = timedelta(days=120)

_SERVER = re.compile(r"https://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?(/\S*)?")
_TOKEN = re.compile(r"([a-z0-9]{6}\.[a-z0-9]{16})\.([0-9a-f]{64})")


class ClusterSettings(msgspec.Struct, frozen=True, rename={"pod_cidrs": "podCIDRs", "service_cidrs": "serviceCIDRs",
                                                           "vxlan_port": "vxlanPort"}):  # fmt: skip
    pod_cidrs: tuple[str, ...]
    service_cidrs: tuple[str, ...]
    vni: int = 1
    vxlan_port: int = 8472


class _Answer(msgspec.Struct, frozen=True, rename="camel"):
    certificate: str
    authority: str
    kubelet_token: str
    cluster: ClusterSettings


class Record(msgspec.Struct, frozen=True, rename="camel"):
    """`node.json`."""

    servers: tuple[str, ...]
    name: str
    addresses: tuple[str, ...]
    kubelet_token: str
    cluster: ClusterSettings


@dataclass(frozen=True, slots=True)
class JoinToken:
    """`id.secret.fingerprint`: a bootstrap token, and the fingerprint of the authority that it is to be shown to."""

    bootstrap: str
    fingerprint: str

    @classmethod
    def parse(cls, text: str) -> "JoinToken":
        found = _TOKEN.fullmatch(text.strip())
        if found is None:
            raise InvalidInput("this is no join token: `podwire token`, on the server, prints one whole")
        return cls(found[1], found[2])

    def __str__(self) -> str:
        return f"{self.bootstrap}.{self.fingerprint}"


def parse_servers(text: str) -> tuple[str, ...]:
    """URLs of a cluster's API servers, with commas between them, the one to use first at first. Raises InvalidInput."""
    urls = tuple(part.strip().rstrip("/") for part in text.split(","))
    for url in urls:
        found = _SERVER.fullmatch(url)
        if not found or int((found[2] or ":443")[1:]) not in range(1, 65536):
            raise InvalidInput(f"{url!r} is no URL of a server; it looks like https://192.0.2.1:6443")
    if len(set(urls)) != len(urls):
        raise InvalidInput(f"{text} names a server twice")
    return urls


class Membership:
    """What a node knows of itself. `load` it, or `join` to have one."""

    def __init__(self, state: Path, record: Record, authority: bytes, pair: KeyPair) -> None:
        self.state, self.record = state, record
        self.authority = Authority(KeyPair(authority, b""))
        self._pair = pair
        self._client_tls = self.authority.client_context(pair)
        self._server_tls = self.authority.server_context(pair)

    @classmethod
    def load(cls, state: Path) -> "Membership | None":
        """None where this machine has not joined. Raises HostError."""
        document, ca, both = read(state / "node.json"), read(state / "ca.crt"), read(state / "node.pem")
        if not (document and ca and both):
            return None
        key, begin, certificate = both.partition(b"-----BEGIN CERTIFICATE-----")
        try:
            record = msgspec.json.decode(document, type=Record)
            return cls(state, record, ca, KeyPair(begin + certificate, key))
        except (msgspec.MsgspecError, ssl.SSLError, ValueError) as error:
            raise HostError(f"{state} is damaged ({error}): remove it and join again with a new token") from error

    def client(self, user_agent: str) -> ApiClient:
        """A client of the API servers, as this node."""
        return ApiClient(self.record.servers, ssl=self._client_tls, user_agent=user_agent)

    @property
    def cluster(self) -> str:
        """The servers, in words."""
        return " and ".join(self.record.servers)

    async def move_to(self, servers: tuple[str, ...]) -> None:
        """Use `servers` of the same cluster from now on. Raises HostError where none of them answers this node as its cluster's
        does."""
        self.record = msgspec.structs.replace(before := self.record, servers=servers)
        try:
            async with self.client("podwire-join") as client:
                with contextlib.suppress(NotFound):
                    await client.get(NODES, self.record.name)
        except ApiError as error:
            self.record = before
            raise HostError(
                f"this machine is a node of {self.cluster}, and no server of that cluster answers at {' or '.join(servers)} "
                f"({error}); to join another cluster, `podwire leave` first"
            ) from error
        _write_record(self.state, self.record)

    @property
    def kubelet_tls(self) -> ssl.SSLContext:
        return self._server_tls

    async def renew_if_due(self, now: datetime) -> bool:
        """Connections from now on use the new certificate. Raises ApiError, HostError."""
        if expiry(self._pair.certificate) - now > RENEW_BEFORE:
            return False
        key, request = new_request(self.record.name)
        async with self.client("podwire-node") as client:
            answer = await _ask(client, RENEW_PATH, self.record.name, self.record.addresses, request)
        self._pair = KeyPair(answer.certificate.encode(), key)
        _write_pair(self.state, self._pair)
        for context in (self._client_tls, self._server_tls):
            load_pair(context, self._pair)
        log.info("node %s has a new certificate", self.record.name)
        return True


async def join(state: Path, servers: tuple[str, ...], token: JoinToken, name: str, addresses: Sequence[str]) -> Membership:
    """Become a node of the cluster at `servers` (URLs). Raises HostError, ApiError."""
    make_private(state, STATE_NAMES)
    ca = await _fetch_authority(servers, token.fingerprint)
    authority = Authority(KeyPair(ca, b""))
    key, request = new_request(name)
    tls = authority.client_context()
    async with ApiClient(servers, token=token.bootstrap, ssl=tls, user_agent="podwire-join") as client:
        answer = await _ask(client, JOIN_PATH, name, addresses, request)
    record = Record(servers, name, tuple(addresses), answer.kubelet_token, answer.cluster)
    pair = KeyPair(answer.certificate.encode(), key)
    _write_pair(state, pair)
    write(state / "ca.crt", ca, 0o644)
    _write_record(state, record)
    return Membership(state, record, ca, pair)


async def _fetch_authority(servers: tuple[str, ...], wanted: str) -> bytes:
    """Over a connection that is not verified: what comes is believed because its fingerprint is that of the token."""
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE
    async with ApiClient(servers, ssl=blind, user_agent="podwire-join") as client:
        ca = await client.request("GET", CA_PATH, accept="*/*")
        if fingerprint(ca) != wanted:
            raise HostError(f"{client.base_url} is not the server that the token is for: its authority has another fingerprint")
    return ca


async def _ask(client: ApiClient, path: str, name: str, addresses: Sequence[str], request: bytes) -> _Answer:
    body: Any = {"name": name, "request": request.decode(), "addresses": list(addresses)}
    data = await client.request("POST", path, body=body)
    try:
        return msgspec.json.decode(data, type=_Answer)
    except msgspec.MsgspecError as error:
        raise ApiError(500, "", f"{client.base_url}{path} does not answer as a podwire server does: {error}") from error


def _write_pair(state: Path, pair: KeyPair) -> None:
    write(state / "node.pem", pair.key + pair.certificate)


def _write_record(state: Path, record: Record) -> None:
    write(state / "node.json", msgspec.json.format(msgspec.json.encode(record)) + b"\n")
