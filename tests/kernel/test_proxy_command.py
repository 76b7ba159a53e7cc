"""`podwire proxy` as a process on a node that is somebody else's: packets, probes, repair, modes, and how it ends."""

import asyncio
import json
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from labcommand import PODWIRE
from servicerig import FACTS, ServiceRig, service_rig

from podwire.apiserver.app import create_app
from podwire.apiserver.config import ServerConfig
from podwire.apiserver.server import ApiServer, Listener
from podwire.client.api import ApiClient
from podwire.kernel.iptables import Flavour, find_programs
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import run_in_netns
from podwire.kernel.syscalls import CLONE_NEWNET, setns
from podwire.model.addr import Family
from podwire.model.nft import Batch, DelTable, TableRef
from podwire.model.ops import CommitNft
from podwire.model.resources import ENDPOINTSLICES, NODES, SERVICES
from podwire.plan.services import TABLE
from podwire.store.memory import MemoryStore

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("nftables", "bridge devices", "netfilter on bridges (br_netfilter)", "IPv6"),
    pytest.mark.timeout(90),
]

HEALTH, METRICS = 10256, 10249
WEB = "10.96.0.80"


@dataclass
class Site:
    """The node, an API server that its loopback reaches, and an administrator's client."""

    rig: ServiceRig
    client: ApiClient
    port: int

    @asynccontextmanager
    async def proxy(self, *arguments: str) -> AsyncIterator["subprocess.Popen[str]"]:
        """`podwire proxy …` in the node's namespace, once it is healthy."""
        server = ("--master", f"http://127.0.0.1:{self.port}", "--hostname-override", FACTS.name)
        process = self.command(*server, *arguments)
        try:
            await until(self.healthy, process)
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            with process:
                pass

    def command(self, *arguments: str) -> "subprocess.Popen[str]":
        fd = self.rig.fds["node"]
        command = [*PODWIRE, "proxy", *arguments]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: setns(fd, CLONE_NEWNET))

    async def healthy(self) -> bool:
        try:
            return (await self.get("node", "127.0.0.1", HEALTH, "/healthz"))[0] == 200
        except OSError:
            return False

    async def metric(self, name: str, path: str = "/metrics") -> float:
        """The sum of its samples."""
        status, text = await self.get("node", "127.0.0.1", METRICS, path)
        assert status == 200
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    async def answers(self) -> bool:
        try:
            await self.rig.ask("p2", WEB, 80)
        except (OSError, TimeoutError):
            return False
        return True

    async def get(self, where: str, host: str, port: int, path: str) -> tuple[int, str]:
        """HTTP by hand: (status, body)."""
        with self.rig.open(where, socket.SOCK_STREAM, host) as sock:
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(2):
                await loop.sock_connect(sock, (host, port))
                await loop.sock_sendall(sock, f"GET {path} HTTP/1.0\r\nHost: x\r\n\r\n".encode())
                data = b""
                while piece := await loop.sock_recv(sock, 65536):
                    data += piece
        head, _, body = data.decode().partition("\r\n\r\n")
        return int(head.split()[1]), body


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with service_rig() as rig:
        await _remove_rules(rig)
        inside = run_in_netns(rig.fds["node"], _listening)
        store = MemoryStore()
        server = ApiServer(create_app(store, ServerConfig(service_cidrs=FACTS.service_cidrs)))
        path = str(tmp_path / "api")
        outside = socket.socket(socket.AF_UNIX)
        outside.bind(path)
        outside.listen()
        await server.start([Listener(inside), Listener(outside)])
        try:
            async with ApiClient("http://api", unix_socket=path) as client:
                made = Site(rig, client, inside.getsockname()[1])
                await _objects(client)
                yield made
        finally:
            await server.stop()
            await store.close()


def _listening() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


async def _remove_rules(rig: ServiceRig) -> None:
    """As a stranger would: with another socket."""
    kernel = LinuxKernel(rig.fds["node"])
    try:
        applied = await kernel.apply((CommitNft(Batch(tuple(DelTable(TableRef(f, TABLE)) for f in Family))),))
        assert applied.ok, applied.failures
    finally:
        await kernel.close()


