"""`podwire server`: API server and controllers in one process, on SQLite (one server) or etcd (any number)."""

import asyncio
import contextlib
import ipaddress
import logging
import secrets
import signal
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from podwire import __version__
from podwire.apiserver.app import create_app
from podwire.apiserver.auth import MASTERS, User
from podwire.apiserver.config import KubeletAccess, ServerConfig
from podwire.apiserver.server import ApiServer, Listener
from podwire.client.api import ApiClient
from podwire.client.etcd import EtcdClient, etcd_tls
from podwire.client.reasons import in_system_words
from podwire.controllers.config import ClusterCidr, ControllersConfig
from podwire.controllers.leader import ElectionTimes, LeaderElection
from podwire.controllers.run import run_controllers
from podwire.hosts.credentials import ServerCredentials, ServingCertificate
from podwire.hosts.errors import HostError
from podwire.hosts.systemd import notify
from podwire.model.addr import IPAddress, IPNetwork
from podwire.store.etcd import EtcdStore
from podwire.store.port import Store
from podwire.store.sqlite import SqliteStore

log = logging.getLogger(__name__)

DATA_DIR = Path("/var/lib/podwire/server")
PORT = 6443
LEASE = "podwire-controllers"
_RENEW_SECONDS = 6 * 3600.0


@dataclass(frozen=True, slots=True)
class EtcdOptions:
    """Where the cluster's etcd is, and as whom it is spoken to. No `endpoints`: the store is a SQLite file."""

    endpoints: tuple[str, ...] = ()
    cafile: str = ""
    certfile: str = ""
    keyfile: str = ""
    user: tuple[str, str] | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """`advertise`: this server's addresses as nodes and pods reach it, the first in URLs. `names`: further names and addresses
    for its certificate, such as one DNS name for several servers. Networks: one per family, the primary family's first."""

    advertise: tuple[IPAddress, ...]
    data: Path = DATA_DIR
    listen: tuple[str, int] = ("", PORT)
    names: tuple[str, ...] = ()
    etcd: EtcdOptions = EtcdOptions()
    pod_cidrs: tuple[IPNetwork, ...] = (ipaddress.ip_network("10.244.0.0/16"),)
    service_cidrs: tuple[IPNetwork, ...] = (ipaddress.ip_network("10.96.0.0/12"),)
    load_balancer_pools: tuple[IPNetwork, ...] = ()
    vni: int = 1
    vxlan_port: int = 8472
    election: ElectionTimes = field(default_factory=ElectionTimes)

    @property
    def url(self) -> str:
        host = str(self.advertise[0])
        return f"https://{f'[{host}]' if ':' in host else host}:{self.listen[1]}"


async def run_server(options: ServerOptions, *, on_ready: Callable[[], None] = lambda: None) -> None:
    """Serve until SIGTERM or SIGINT. Raises PodwireError where it cannot start, or cannot go on."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        server = Server(options, ServerCredentials(options.data))
        stack.push_async_callback(server.close)
        await server.start()
        log.info("the API server is at %s; %s is for kubectl", options.url, server.credentials.admin_kubeconfig)
        notify("READY=1")
        on_ready()
        await server.run(stop)
        notify("STOPPING=1")


class Server:
    """`start`, `run`, `close`."""

    def __init__(self, options: ServerOptions, credentials: ServerCredentials) -> None:
        self.options, self.credentials = options, credentials
        self._inside_token = secrets.token_urlsafe(32)
        self._closing = contextlib.AsyncExitStack()

    async def start(self) -> None:
        """Returns when requests are answered. Raises PodwireError."""
        options = self.options
        store = _open_store(options)
        self._closing.push_async_callback(store.close)
        hosts = [*map(str, options.advertise), *options.names, *(str(net[1]) for net in options.service_cidrs)]
        self._certificate = self.credentials.serving(hosts)
        api = ApiServer(create_app(store, self._config()))
        self._closing.push_async_callback(api.stop)
        inside = _listen_inside(options.data)
        await api.start([Listener(_listen(*options.listen), self._certificate.context), Listener(inside)])
        self.credentials.write_admin_kubeconfig(options.url)

    async def run(self, stop: asyncio.Event) -> None:
        """Lead the controllers when it is this server's turn, until `stop` is set."""
        parts = [
            self._part("controllers", self._controllers()),
            self._part("certificate", _keep_valid(self._certificate)),
            asyncio.create_task(stop.wait(), name="stop"),
        ]
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in parts:
                task.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    async def close(self) -> None:
        await self._closing.aclose()

    def _part(self, name: str, work: Coroutine[Any, Any, None]) -> "asyncio.Task[Any]":
        return asyncio.create_task(work, name=name)

    def _config(self) -> ServerConfig:
        options, credentials = self.options, self.credentials
        authority, key = credentials.authority, credentials.signing_key
        return ServerConfig(
            tokens={self._inside_token: User("system:podwire", (MASTERS, "system:authenticated"))},
            service_cidrs=options.service_cidrs,
            advertise=options.advertise,
            advertise_port=options.listen[1],
            kubelet=KubeletAccess(key=key, tls=authority.client_context()),
            identity=credentials.identity if options.etcd.endpoints else "",
            authority=authority,
            cluster_settings={
                "podCIDRs": [str(net) for net in options.pod_cidrs],
                "serviceCIDRs": [str(net) for net in options.service_cidrs],
                "vni": options.vni,
                "vxlanPort": options.vxlan_port,
            },
            signing_key=key,
            build=__version__,
        )

    async def _controllers(self) -> None:
        config = ControllersConfig(
            cluster_cidrs=tuple(ClusterCidr(net, 24 if net.version == 4 else 64) for net in self.options.pod_cidrs),
            load_balancer_pools=self.options.load_balancer_pools,
            ca_certificate=self.credentials.authority.pair.certificate.decode(),
        )
        path, token = str(self.options.data / "inside.sock"), self._inside_token
        agent = f"podwire-controllers/{__version__}"
        async with ApiClient("http://server", unix_socket=path, token=token, user_agent=agent) as client:
            election = LeaderElection(
                client, LEASE, self.credentials.identity, lambda: datetime.now(UTC), times=self.options.election
            )
            await election.run(lambda: run_controllers(client, config))


async def _keep_valid(certificate: ServingCertificate) -> None:
    while True:
        certificate.renew_if_due()
        await asyncio.sleep(_RENEW_SECONDS)


def _open_store(options: ServerOptions) -> Store:
    etcd = options.etcd
    if not etcd.endpoints:
        return SqliteStore.open(options.data / "podwire.db", durability="power")
    secure = any(endpoint.startswith("https://") for endpoint in etcd.endpoints)
    tls = etcd_tls(etcd.cafile, etcd.certfile, etcd.keyfile) if secure else None
    return EtcdStore(EtcdClient(etcd.endpoints, tls=tls, user=etcd.user))


def _listen(host: str, port: int) -> socket.socket:
    """Without a host: all addresses of both families."""
    try:
        if host:
            return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512)
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
    except OSError as error:
        where = f"{host or 'all addresses'}, port {port}"
        raise HostError(f"the API server cannot listen on {where} ({in_system_words(error)}); choose with --listen") from error


def _listen_inside(data: Path) -> socket.socket:
    """A Unix socket in the data directory, which is its owner's alone."""
    path = data / "inside.sock"
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        raise HostError(f"{path} cannot be made ({error}); choose a shorter --data-dir") from error
    sock.listen(512)
    return sock
