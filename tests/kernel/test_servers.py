"""Several `podwire server`s on one etcd, and nodes that join them all: servers are killed and stopped, nodes and pods go on."""

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from etcdrig import Member, one_member
from hostrig import Host, answering, deployment, machines, ready, until

from podwire.client.api import ApiClient
from podwire.hosts.server import LEASE
from podwire.model.meta import Json
from podwire.model.resources import DEPLOYMENTS, ENDPOINTSLICES, LEASES, NODES, PODS, SERVICES

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("VXLAN devices", "bridge devices", "nftables"),
    pytest.mark.timeout(120),
    pytest.mark.asyncio(loop_scope="module"),
]

FABRIC = "198.18.7.254"


@dataclass
class Site:
    """`clients[i]` is one of `servers[i]`. The nodes know the servers in this order; the second leads the controllers."""

    servers: list[Host]
    nodes: list[Host]
    clients: list[ApiClient]

    @property
    def urls(self) -> list[str]:
        return [f"https://{server.address}:6443" for server in self.servers]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    root = tmp_path_factory.mktemp("servers")
    async with AsyncExitStack() as stack:
        hosts = await stack.enter_async_context(machines(root, 5))
        etcd = await stack.enter_async_context(one_member(root, host=FABRIC))
        data = [root / f"server-{n}" for n in range(3)]
        leader = await start_server(stack, hosts[1], data[1], etcd)
        await until(leader, LEASES, lambda leases: any(lease["metadata"]["name"] == LEASE for lease in leases))
        for number in (0, 2):
            shutil.copytree(data[1] / "pki", data[number] / "pki")
        first, third = await asyncio.gather(*(start_server(stack, hosts[n], data[n], etcd) for n in (0, 2)))
        made = Site(hosts[:3], hosts[3:], [first, leader, third])
        await until(first, ENDPOINTSLICES, lambda slices: len(slices[0]["endpoints"]) == 3)
        printed = (await made.servers[0].podwire("token", "--data-dir", str(data[0]))).split()
        assert printed[:3] == ["podwire", "join", ",".join(made.urls)]
        await asyncio.gather(*(node.join(*printed[2:], "--name", node.name) for node in made.nodes))
        await until(first, NODES, lambda nodes: len(nodes) == 2 and all(map(ready, nodes)))
        yield made


async def start_server(stack: AsyncExitStack, host: Host, data: Path, etcd: Member) -> ApiClient:
    await host.start("server", "--data-dir", str(data), "--advertise", host.address, "--etcd", etcd.client_url)
    return await stack.enter_async_context(await answering(data / "admin.kubeconfig"))


async def pods(client: ApiClient, count: int) -> list[Json]:
    return await until(client, PODS, lambda found: len(found) == count and all(map(ready, found)), label_selector="app=web")


async def answers(node: Host, address: str, port: int) -> str:
    return await asyncio.to_thread(node.fetch, address, port)


async def test_pods_are_made_through_whatever_server(site: Site) -> None:
    await site.clients[0].create(DEPLOYMENTS, deployment("web", 2))
    ports = [{"port": 80, "targetPort": 8080}]
    service = {"metadata": {"name": "web", "namespace": "default"}, "spec": {"selector": {"app": "web"}, "ports": ports}}
    address = (await site.clients[2].create(SERVICES, service))["spec"]["clusterIP"]
    for pod in await pods(site.clients[1], 2):
        for node in site.nodes:
            assert pod["metadata"]["name"] in await answers(node, pod["status"]["podIP"], 8080)
    assert await answers(site.nodes[0], address, 80)


async def test_the_nodes_server_is_killed(site: Site) -> None:
    before = {pod["metadata"]["uid"] for pod in await pods(site.clients[0], 2)}
    await site.servers[0].end(signal.SIGKILL)
    await scaled(site, site.clients[2], 4)
    after = await pods(site.clients[2], 4)
    assert before < {pod["metadata"]["uid"] for pod in after}
    assert all(c["restartCount"] == 0 for pod in after for c in pod["status"]["containerStatuses"])
    for node in site.nodes:
        log = node.log.read_text()
        assert f"going on with {site.urls[1]}" in log, log[-3000:]
        assert "listing again" not in log, "watches go on where they were"


async def test_the_leader_stops_and_only_one_server_is_left(site: Site) -> None:
    assert await site.servers[1].end() == 0
    await scaled(site, site.clients[2], 6)
    assert all("listing again" not in node.log.read_text() for node in site.nodes)


async def scaled(site: Site, client: ApiClient, count: int) -> None:
    """More pods come, everybody reaches them, and the Service of every node has them."""
    await client.patch(DEPLOYMENTS, "web", {"spec": {"replicas": count}}, "default")
    names = {pod["metadata"]["name"]: pod["status"]["podIP"] for pod in await pods(client, count)}
    for node in site.nodes:
        for name, ip in names.items():
            assert name in await answers(node, ip, 8080)
    address = (await client.get(SERVICES, "web", "default"))["spec"]["clusterIP"]
    for node in site.nodes:
        async with asyncio.timeout(10):
            seen: set[str] = set()
            while not all(any(name in answer for answer in seen) for name in names):
                seen.add(await answers(node, address, 80))
