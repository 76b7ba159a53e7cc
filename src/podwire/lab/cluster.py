"""A lab, composed: fabric, API server on its store, controllers, balancer, the pods' shim, and the nodes."""

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from podwire import __version__
from podwire.agent.overlayd.host import require_backend
from podwire.agent.subnets.registry import DEFAULT_PREFIX, DEFAULT_TTL, LeaseRegistry
from podwire.apiserver.app import create_app
from podwire.apiserver.config import ServerConfig
from podwire.apiserver.server import ApiServer, Listener
from podwire.client.api import ApiClient
from podwire.client.errors import NotFound
from podwire.client.etcd import EtcdClient
from podwire.client.sockets import SocketFactory
from podwire.controllers.config import ClusterCidr, ControllersConfig
from podwire.controllers.run import run_controllers
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.port import KernelError
from podwire.lab.balancer import Balancer
from podwire.lab.boot import NETNS_DIR, RUNTIME_DIR
from podwire.lab.control import add_routes
from podwire.lab.credentials import Credentials
from podwire.lab.errors import LabError
from podwire.lab.etcdmember import EtcdMember, client_url, write_config
from podwire.lab.fabric import Fabric
from podwire.lab.injector import FaultInjector
from podwire.lab.machine import LabEnvironment, LabNode
from podwire.lab.nodeoverlay import check_backend
from podwire.lab.readiness import await_nodes
from podwire.lab.settling import await_settled
from podwire.lab.spec import MAX_NODES, LabSpec
from podwire.lab.state import LabDirectory, write_private
from podwire.lab.topology import API_PORT, NODES_PORT, Topology, node_index
from podwire.model.addr import IPAddress
from podwire.model.errors import Unsupported
from podwire.model.kernelstate import NetState
from podwire.model.objects import Node, Pod
from podwire.model.proxymode import ProxyMode
from podwire.model.resources import NODES
from podwire.plan.leases import Lease, lease_of_node
from podwire.runtime.shimclient import ShimProcess, start_shim
from podwire.store.sqlite import SqliteStore

log = logging.getLogger(__name__)

_NODES_TIMEOUT = 20.0
_NODE_TIMEOUT = 1.0
"""Seconds that nodes may take to be ready: so much, and so much more for each."""

_INSIDE = "\0podwire/apiserver"

Step = Callable[[str, float], None]


