"""Debian's podman, through CNI, on two machines of one cluster: packets, published ports, Pods and Services."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio
from hostrig import Host, answering, machines, ready, until
from podmanrig import IMAGE, Podman, need_podman, podman_on

from podwire.client.api import ApiClient
from podwire.cni.install import install_configuration, install_plugin
from podwire.kernel.linux import LinuxKernel
from podwire.model.kernelstate import Veth
from podwire.model.meta import Json
from podwire.model.resources import ENDPOINTSLICES, NODES, PODS, SERVICES

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("VXLAN devices", "bridge devices", "nftables"),
    pytest.mark.timeout(180),
    pytest.mark.asyncio(loop_scope="module"),
]

WEB = ("sh", "-c", "echo $WHO > /tmp/index.html; exec httpd -f -p 80 -h /tmp")


class Site:
    def __init__(self, hosts: list[Host], client: ApiClient, engines: list[Podman]) -> None:
        self.server, *self.nodes = hosts
        self.client, self.engines = client, engines


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    need_podman()
    root = tmp_path_factory.mktemp("podman")
    data = root / "server"
    async with AsyncExitStack() as stack:
        hosts = await stack.enter_async_context(machines(root, 3))
        server, *nodes = hosts
        cidrs = ("--pod-cidr", "10.244.0.0/16", "--pod-cidr", "fd00:10:244::/56")
        await server.start("server", "--data-dir", str(data), "--advertise", server.address, *cidrs)
        client = await stack.enter_async_context(await answering(data / "admin.kubeconfig"))
        token = (await server.podwire("token", "--data-dir", str(data), "--only")).strip()
        engines = []
        for node in nodes:
            own = ("--name", node.name, "--address", node.address, "--address", node.address6)
            await node.join(f"https://{server.address}:6443", "--token", token, *own)
            folder = root / f"engine-{node.name}"
            engines.append(await stack.enter_async_context(podman_on(node, folder)))
            install_plugin(folder / "bin", node.cni_socket)
            install_configuration(folder / "net.d", "podwire")
        await until(client, NODES, lambda found: len(found) == 2 and all(map(ready, found)))
        yield Site(hosts, client, engines)


async def web(engine: Podman, who: str, *arguments: str) -> None:
    await engine.run("web", "-e", f"WHO={who}", "--network-alias", "app=web", *arguments, command=WEB)


async def fetch(engine: Podman, address: str) -> str:
    """What the web server at `address` says to a process in the container."""
    return await engine("exec", "web", "wget", "-q", "-O", "-", f"http://{address}/")


async def said(host: Host, address: str, port: int) -> str:
    """The body of what a server says to a process of the host itself."""
    return (await asyncio.to_thread(host.fetch, address, port)).rpartition("\r\n\r\n")[2].strip()


def shown(pods: list[Json], *names: str) -> bool:
    return sorted(pod["metadata"]["name"] for pod in pods) == sorted(names) and all(map(ready, pods))


async def test_containers_of_two_machines_reach_each_other(site: Site) -> None:
    one, two = site.engines
    await web(one, "one", "-p", "8080:80", "-p", "5353:53/udp")
    await web(two, "two")
    v4, v6 = await two.addresses("web")
    for address in (v4, f"[{v6}]"):
        assert (await fetch(one, address)).strip() == "two"
    assert "1 packets received" in await one("exec", "web", "ping", "-c", "1", "-W", "3", v4)
    assert "podwire" in await one("network", "ls")


async def test_a_published_port_is_reached_from_another_machine_and_its_own(site: Site) -> None:
    here, there = site.nodes
    assert await said(there, here.address, 8080) == "one"
    assert await said(there, here.address6, 8080) == "one"
    assert await said(here, here.address, 8080) == "one"
    code, words = await site.engines[0].attempt(
        "run", "--cgroups=disabled", "--security-opt", "seccomp=unconfined", "--rm", "-p", "8080:81", IMAGE, "true"
    )
    assert code != 0, words


async def test_containers_are_pods_and_a_service_selects_them(site: Site) -> None:
    pods = await until(site.client, PODS, lambda found: shown(found, "web-host-2", "web-host-3"))
    by_name = {pod["metadata"]["name"]: pod for pod in pods}
    assert [ip["ip"] for ip in by_name["web-host-3"]["status"]["podIPs"]] == await site.engines[1].addresses("web")
    assert all(pod["metadata"]["labels"] == {"app": "web"} for pod in pods)
    spec = {"selector": {"app": "web"}, "ports": [{"port": 80}]}
    service = await site.client.create(SERVICES, {"metadata": {"name": "web", "namespace": "default"}, "spec": spec})
    address = service["spec"]["clusterIP"]
    await until(site.client, ENDPOINTSLICES, lambda found: _endpoints(found) == 2)
    for host in site.nodes:
        assert {await said(host, address, 80) for _ in range(20)} == {"one", "two"}


def _endpoints(slices: list[Json]) -> int:
    web_slices = [s for s in slices if s["metadata"]["labels"].get("kubernetes.io/service-name") == "web"]
    return sum(len(s.get("endpoints") or ()) for s in web_slices)


async def test_a_restarted_container_and_a_killed_agent(site: Site) -> None:
    one, two = site.engines
    host = site.nodes[0]
    await one("restart", "-t", "0", "web")
    v4, _ = await one.addresses("web")
    assert (await fetch(two, v4)).strip() == "one"
    await host.end(signal.SIGKILL)
    assert (await fetch(two, v4)).strip() == "one"
    assert await said(site.nodes[1], host.address, 8080) == "one"
    await one("stop", "-t", "0", "web")  # nobody takes the DEL now: it is kept for the next agent
    await host.join()
    await until(site.client, PODS, lambda found: shown(found, "web-host-3"))
    await one("start", "web")
    v4, _ = await one.addresses("web")
    assert (await fetch(two, v4)).strip() == "one"
    await until(site.client, PODS, lambda found: shown(found, "web-host-2", "web-host-3"))


async def test_what_is_removed_leaves_nothing(site: Site) -> None:
    for engine in site.engines:
        await engine("rm", "-f", "-t", "0", "web")
    await until(site.client, PODS, lambda found: not found)
    for host in site.nodes:
        kernel = LinuxKernel(host.netns)
        try:
            state = await kernel.observe()
        finally:
            await kernel.close()
        assert not [name for name, link in state.links.items() if isinstance(link.kind, Veth) and link.owned]
        assert await said(host, site.nodes[0].address, 8080) == ""
