"""podwire in flannel's place alone, Services by Kubernetes' own kube-proxy; then in the place of both, with the pods there."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import pytest_asyncio
from hostrig import Host, http_get, machines
from kuberig import MANIFESTS, SLICES, Kubernetes, kube_proxy, kubernetes, program, register
from sandboxrig import Container, cni_ready, end_listener, start_cluster_agent

from podwire.model.resources import SERVICES

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("VXLAN devices", "bridge devices", "nftables", "netfilter on bridges (br_netfilter)"),
    pytest.mark.timeout(180),
    pytest.mark.asyncio(loop_scope="module"),
]

WEB, OURS, NODE_PORT = "10.96.0.80", "10.96.0.81", 30080
OUR_LABEL = {"service.kubernetes.io/service-proxy-name": "podwire"}


class Site:
    def __init__(self, hosts: list[Host], kube: Kubernetes, config: Path) -> None:
        self.hosts, self.kube, self.config = hosts, kube, config
        self.proxies = [kube_proxy(kube, host) for host in hosts]

    async def start_agents(self, *arguments: str) -> None:
        for host in self.hosts:
            await start_cluster_agent(host, self.config, *arguments)

    async def service(self, name: str, address: str, endpoint: str, labels: dict[str, str], **spec: object) -> None:
        meta, port = {"name": name, "namespace": "default", "labels": labels}, {"port": 80, "protocol": "TCP"}
        nodeport = {"nodePort": NODE_PORT} if spec else {}
        await self.kube.client.create(
            SERVICES, {"metadata": meta, "spec": {"clusterIP": address, "ports": [port | nodeport], **spec}}
        )
        meta |= {"labels": labels | {"kubernetes.io/service-name": name}}
        endpoints, ports = [{"addresses": [endpoint]}], [port | {"name": ""}]
        await self.kube.client.create(SLICES, {"metadata": meta, "addressType": "IPv4", "endpoints": endpoints, "ports": ports})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    program("kube-proxy")
    root = tmp_path_factory.mktemp("beside")
    async with AsyncExitStack() as stack:
        hosts = await stack.enter_async_context(machines(root, 2))
        kube = await stack.enter_async_context(kubernetes(root / "kube"))
        await kube.kubectl("apply", "-k", str(MANIFESTS / "overlays/flannel"))
        site = Site(hosts, kube, kube.account_config("agent", await kube.token("podwire")))
        for number, host in enumerate(hosts, 1):
            await register(kube.client, host.name, host.address, f"10.244.{number}.0/24")
        await site.start_agents("--no-services")
        for proxy in site.proxies:
            await proxy.start()
            stack.push_async_callback(proxy.end)
        yield site


async def test_services_by_kube_proxy_then_by_podwire(site: Site) -> None:
    one, two = (Container(host, f"pod-{number}") for number, host in enumerate(site.hosts))
    for container in (one, two):
        await cni_ready(container.host)
        await asyncio.to_thread(container.add)
    listener = two.serve("two")
    await site.service("web", WEB, two.ip, {}, type="NodePort")
    await site.service("ours", OURS, two.ip, OUR_LABEL)
    await _all_ways(site, one, two)
    assert WEB not in await site.hosts[0].call("nft", "list", "table", "ip", "podwire")

    for proxy in site.proxies:
        await proxy.end()
    for host in site.hosts:
        await host.end()
    await site.start_agents()
    where = ("--kubeconfig", str(site.kube.admin_config), "--timeout", "60")
    for service in ("web", "ours"):
        assert "host-1, host-2" in await site.hosts[0].podwire("wait", "--programmed", f"svc/{service}", *where)
    for host in site.hosts:
        await host.podwire("proxy", "--cleanup-kube-proxy")
        assert "KUBE-SVC" not in await host.call("iptables-save")
    await _all_ways(site, one, two)
    end_listener(listener)
    for container in (one, two):
        await asyncio.to_thread(container.delete)


async def _all_ways(site: Site, one: Container, two: Container) -> None:
    for address in (WEB, OURS):
        for container in (one, two):  # from another node, and from the endpoint itself
            assert await container.word_of(address) == "two", (address, container.name)
    for host in site.hosts:  # with the endpoint, and without
        answer = await asyncio.to_thread(http_get, host.address, NODE_PORT)
        assert answer.endswith("two"), host.name