async def _objects(client: ApiClient) -> None:
    """The node, and a Service of all kinds with two pods here and one elsewhere."""
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": FACTS.name}, "spec": {"podCIDR": "10.244.1.0/24"}}
    await client.create(NODES, node)
    addresses = [{"type": "InternalIP", "address": str(ip)} for ip in FACTS.node_ips]
    await client.patch(NODES, FACTS.name, {"status": {"addresses": addresses}}, subresource="status")
    spec: dict[str, Any] = {
        "type": "LoadBalancer",
        "clusterIP": WEB,
        "externalTrafficPolicy": "Local",
        "healthCheckNodePort": 30999,
        "ports": [{"name": "http", "port": 80, "nodePort": 30080}, {"name": "dns", "port": 53, "protocol": "UDP"}],
    }
    meta = {"name": "web", "namespace": "default"}
    await client.create(SERVICES, {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec})
    piece = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "endpoints": [
            {"addresses": ["10.244.1.2"], "nodeName": FACTS.name},
            {"addresses": ["10.244.1.3"], "nodeName": FACTS.name},
            {"addresses": ["10.244.2.2"], "nodeName": "n2"},
        ],
        "ports": [{"name": "http", "port": 8080}, {"name": "dns", "port": 8080, "protocol": "UDP"}],
    }
    await client.create(ENDPOINTSLICES, piece)


async def until(probe: Callable[[], Awaitable[bool]], process: "subprocess.Popen[str] | None" = None) -> float:
    """Ask again and again until the answer is yes; the seconds it took."""
    started = time.monotonic()
    async with asyncio.timeout(20):
        while not await probe():
            assert process is None or process.poll() is None, process.communicate()[1]
            await asyncio.sleep(0.01)
    return time.monotonic() - started


async def _leads(site: Site) -> None:
    """The Service from a pod, from outside, and at the health-check port."""
    rig = site.rig
    assert await rig.who("p4", WEB, 80, times=40) == {"p2", "p3", "far"}
    assert await rig.who("world", "198.18.0.11", 30080, times=20) == {"p2", "p3"}
    status, body = await site.get("world", "198.18.0.11", 30999, "/")
    assert (status, json.loads(body)["localEndpoints"]) == (200, 2)


async def test_a_proxy_serves_repairs_and_leaves(site: Site) -> None:
    async with site.proxy() as process:
        await _leads(site)
        assert await site.get("node", "127.0.0.1", METRICS, "/proxyMode") == (200, "nftables")
        connections = await site.metric('podwire_service_connections_total{namespace="default",service="web"')
        assert connections == 60
        assert await site.metric("podwire_endpoint_connections_total", "/metrics/endpoints") == 60
        await _remove_rules(site.rig)
        assert await until(site.answers, process) < 1.0
        assert await site.metric("podwire_proxy_repairs_total") == 1
        other = await asyncio.to_thread(site.command("--master", "http://127.0.0.1:1").communicate)
        assert "another podwire proxy serves this host already" in other[1]
        process.send_signal(signal.SIGTERM)
        _, said = await asyncio.to_thread(process.communicate)
        assert process.returncode == 0, said
        assert "rules were not as left" in said
        assert "the rules stay" in said
    assert await site.answers()
    cleaner = site.command("--cleanup")
    _, said = await asyncio.to_thread(cleaner.communicate)
    assert cleaner.returncode == 0, said
    assert not await site.answers()
    assert not (await site.rig.kernel.observe_nft(TABLE)).tables


async def test_a_datagrams_client_follows_its_service(site: Site) -> None:
    """One socket, one tracked connection: it is moved on when its endpoint goes, and refused when the last has gone."""
    async with site.proxy():
        with site.rig.open("p4", socket.SOCK_DGRAM, WEB) as sock:
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, (WEB, 53))

            async def who() -> str:
                await loop.sock_sendall(sock, b"who?")
                async with asyncio.timeout(1):
                    return (await loop.sock_recv(sock, 100)).decode().split()[0]

            addresses = {"p2": "10.244.1.2", "p3": "10.244.1.3", "far": "10.244.2.2"}
            first = await who()
            assert await who() == first
            del addresses[first]
            rest = [{"addresses": [ip], "nodeName": FACTS.name} for ip in addresses.values()]
            await site.client.patch(ENDPOINTSLICES, "web-1", {"endpoints": rest}, "default")

            async def moved() -> bool:
                return await who() in addresses

            await until(moved)
            await site.client.delete(SERVICES, "web", "default")

            async def gone() -> bool:
                try:
                    await who()
                except (ConnectionRefusedError, PermissionError, TimeoutError):
                    return True
                return False

            await until(gone)


async def test_another_mode_takes_over_with_the_next_start(site: Site) -> None:
    if find_programs(Flavour.NFT) is None:
        pytest.skip("iptables (nft) is not installed")
    async with site.proxy():
        await _leads(site)
    async with site.proxy("--proxy-mode", "iptables"):
        await _leads(site)
        assert (await site.get("node", "127.0.0.1", METRICS, "/proxyMode"))[1] == "iptables"

        async def alone() -> bool:
            return not (await site.rig.kernel.observe_nft(TABLE)).tables

        await until(alone)
        await _leads(site)
