"""Containers of an engine on a node of a cluster: across nodes, with host ports, through the agent's and the API's absences."""

import asyncio
import ipaddress
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cnirig import Outcome, config, environment, execute
from echoes import echo_server
from siterig import Site, call, two_nodes

from podwire.agent.node import NodeAgent
from podwire.agent.nodelock import AnotherAgent
from podwire.client.api import ApiClient
from podwire.kernel.linux import LinuxKernel
from podwire.kernel.netns import create_netns
from podwire.model.addr import Family, IPAddress
from podwire.model.cni import TRY_LATER
from podwire.plan.naming import host_veth
from podwire.testing.memorycluster import DUAL, MemoryRuntime, node_address

pytestmark = [pytest.mark.kernel, pytest.mark.needs("VXLAN devices", "bridge devices", "IPv6", "nftables")]

PORTS = {"portMappings": [{"hostPort": 8000, "containerPort": 8080, "protocol": "tcp"}]}


OTHER_PORTS = {"portMappings": [{"hostPort": 8001, "containerPort": 8080, "protocol": "tcp"}]}


class Engine:
    """An engine on n1."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.netns: dict[str, int] = {}

    async def call(self, verb: str, container: str = "", **more: Any) -> Outcome:
        path = ""
        if container and verb != "DEL":
            fd = self.netns.setdefault(container, 0) or create_netns()
            self.netns[container] = fd
            path = f"/proc/{os.getpid()}/fd/{fd}"
        return await execute(environment(self.socket, verb, container, path), config(**more))

    async def run(self, container: str, **more: Any) -> dict[Family, IPAddress]:
        done = await self.call("ADD", container, **more)
        assert done.status == 0, done.document
        ips = [ipaddress.ip_interface(entry["address"]).ip for entry in done.document["ips"]]
        return {DUAL[ip.version == 6]: ip for ip in ips}

    def close(self) -> None:
        for fd in self.netns.values():
            os.close(fd)


@pytest_asyncio.fixture
async def site(tmp_path: Path, make_netns: Callable[[], int]) -> AsyncIterator[Site]:
    async with two_nodes(tmp_path, (make_netns(), make_netns()), cni_socket=tmp_path / "cni.sock") as made:
        yield made


@pytest_asyncio.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    made = Engine(tmp_path / "cni.sock")
    yield made
    made.close()


async def test_a_container_and_a_pod_of_another_node_reach_each_other(site: Site, engine: Engine) -> None:
    async with site.cluster.agent(site.nodes[0]), site.cluster.agent(site.nodes[1]):
        ips = await engine.run("c1")
        far = await site.pod("far", "n2")
        for family in DUAL:
            with echo_server(far.netns, family):
                assert await asyncio.to_thread(call, engine.netns["c1"], far.ips[family]) == str(ips[family])
            with echo_server(engine.netns["c1"], family):
                assert await asyncio.to_thread(call, far.netns, ips[family]) == str(far.ips[family])


async def test_host_ports_from_elsewhere_last_until_del(site: Site, engine: Engine) -> None:
    async with site.cluster.agent(site.nodes[1]):
        async with site.cluster.agent(site.nodes[0]):
            await engine.run("c1", runtimeConfig=PORTS)
            for family in DUAL:
                with echo_server(engine.netns["c1"], family):
                    seen = await asyncio.to_thread(call, site.netns[1], node_address(1, family), 8000)
                    assert seen == str(node_address(2, family)), "the client's own address"
        with echo_server(engine.netns["c1"], Family.IPV4):
            assert await asyncio.to_thread(call, site.netns[1], node_address(1, Family.IPV4), 8000), "no agent is needed"
            async with site.cluster.agent(site.nodes[0]):
                assert await asyncio.to_thread(call, site.netns[1], node_address(1, Family.IPV4), 8000)
                assert (await engine.call("DEL", "c1")).status == 0
                with pytest.raises(OSError, match="refused"):
                    await asyncio.to_thread(call, site.netns[1], node_address(1, Family.IPV4), 8000)


# A connection that the API server accepts in the moment of its end is not closed by it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_without_api_server_containers_come_and_go(site: Site, engine: Engine) -> None:
    async with site.cluster.agent(site.nodes[0]):
        async with site.cluster.outage():
            await engine.run("c1", runtimeConfig=PORTS)
            assert (await engine.call("STATUS")).status == 0
            assert (await engine.call("DEL", "c1")).status == 0
            await engine.run("c2")
        assert host_veth("cni:c2/eth0") in (await site.nodes[0].kernel.observe()).links


async def test_a_second_agent_is_refused(site: Site, engine: Engine) -> None:
    async with site.cluster.agent(site.nodes[0]), ApiClient(site.cluster.url) as client:
        await engine.run("c1")
        same = replace(site.cluster.config(1), cni_socket=engine.socket)
        elsewhere = replace(same, state_dir=site.cluster.directory / "other")
        for settings, words in ((same, "works with"), (elsewhere, "serves")):
            kernel = LinuxKernel(site.netns[0])
            with pytest.raises(AnotherAgent, match=words):
                await NodeAgent(settings, kernel, client, MemoryRuntime()).run()
            await kernel.close()
        assert (await engine.call("STATUS")).status == 0
        assert host_veth("cni:c1/eth0") in (await site.nodes[0].kernel.observe()).links


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_an_agent_that_begins_without_the_api_serves_by_what_the_node_remembers(site: Site, engine: Engine) -> None:
    n1, n2 = site.nodes
    quick = replace(n1, config=replace(n1.config, patience_seconds=0.1))
    async with site.cluster.agent(n2):
        async with site.cluster.agent(n1):
            far, near = await site.pod("far", "n2"), await site.pod("near", "n1")
            await engine.run("c1", runtimeConfig=PORTS)
        async with AsyncExitStack() as outage:
            await outage.enter_async_context(site.cluster.outage())
            async with site.cluster.agent(quick, subnets=False) as agent:
                await site.cluster.until(lambda: attached(engine, "c2"))
                ips = await engine.run("c2")
                assert (await engine.call("STATUS")).status == 0
                assert agent.status().degraded.keys() == {"subnets"}
                refused = await engine.call("ADD", "c3", runtimeConfig=OTHER_PORTS)
                assert refused.code == TRY_LATER, "the Services are not known, so neither are host ports"
                for family in DUAL:
                    with echo_server(far.netns, family):
                        assert await asyncio.to_thread(call, engine.netns["c2"], far.ips[family]), "peers stay"
                    with echo_server(near.netns, family):
                        assert await asyncio.to_thread(call, engine.netns["c2"], near.ips[family]), "pods stay"
                    with echo_server(engine.netns["c1"], family):
                        assert await asyncio.to_thread(call, site.netns[1], node_address(1, family), 8000), "ports stay"
                assert (await engine.call("DEL", "c1")).status == 0
                assert host_veth("cni:c1/eth0") not in (await n1.kernel.observe()).links
                await outage.aclose()
                await asyncio.wait_for(agent.ready(), 10)
                assert not agent.status().degraded
                for family in DUAL:
                    with echo_server(engine.netns["c2"], family):
                        assert await asyncio.to_thread(call, far.netns, ips[family])
                    with pytest.raises(OSError, match="refused"):
                        await asyncio.to_thread(call, site.netns[1], node_address(1, family), 8000)
                await engine.run("c3", runtimeConfig=OTHER_PORTS)


async def attached(engine: Engine, container: str) -> bool:
    return (await engine.call("ADD", container)).status == 0
