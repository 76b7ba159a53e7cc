"""From Kubernetes' own kube-proxy to podwire and back, under connections that must not notice."""

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio
from hostrig import Host, machines
from kuberig import ADDRESS, SLICES, Kubernetes, kube_proxy, kubernetes, program, register

from podwire.kernel.iptables import Flavour, IptablesClient, find_programs
from podwire.kernel.netns import run_in_netns
from podwire.model.addr import Family
from podwire.model.meta import Json
from podwire.model.resources import SERVICES

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("bridge devices", "nftables"),
    pytest.mark.timeout(120),
    pytest.mark.asyncio(loop_scope="module"),
]

WEB, NODE_PORT, PORT = "10.96.0.80", 30080, 8080
CAPTURE = "PODWIRE_CAPTURE_RULES"
"""A file for what `iptables-save` says under kube-proxy; tests/unit/plan has one."""


class Connection:
    """One that stays open."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def ask(self) -> str:
        """The name of who is at its other end."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(5):
            await loop.sock_sendall(self._sock, b"who?\n")
            return (await loop.sock_recv(self._sock, 100)).decode().strip()

    def close(self) -> None:
        self._sock.close()


class Site:
    """`node` has the proxy; the endpoints are servers of the other two, one of them in use at a time."""

    def __init__(self, hosts: list[Host], kube: Kubernetes) -> None:
        (self.node, *self.backends), self.kube = hosts, kube
        programs = find_programs(Flavour.NFT)
        assert programs is not None
        self.kube_proxy = kube_proxy(kube, self.node)
        self.iptables = IptablesClient(self.node.netns, programs)

    async def start_podwire(self) -> None:
        await self.node.start(
            "proxy", "--kubeconfig", str(self.kube.admin_config), "--cluster-cidr", "10.244.0.0/16",
            "--hostname-override", self.node.name,
        )  # fmt: skip

    def rules(self, family: Family = Family.IPV4) -> str:
        """As `iptables-save` has them."""
        return self.iptables.save(family)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not await asyncio.to_thread(condition):  # noqa: ASYNC110 - other processes do it
                await asyncio.sleep(0.05)

    async def leads_to(self, backend: Host) -> None:
        """The Service has this endpoint, and no other."""
        await self.kube.client.patch(SLICES, "web", {"endpoints": [{"addresses": [backend.address]}]}, "default")

    async def new_connections_reach(self, backend: Host) -> None:
        """By all ways, at once or soon: rules follow the API."""
        async with asyncio.timeout(30):
            while await self._all() != {backend.name}:  # noqa: ASYNC110 - other processes do it
                await asyncio.sleep(0.05)

    async def _all(self) -> set[str]:
        return {await self._who(way) for way in (self.from_node, self.from_outside)}

    async def _who(self, way: "Callable[[], Connection]") -> str:
        try:
            connection = await asyncio.to_thread(way)
        except OSError:
            return ""
        try:
            return await connection.ask()
        except (OSError, TimeoutError):
            return ""
        finally:
            connection.close()

    def from_node(self) -> Connection:
        """A process of the node, by the ClusterIP."""
        return run_in_netns(self.node.netns, lambda: _connected(WEB, 80))

    def from_outside(self) -> Connection:
        """A stranger, by the node port."""
        return _connected(self.node.address, NODE_PORT)


def _connected(address: str, port: int) -> Connection:
    sock = socket.create_connection((address, port), 1.0)
    sock.setblocking(False)
    return Connection(sock)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    program("kube-proxy")
    root = tmp_path_factory.mktemp("kubeproxy")
    async with AsyncExitStack() as stack:
        hosts = await stack.enter_async_context(machines(root, 3))
        kube = await stack.enter_async_context(kubernetes(root / "kube"))
        site = Site(hosts, kube)
        await register(kube.client, site.node.name, site.node.address, "10.244.1.0/24")
        await site.node.call("ip", "route", "add", "default", "via", ADDRESS)
        await site.node.call("sysctl", "-qw", "net.ipv4.ip_forward=1")
        for backend in site.backends:
            server = await asyncio.start_server(
                _answering(backend.name), sock=run_in_netns(backend.netns, lambda: socket.create_server(("", PORT)))
            )
            stack.callback(server.close)
        for name, spec in _services().items():
            await kube.client.create(SERVICES, {"metadata": {"name": name}, "spec": spec}, "default")
        await kube.client.create(SLICES, _slice("web", site.backends[0].address), "default")
        await kube.client.create(SLICES, _slice("all", *(backend.address for backend in site.backends)), "default")
        stack.push_async_callback(site.kube_proxy.end)
        yield site


def _answering(name: str) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], "asyncio.Future[None]"]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while await reader.readline():
                writer.write(f"{name}\n".encode())
        writer.close()

    return answer  # type: ignore[return-value]  # a coroutine function, as asyncio wants it


def _services() -> dict[str, Json]:
    """One to measure by, and the others so that kube-proxy makes rules of every kind."""
    port = {"name": "http", "port": 80, "targetPort": PORT}
    return {
        "web": {"type": "NodePort", "clusterIP": WEB, "ports": [port | {"nodePort": NODE_PORT}]},
        "all": {
            "type": "LoadBalancer",
            "externalIPs": ["203.0.113.9"],
            "loadBalancerSourceRanges": ["192.0.2.0/24"],
            "sessionAffinity": "ClientIP",
            "externalTrafficPolicy": "Local",
            "ports": [port],
        },
        "none": {"ports": [port, {"name": "dns", "port": 53, "protocol": "UDP"}]},
    }


def _slice(service: str, *addresses: str) -> Json:
    return {
        "metadata": {"name": service, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address]} for address in addresses],
        "ports": [{"name": "http", "port": PORT, "protocol": "TCP"}],
    }


async def test_there_and_back(site: Site) -> None:
    first, second = site.backends
    await site.kube_proxy.start()
    await site.until(lambda: "KUBE-SEP" in site.rules())
    await site.new_connections_reach(first)
    if CAPTURE in os.environ:
        await asyncio.to_thread(Path(os.environ[CAPTURE]).write_text, site.rules())
    old = [site.from_node(), await asyncio.to_thread(site.from_outside)]
    assert [await connection.ask() for connection in old] == [first.name, first.name]

    await site.kube_proxy.end()
    await site.start_podwire()
    await site.until(lambda: WEB in _nft(site.node))
    said = await site.node.podwire("proxy", "--cleanup-kube-proxy")
    assert "iptables" in said
    for family in Family:
        assert "KUBE-SVC" not in site.rules(family)
        assert "KUBE-SERVICES" not in site.rules(family)
    await site.leads_to(second)
    await site.new_connections_reach(second)
    assert [await connection.ask() for connection in old] == [first.name, first.name]
    old += [site.from_node(), await asyncio.to_thread(site.from_outside)]

    await site.node.end()
    await site.kube_proxy.start()
    await site.until(lambda: "KUBE-SEP" in site.rules())
    await site.node.podwire("proxy", "--cleanup")
    assert "podwire" not in _nft(site.node)
    await site.leads_to(first)
    await site.new_connections_reach(first)
    assert [await connection.ask() for connection in old] == [first.name, first.name, second.name, second.name]
    for connection in old:
        connection.close()


def _nft(host: Host) -> str:
    import subprocess

    return run_in_netns(
        host.netns, lambda: subprocess.run(["nft", "list", "ruleset"], capture_output=True, text=True, check=True).stdout
    )
