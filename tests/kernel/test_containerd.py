"""Debian's containerd, through CRI and CNI, on two machines of one cluster: what docs/guides/containerd.md says of pods, host
ports, Pods of the API and Services, with the calls of `crictl` made here over the same socket."""

import asyncio
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from cririg import TCP, UDP, Containerd, Sandbox, containerd_on, need_containerd
from enginesite import Site, engine_site, left_on, said, shown, web_service
from hostrig import until

from podwire.model.resources import PODS

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("VXLAN devices", "bridge devices", "nftables"),
    pytest.mark.timeout(180),
    pytest.mark.asyncio(loop_scope="module"),
]

KUBECTL = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or "kubectl"
LABELS = {"podwire.io/labels": "app=web"}


@dataclass
class Web:
    """A pod with a web server that says who it is."""

    engine: Containerd
    sandbox: Sandbox
    container: str

    async def fetch(self, address: str) -> str:
        return (await self.engine.execute(self.container, "wget", "-q", "-O", "-", f"http://{address}/")).strip()


async def start_web(engine: Containerd, who: str, ports: tuple[tuple[int, int, int], ...] = ()) -> Web:
    sandbox = await engine.run_sandbox("web", ports=ports, annotations=LABELS)
    script = f"echo {who} > /tmp/index.html; exec httpd -f -p 80 -h /tmp"
    container = await engine.run_container(sandbox, "web", "sh", "-c", script)
    await engine.execute(container, "sh", "-c", "until wget -q -O /dev/null http://127.0.0.1/; do :; done")  # it listens now
    return Web(engine, sandbox, container)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site[Containerd]]:
    need_containerd()
    async with engine_site(tmp_path_factory.mktemp("cri"), containerd_on) as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pods(site: Site[Containerd]) -> list[Web]:
    one, two = site.engines
    ports = ((TCP, 80, 8080), (UDP, 53, 5353))
    return list(await asyncio.gather(start_web(one, "one", ports), start_web(two, "two")))


async def test_pods_of_two_machines_reach_each_other(site: Site[Containerd], pods: list[Web]) -> None:
    one, two = pods
    v4, v6 = await two.engine.addresses(two.sandbox)
    for address in (v4, f"[{v6}]"):
        assert await one.fetch(address) == "two"
    for address in (v4, v6):
        assert "1 packets received" in await one.engine.execute(one.container, "ping", "-c", "1", "-W", "3", address)
    assert "127.0.0.1/8" in await one.engine.execute(one.container, "ip", "addr", "show", "lo", "up")


async def test_a_host_port_is_reached_from_another_machine_and_its_own(site: Site[Containerd], pods: list[Web]) -> None:
    here, there = site.nodes
    assert await said(there, here.address, 8080) == "one"
    assert await said(there, here.address6, 8080) == "one"
    assert await said(here, here.address, 8080) == "one"
    with pytest.raises(AssertionError, match="host port 8080/TCP is in use"):
        await site.engines[0].run_sandbox("rival", ports=[(TCP, 81, 8080)])


async def test_pods_of_the_engine_are_in_the_api_and_a_service_selects_them(site: Site[Containerd], pods: list[Web]) -> None:
    found = await until(site.client, PODS, lambda found: shown(found, "web-host-2", "web-host-3"))
    by_name = {pod["metadata"]["name"]: pod for pod in found}
    two = pods[1]
    assert [ip["ip"] for ip in by_name["web-host-3"]["status"]["podIPs"]] == await two.engine.addresses(two.sandbox)
    where = ("--kubeconfig", str(site.kubeconfig), "--cache-dir", str(site.kubeconfig.parent / "cache"))
    listed = await site.server.call(KUBECTL, *where, "get", "pods", "-l", "app=web")
    assert [line.split()[:3] for line in listed.splitlines()[1:]] == [
        ["web-host-2", "1/1", "Running"],
        ["web-host-3", "1/1", "Running"],
    ]
    address = await web_service(site)
    for host in site.nodes:
        assert {await said(host, address, 80) for _ in range(20)} == {"one", "two"}


async def test_restarts_of_the_engine_and_of_the_agent(site: Site[Containerd], pods: list[Web]) -> None:
    engine, host = site.engines[0], site.nodes[0]
    one, two = pods
    v4, v6 = await engine.addresses(one.sandbox)
    await engine.kill()
    assert await two.fetch(v4) == "one"
    await engine.start()
    assert await engine.addresses(one.sandbox) == [v4, v6]
    assert (await engine.plugin("STATUS"))[0] == 0
    await host.end(signal.SIGKILL)
    assert await two.fetch(v4) == "one"
    assert await said(site.nodes[1], host.address, 8080) == "one"
    status, words = await engine.plugin("STATUS")
    assert (status, '"code":50' in words) == (1, True), words
    await engine.remove(one.sandbox)  # nobody takes the DEL now: it is kept for the next agent
    await host.join()
    await until(site.client, PODS, lambda found: shown(found, "web-host-3"))
    pods[0] = await start_web(engine, "one", ((TCP, 80, 8080),))
    await until(site.client, PODS, lambda found: shown(found, "web-host-2", "web-host-3"))
    assert await said(site.nodes[1], host.address, 8080) == "one"


async def test_what_is_removed_leaves_nothing(site: Site[Containerd], pods: list[Web]) -> None:
    for web in pods:
        await web.engine.remove(web.sandbox)
    await until(site.client, PODS, lambda found: not found)
    for host in site.nodes:
        assert not await left_on(host)
        assert await said(host, site.nodes[0].address, 8080) == ""
        assert not (await host.podwire("ipam", "ls", "--state-dir", str(host.state))).splitlines()[1:]
