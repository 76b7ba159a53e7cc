"""`podwire server`, `token`, `join` and `leave` on machines of their own: real commands, certificates, pods and packets."""

import asyncio
import signal
import socket
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest
import pytest_asyncio
from hostrig import Host, answering, deployment, machines, ready, until
from overlayrig import until as eventually
from sandboxrig import Container

from podwire.client.api import ApiClient
from podwire.client.errors import AlreadyExists
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import run_in_netns
from podwire.model.cni import TRY_LATER
from podwire.model.meta import Json
from podwire.model.resources import DEPLOYMENTS, NODES, PODS, SERVICECIDRS, SERVICES
from podwire.plan.services_rules import TABLE

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("VXLAN devices", "bridge devices", "nftables"),
    pytest.mark.timeout(120),
    pytest.mark.asyncio(loop_scope="module"),
]


class Site:
    """A server on the first machine, two nodes on the others."""

    def __init__(self, hosts: list[Host], client: ApiClient, data: Path) -> None:
        self.server, *self.nodes = hosts
        self.client, self.data = client, data

    async def token(self) -> str:
        return (await self.server.podwire("token", "--data-dir", str(self.data), "--only")).strip()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    root = tmp_path_factory.mktemp("hosts")
    data = root / "server"
    async with machines(root, 3) as hosts:
        server = hosts[0]
        await server.start("server", "--data-dir", str(data), "--advertise", server.address)
        client = await answering(data / "admin.kubeconfig")
        made = Site(hosts, client, data)
        token = await made.token()
        for node in made.nodes:
            await node.join(f"https://{server.address}:6443", "--token", token, "--name", node.name)
        try:
            await until(client, NODES, lambda nodes: len(nodes) == 2 and all(map(ready, nodes)))
            yield made
        finally:
            await client.close()


def addresses(pods: list[Json]) -> dict[str, str]:
    return {pod["metadata"]["uid"]: pod["status"]["podIP"] for pod in pods}


async def _web(site: Site, replicas: int) -> list[Json]:
    """The Deployment that all tests here share, with that many pods: whichever test comes first makes it."""
    try:
        await site.client.create(DEPLOYMENTS, deployment("web", replicas))
    except AlreadyExists:
        await site.client.patch(DEPLOYMENTS, "web", {"spec": {"replicas": replicas}}, "default")
    return await _pods(site, "web", replicas)


async def _pods(site: Site, name: str, count: int) -> list[Json]:
    return await until(
        site.client, PODS, lambda pods: len(pods) == count and all(map(ready, pods)), label_selector=f"app={name}"
    )


async def test_pods_on_two_machines_behind_one_service(site: Site) -> None:
    service = {
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
    }
    cluster_ip = (await site.client.create(SERVICES, service))["spec"]["clusterIP"]
    pods = await _web(site, 4)
    assert {pod["spec"]["nodeName"] for pod in pods} == {"host-2", "host-3"}
    for node in site.nodes:
        for pod in pods:
            answer = await asyncio.to_thread(node.fetch, pod["status"]["podIP"], 8080)
            assert pod["metadata"]["name"] in answer
        seen = {await asyncio.to_thread(node.fetch, cluster_ip, 80) for _ in range(12)}
        assert len(seen - {""}) > 1
    log = await site.client.request("GET", f"/api/v1/namespaces/default/pods/{pods[0]['metadata']['name']}/log", accept="*/*")
    assert log is not None  # through the node's own API, by its own token


async def test_nodes_find_the_way_to_a_range_that_is_added_and_forget_it_with_the_range(site: Site) -> None:
    """They have no default route: without one to the range, their own processes could not reach its Services."""
    await _web(site, 2)
    await site.client.create(SERVICECIDRS, {"metadata": {"name": "more"}, "spec": {"cidrs": ["172.30.0.0/24"]}})
    spec = {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}], "clusterIP": "172.30.0.9"}
    await site.client.create(SERVICES, {"metadata": {"name": "more", "namespace": "default"}, "spec": spec})
    for node in site.nodes:
        await eventually(partial(_answers, node, "172.30.0.9"))
    await site.client.delete(SERVICECIDRS, "more")
    await site.client.delete(SERVICES, "more", "default")
    await until(site.client, SERVICECIDRS, lambda found: len(found) == 1)
    for node in site.nodes:
        await eventually(partial(_has_no_way, node, "172.30.0.9"))


