"""Debian's podman, through CNI, on two machines of one cluster: packets, published ports, Pods and Services."""

import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from enginesite import Site, engine_site, left_on, said, shown, web_service
from hostrig import until
from podmanrig import IMAGE, Podman, need_podman, podman_on

from podwire.model.resources import PODS

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("VXLAN devices", "bridge devices", "nftables"),
    pytest.mark.timeout(180),
    pytest.mark.asyncio(loop_scope="module"),
]

WEB = ("sh", "-c", "echo $WHO > /tmp/index.html; exec httpd -f -p 80 -h /tmp")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site[Podman]]:
    need_podman()
    async with engine_site(tmp_path_factory.mktemp("podman"), podman_on) as made:
        yield made


async def web(engine: Podman, who: str, *arguments: str) -> None:
    await engine.run("web", "-e", f"WHO={who}", "--network-alias", "app=web", *arguments, command=WEB)


async def fetch(engine: Podman, address: str) -> str:
    """What the web server at `address` says to a process in the container."""
    return await engine("exec", "web", "wget", "-q", "-O", "-", f"http://{address}/")


async def test_containers_of_two_machines_reach_each_other(site: Site[Podman]) -> None:
    one, two = site.engines
    await web(one, "one", "-p", "8080:80", "-p", "5353:53/udp")
    await web(two, "two")
    v4, v6 = await two.addresses("web")
    for address in (v4, f"[{v6}]"):
        assert (await fetch(one, address)).strip() == "two"
    assert "1 packets received" in await one("exec", "web", "ping", "-c", "1", "-W", "3", v4)
    assert "podwire" in await one("network", "ls")


async def test_a_published_port_is_reached_from_another_machine_and_its_own(site: Site[Podman]) -> None:
    here, there = site.nodes
    assert await said(there, here.address, 8080) == "one"
    assert await said(there, here.address6, 8080) == "one"
    assert await said(here, here.address, 8080) == "one"
    code, words = await site.engines[0].attempt(
        "run", "--cgroups=disabled", "--security-opt", "seccomp=unconfined", "--rm", "-p", "8080:81", IMAGE, "true"
    )
    assert code != 0, words


async def test_containers_are_pods_and_a_service_selects_them(site: Site[Podman]) -> None:
    pods = await until(site.client, PODS, lambda found: shown(found, "web-host-2", "web-host-3"))
    by_name = {pod["metadata"]["name"]: pod for pod in pods}
    assert [ip["ip"] for ip in by_name["web-host-3"]["status"]["podIPs"]] == await site.engines[1].addresses("web")
    assert all(pod["metadata"]["labels"] == {"app": "web"} for pod in pods)
    address = await web_service(site)
    for host in site.nodes:
        assert {await said(host, address, 80) for _ in range(20)} == {"one", "two"}


async def test_a_restarted_container_and_a_killed_agent(site: Site[Podman]) -> None:
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


async def test_an_address_and_a_mac_address_that_are_asked_for(site: Site[Podman]) -> None:
    one = site.engines[0]
    subnet = (await one.addresses("web"))[0].rpartition(".")[0]
    asked = ("--network", "podwire", "--ip", f"{subnet}.77", "--mac-address", "0a:00:00:00:00:77")
    await one.run("fixed", *asked, command=("sleep", "1000"))
    assert (await one.addresses("fixed"))[0] == f"{subnet}.77"
    assert "0a:00:00:00:00:77" in await one("exec", "fixed", "ip", "link", "show", "eth0")
    code, words = await one.attempt(
        "run", "--cgroups=disabled", "--rm", "--network", "podwire", "--ip", f"{subnet}.77", IMAGE, "true"
    )
    assert code != 0, "it has a holder"
    assert f"{subnet}.77" in words
    await one("rm", "-f", "-t", "0", "fixed")


async def test_a_machine_with_containers_does_not_leave(site: Site[Podman]) -> None:
    host = site.nodes[1]
    assert await host.end() == 0
    with pytest.raises(AssertionError, match="1 containers of an engine are attached here"):
        await host.podwire("leave", *host.directories)
    await host.join()
    await until(site.client, PODS, lambda found: shown(found, "web-host-2", "web-host-3"))


async def test_what_is_removed_leaves_nothing(site: Site[Podman]) -> None:
    for engine in site.engines:
        await engine("rm", "-f", "-t", "0", "web")
    await until(site.client, PODS, lambda found: not found)
    for host in site.nodes:
        assert not await left_on(host)
        assert await said(host, site.nodes[0].address, 8080) == ""