class LabCluster:
    """Everything of one lab, in the lab process. `listener` is a descriptor of the machine's listening TCP socket.

    `start`, `run` until something calls `request_stop`, `close`. Also the `Site` that paths are probed on."""

    def __init__(self, spec: LabSpec, directory: str, listener: int) -> None:
        path = Path(directory)
        self.spec = spec
        self.topology = Topology(spec.families, spec.balancer_pools)
        self._directory = LabDirectory(path.parent, path.name)
        self._listener = listener
        self._credentials = Credentials()
        self._stop = asyncio.Event()
        self._changing = asyncio.Lock()
        self._closing = contextlib.AsyncExitStack()
        self._tasks: set[asyncio.Task[None]] = set()
        self._nodes: dict[str, LabNode] = {}
        self._etcd: dict[str, EtcdMember] = {}
        self._shim: ShimProcess | None = None
        self.client = self._connect("podwire/lab")

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self, on_step: Step) -> None:
        """Bring everything up; returns when all nodes are ready. Raises PodwireError."""
        with _timed("fabric", on_step):
            if self.spec.own_overlay:
                require_backend(self.spec.backend_type)
                check_backend(self.spec, self.topology.node(1))
            kernel = LinuxKernel()
            self._closing.push_async_callback(kernel.close)
            self.fabric = Fabric(kernel, self.topology, Path(NETNS_DIR))
            self._closing.callback(self.fabric.close)
            await self.fabric.start()
            self.faults = FaultInjector(self.fabric, self._nodes, self._etcd)
        with _timed("API server", on_step):
            await self._start_api()
        if self.spec.subnet_manager == "etcd":
            with _timed("etcd", on_step):
                await self._start_etcd()
        with _timed("controllers", on_step):
            self._closing.push_async_callback(self._cancel_tasks)
            self._spawn("controllers", self._controllers())
            self._balancer = Balancer(self.client, kernel, self.topology.balancer.netns)
            self._spawn("balancer", self._balancer.run())
        with _timed("nodes", on_step):
            self._start_shim()
            self._closing.push_async_callback(self._stop_nodes)
            await self._start_nodes(range(1, self.spec.nodes + 1))

    async def run(self) -> None:
        """Until somebody asks for the end."""
        await self._stop.wait()

    def request_stop(self) -> None:
        self._stop.set()

    async def close(self) -> None:
        """Stop in the reverse order of starting. What is left then goes with the process."""
        await self._closing.aclose()

    def is_own_child(self, pid: int) -> bool:
        """Whether somebody here waits for the child `pid`."""
        return (self._shim is not None and pid == self._shim.pid) or any(pid == member.pid for member in self._etcd.values())

    # --- API server and what speaks to it -------------------------------------------------------------------------

    async def _start_api(self) -> None:
        store = SqliteStore.open(self._directory.database)
        self._closing.push_async_callback(store.close)
        services = self.spec.service_prefixes
        config = ServerConfig(
            tokens=self._credentials.users,
            service_cidrs=tuple(services.values()),
            node_ports=range(self.spec.node_ports[0], self.spec.node_ports[1] + 1),
            advertise=tuple(self.topology.fabric.values()),
            advertise_port=API_PORT,
            kubelet=self._credentials.kubelet_access,
            build=__version__,
        )
        app = create_app(store, config)
        add_routes(app, self)
        server = ApiServer(app)
        self._closing.push_async_callback(server.stop)
        self._closing.push_async_callback(self.client.close)
        tls = self._credentials.server_context([*self.topology.fabric.values(), *(net[1] for net in services.values())])
        outside = socket.socket(fileno=self._listener)
        inside = [Listener(_listen(str(address), API_PORT), tls) for address in self.topology.fabric.values()]
        inside += [Listener(_listen(str(address), NODES_PORT)) for address in self.topology.fabric.values()]
        await server.start([Listener(outside, tls), *inside, Listener(self._listen_inside())])
        port: int = outside.getsockname()[1]
        write_private(self._directory.kubeconfig, self._credentials.kubeconfig(f"podwire-{self.spec.name}", port))

    async def _start_etcd(self) -> None:
        places = [self.topology.etcd(index) for index in range(1, self.spec.etcd_members + 1)]
        for place in places:
            await self.fabric.add_machine(place)
        await self.fabric.introduce(places)
        for place in places:
            member = EtcdMember(place, self.fabric.descriptor(place.name), Path(RUNTIME_DIR) / "etcd", places)
            self._etcd[place.name] = member
            self._closing.push_async_callback(member.stop)
            member.start()
        await write_config(list(self._etcd.values()), f"{DEFAULT_PREFIX}/config", self.spec.network_config)

    def _listen_inside(self) -> socket.socket:
        """An abstract Unix socket: it exists in the lab's own network namespace only, where no pod is."""
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(_INSIDE)
        sock.listen()
        return sock

    def _connect(self, user_agent: str) -> ApiClient:
        return ApiClient("http://lab", unix_socket=_INSIDE, token=self._credentials.inside_token, user_agent=user_agent)

    def _connect_over_the_fabric(self, user_agent: str, sockets: SocketFactory) -> ApiClient:
        """For a node, whose way to the API server shall be as good as its cable. Without TLS, whose buffers would double the
        memory of a lab of fifty nodes: both ends of each connection are in this process."""
        address = next(iter(self.topology.fabric.values()))
        url = f"http://[{address}]:{NODES_PORT}" if address.version == 6 else f"http://{address}:{NODES_PORT}"
        return ApiClient(url, token=self._credentials.inside_token, socket_factory=sockets, user_agent=user_agent)

    async def _controllers(self) -> None:
        prefixes = self.spec.pod_prefixes.values() if self.spec.subnet_manager == "kube" else ()
        config = ControllersConfig(
            cluster_cidrs=tuple(ClusterCidr(net, 24 if net.version == 4 else 64) for net in prefixes),
            load_balancer_pools=tuple(self.spec.balancer_pools.values()),
            ca_certificate=self._credentials.ca_certificate,
        )
        async with self._connect("podwire/controllers") as client:
            await run_controllers(client, config)

    # --- nodes ----------------------------------------------------------------------------------------------------

    def _start_shim(self) -> None:
        root = Path(RUNTIME_DIR)
        self._shim = shim = start_shim(root / "shim")
        asyncio.get_running_loop().add_reader(shim.pidfd, self._shim_ended, shim)
        self._closing.callback(self._stop_shim, shim)
        urls = tuple(client_url(member.place) for member in self._etcd.values())
        self._environment = LabEnvironment(
            self.spec, root, shim.socket_path, self._connect_over_the_fabric, self._credentials, urls
        )

    def _stop_shim(self, shim: ShimProcess) -> None:
        asyncio.get_running_loop().remove_reader(shim.pidfd)
        shim.stop()

    def _shim_ended(self, shim: ShimProcess) -> None:
        asyncio.get_running_loop().remove_reader(shim.pidfd)
        log.error("the process that holds the pods has ended, and the lab with it; its last words: %s", _last_words(shim))
        self.request_stop()

    async def _start_nodes(self, indexes: Iterable[int]) -> None:
        fresh = [await self._make_node(index) for index in indexes]
        await self.fabric.introduce(node.place for node in fresh)
        for node in fresh:
            node.start()
        within = _NODES_TIMEOUT + _NODE_TIMEOUT * len(fresh)
        try:
            async with asyncio.timeout(within):
                for node in fresh:
                    await node.ready()
        except TimeoutError:
            late = [node for node in fresh if node.agent is None or not node.agent.status().ready]
            raise LabError(f"nodes not ready after {within:g} s: {'; '.join(map(_state, late))}") from None
        await await_nodes(self.client, within)

    async def _make_node(self, index: int) -> LabNode:
        place = await self.fabric.add_node(index)
        path = self.fabric.path(place.name)
        node = LabNode(place, self.fabric.descriptor(place.name), path, self._environment)
        self._nodes[place.name] = node
        self._write_nodes()
        return node

    async def add_node(self) -> str:
        """Add a node and wait until it is ready; returns its name. Raises LabError."""
        async with self._changing:
            index = max((node_index(name) or 0 for name in self._nodes), default=0) + 1
            if index > MAX_NODES:
                taken = {node_index(name) for name in self._nodes}
                index = next((i for i in range(1, MAX_NODES + 1) if i not in taken), 0)
            if not index:
                raise LabError(f"a lab has at most {MAX_NODES} nodes")
            await self._start_nodes([index])
            return self.topology.node(index).name

    async def remove_node(self, name: str) -> None:
        """A machine dies and is never seen again: its cable first, then all that ran on it, then its Node object.

        Raises LabError."""
        async with self._changing:
            node = self._node(name)
            await node.stop()
            await self.fabric.unplug(node.place)
            await node.remove_pods()
            self.fabric.forget(node.place)
            self.faults.forget(name)
            del self._nodes[name]
            self._write_nodes()
            with contextlib.suppress(NotFound):
                await self.client.delete(NODES, name)

    async def restart_node(self, name: str) -> None:
        """Kill a node's agent and start another; returns when that one has taken over. Raises LabError."""
        async with self._changing:
            node = self._node(name)
            if name in self.faults.stopped:
                raise LabError(f"{name} is stopped, so no agent runs there: `podwire lab fault heal {name}` starts it")
            await node.stop()
            node.start()
            try:
                async with asyncio.timeout(_NODES_TIMEOUT):
                    await node.ready()
            except TimeoutError:
                raise LabError(f"the agent of {name} is not ready after {_NODES_TIMEOUT:g} s; see `podwire lab logs`") from None

    async def set_proxy_mode(self, name: str, mode: ProxyMode) -> None:
        """Have a node's Services served by another back end; connections stay. Raises LabError."""
        async with self._changing:
            try:
                await self._node(name).set_proxy_mode(mode)
            except (KernelError, Unsupported) as error:
                raise LabError(f"{name} keeps its proxy mode: {error}") from error

    def _node(self, name: str) -> LabNode:
        try:
            return self._nodes[name]
        except KeyError:
            raise LabError(f"there is no node {name!r} in this lab: its nodes are {', '.join(self._nodes)}") from None

    async def _stop_nodes(self) -> None:
        await asyncio.gather(*(node.stop() for node in self._nodes.values()))

    def _write_nodes(self) -> None:
        self._directory.write_nodes(sorted(self._nodes, key=lambda name: node_index(name) or 0))

    # --- looking in -----------------------------------------------------------------------------------------------

    async def open_namespaces(self, pods: Iterable[Pod]) -> dict[str, int]:
        """Descriptors, the caller's to close, by place: world, balancer, nodes by name, pods as namespace/name."""
        found: dict[str, int] = {}
        try:
            for name in self.fabric.places():
                if not self.fabric.place(name).at_bridge:
                    found[name] = os.dup(self.fabric.descriptor(name))
            for pod in pods:
                node = self._nodes.get(pod.spec.node_name)
                descriptor = await node.open_pod(pod.metadata.uid) if node is not None else None
                if descriptor is not None:
                    found[str(pod.key)] = descriptor
        except BaseException:
            for descriptor in found.values():
                os.close(descriptor)
            raise
        return found

    async def observe_nodes(self) -> dict[str, NetState]:
        """Every node's kernel, read from outside its agent."""
        return {name: await self.fabric.kernel.observe(node.place.netns) for name, node in self._nodes.items()}

    async def leases(self) -> dict[str, Lease]:
        """Which node holds which subnets, as the other nodes are told."""
        if self._etcd:
            return await self._leases_in_etcd()
        listed = await self.client.list(NODES)
        found = [lease_of_node(msgspec.convert(item, Node)) for item in listed.items]
        return {lease.node: lease for lease in found if lease is not None}

    async def _leases_in_etcd(self) -> dict[str, Lease]:
        async with EtcdClient(self._environment.etcd_urls) as etcd:
            snapshot = await LeaseRegistry(etcd, DEFAULT_PREFIX, DEFAULT_TTL, time.monotonic).list()
        names = {address: node.name for node in self._nodes.values() for address in node.place.addresses.values()}
        named = [(_owner(stored.lease, names), stored.lease) for stored in snapshot.leases]
        return {name: replace(lease, node=name) for name, lease in named}

    async def settle(self, within: float) -> None:
        """Return when every node and the balancer have programmed what the API says now. Raises LabError."""
        await await_settled(self.client, lambda: {n.name: n.agent for n in self._nodes.values()}, self._balancer, within)

    def status(self) -> dict[str, Any]:
        """What the lab's parts say of themselves."""
        return {
            "name": self.spec.name,
            "faults": [str(fault) for fault in self.faults.active],
            "nodes": [
                {"name": node.name, "agent": node.agent.status() if node.agent is not None else None}
                for node in self._nodes.values()
            ],
        }

    # --- tasks ----------------------------------------------------------------------------------------------------

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Run a part of the lab beside the rest. A lab without it would only look alive, so its end is the lab's."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._part_ended)

    def _part_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("the lab's %s ended by an error", task.get_name(), exc_info=task.exception())
            self.request_stop()

    async def _cancel_tasks(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _listen(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=512)


def _owner(lease: Lease, names: Mapping[IPAddress, str]) -> str:
    """The node that a lease in etcd is of, by its address; one of nobody here keeps its key's name."""
    told = (lease.attrs.public_ip, lease.attrs.public_ipv6)
    return next((names[address] for address in told if address is not None and address in names), lease.node)


def _state(node: LabNode) -> str:
    if node.agent is None:
        return f"{node.name} (its agent does not start)"
    degraded = node.agent.status().degraded
    return f"{node.name} ({'; '.join(f'{part}: {why}' for part, why in sorted(degraded.items())) or 'no error known'})"


def _last_words(shim: ShimProcess) -> str:
    try:
        return shim.socket_path.with_name("shim.log").read_text(errors="replace")[-2000:]
    except OSError:
        return "(none)"


@contextlib.contextmanager
def _timed(name: str, on_step: Step) -> Iterator[None]:
    started = time.monotonic()
    yield
    on_step(name, time.monotonic() - started)