async def _answers(node: Host, address: str) -> bool:
    return (await asyncio.to_thread(node.fetch, address, 80)).startswith("HTTP/1.1 200")


def _has_no_way(node: Host, address: str) -> bool:
    """Whether no packet to `address` could leave the machine."""

    def refused() -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, 9))
            except OSError:
                return True
        return False

    return run_in_netns(node.netns, refused)


async def test_an_agent_killed_and_a_server_killed_take_nothing_with_them(site: Site) -> None:
    pods = await _web(site, 4)
    node = site.nodes[0]
    await node.end(signal.SIGKILL)
    await site.server.end(signal.SIGKILL)
    for pod in pods:
        assert pod["metadata"]["name"] in await asyncio.to_thread(site.nodes[1].fetch, pod["status"]["podIP"], 8080)
    await node.join()  # neither URL nor token are needed again
    container = await _attached(node, "offline")  # by what the node remembers of its network
    here, there = (next(pod for pod in pods if pod["spec"]["nodeName"] == n.name) for n in site.nodes)
    for pod in (here, there):
        assert pod["metadata"]["name"] in await asyncio.to_thread(container.fetch, pod["status"]["podIP"], 8080)
    await site.server.start("server", "--data-dir", str(site.data), "--advertise", site.server.address)
    fresh = await answering(site.data / "admin.kubeconfig")
    await fresh.close()
    again = await _pods(site, "web", 4)
    assert {p["metadata"]["uid"]: p["status"]["podIP"] for p in pods} == {
        p["metadata"]["uid"]: p["status"]["podIP"] for p in again
    }
    assert all(c["restartCount"] == 0 for p in again for c in p["status"]["containerStatuses"])
    for pod in await _web(site, 6):
        assert pod["metadata"]["name"] in await asyncio.to_thread(node.fetch, pod["status"]["podIP"], 8080)
    assert container.ip not in {pod["status"]["podIP"] for pod in await _pods(site, "web", 6)}
    await asyncio.to_thread(container.delete)


async def _attached(node: Host, name: str) -> Container:
    """As an engine that tries again as long as it is told to."""
    container = Container(node, name)
    async with asyncio.timeout(20):
        while True:
            try:
                await asyncio.to_thread(container.add)
            except AssertionError as refused:
                if refused.args[0]["code"] != TRY_LATER:
                    raise
                await asyncio.sleep(0.1)
            else:
                return container


async def test_a_second_agent_on_the_machine_refuses(site: Site) -> None:
    node = site.nodes[1]
    with pytest.raises(AssertionError, match="another agent"):
        await node.podwire("join", *node.directories, "--cni-socket", str(node.cni_socket))


async def test_who_leaves_leaves_nothing(site: Site) -> None:
    node = site.nodes[1]
    await _web(site, 6)
    with pytest.raises(AssertionError, match="another agent"):
        await node.podwire("leave", *node.directories)
    assert await node.end() == 0
    await node.podwire("leave", *node.directories)
    await until(site.client, NODES, lambda nodes: [n["metadata"]["name"] for n in nodes] == ["host-2"])
    kernel = LinuxKernel(node.netns)
    try:
        state = await kernel.observe()
        assert set(state.links) == {"lo", "eth0"}
        assert not (await kernel.observe_nft(TABLE)).tables
        assert not state.routes
    finally:
        await kernel.close()
    assert not node.state.exists()
    assert not node.run.exists()
    pods = await _pods(site, "web", 6)
    assert {pod["spec"]["nodeName"] for pod in pods} == {"host-2"}
    with pytest.raises(AssertionError, match="no node"):
        await node.podwire("leave", *node.directories)
    await node.join(f"https://{site.server.address}:6443", "--token", await site.token(), "--name", node.name)
    await until(site.client, NODES, lambda nodes: len(nodes) == 2 and all(map(ready, nodes)))
