"""Changing the back end while connections are open, with real packets; and what is left afterwards."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
import pytest_asyncio
from servicerig import FACTS, ServiceRig, service_rig, stranger_iptables

from podwire.agent.health import Health
from podwire.agent.proxymodes.modes import ModeOptions, ProxyModes
from podwire.agent.services import ServiceSync
from podwire.client.informer import Informer
from podwire.kernel.conntrack import read_flows
from podwire.kernel.iptables import Flavour, IptablesClient, find_programs
from podwire.model.addr import Family
from podwire.model.objects import EndpointSlice, Service
from podwire.model.proxymode import ProxyMode
from podwire.model.resources import ENDPOINTSLICES, SERVICES
from podwire.plan.services import TABLE
from podwire.testing.memorycluster import MemoryCluster, memory_cluster

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.needs("nftables", "bridge devices", "netfilter on bridges (br_netfilter)", "IPv6"),
    pytest.mark.skipif(find_programs(Flavour.LEGACY) is None, reason="the package iptables is not installed"),
]

CLUSTER_IP, NODE = "10.96.0.10", "198.18.0.11"


@dataclass
class Site:
    """A node with its Services in the API, a proxy at work, and packets."""

    rig: ServiceRig
    cluster: MemoryCluster
    modes: ProxyModes
    health: Health = field(default_factory=Health)

    @asynccontextmanager
    async def proxy(self, mode: ProxyMode) -> AsyncIterator[ServiceSync]:
        """Until the block is left, which is as abrupt as killing it."""
        self.health = Health()
        services = Informer(self.cluster.client, SERVICES, Service, rng=Random(1))
        slices = Informer(self.cluster.client, ENDPOINTSLICES, EndpointSlice, rng=Random(1))
        sync = ServiceSync(self.rig.kernel, services, slices, self.health, Random(1), self.modes.make(mode), self.modes)
        running = [asyncio.create_task(informer.run()) for informer in (services, slices)]
        try:
            async with asyncio.timeout(10):
                await services.synced()
                await slices.synced()
                running.append(asyncio.create_task(sync.run(FACTS)))
                await sync.programmed()
            yield sync
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def endpoints(self, *names: str, service: str = "web", protocol: str = "TCP") -> None:
        """The Service's endpoints, all on this node."""
        name = f"{service}-1"
        body = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": name, "namespace": "default", "labels": {"kubernetes.io/service-name": service}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [f"10.244.1.{n[1:]}"], "nodeName": "n1"} for n in names],
            "ports": [{"name": "", "port": 8080, "protocol": protocol}],
        }
        if await self.cluster.exists(ENDPOINTSLICES, name, "default"):
            await self.cluster.client.patch(ENDPOINTSLICES, name, {"endpoints": body["endpoints"]}, "default")
        else:
            await self.cluster.client.create(ENDPOINTSLICES, body)

    def left(self) -> set[str]:
        """Which iptables flavours hold anything of ours."""
        found = set()
        for flavour in Flavour:
            programs = find_programs(flavour)
            if programs is not None:
                client = IptablesClient(self.rig.fds["node"], programs)
                if any("PODWIRE" in client.save(family) for family in client.families):
                    found.add(str(flavour))
        return found

    async def has_tables(self) -> bool:
        return bool((await self.rig.kernel.observe_nft(TABLE)).tables)


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with service_rig() as rig, memory_cluster(tmp_path) as cluster:
        spec: dict[str, Any] = {"type": "NodePort", "clusterIP": CLUSTER_IP, "ports": [{"port": 80, "nodePort": 30080}]}
        await cluster.client.create(
            SERVICES, {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"}, "spec": spec}
        )
        made = Site(rig, cluster, ProxyModes(rig.kernel, rig.fds["node"], ModeOptions(flavour=Flavour.LEGACY)))
        await made.endpoints("p2", "p3")
        yield made


class Talk:
    """A connection that stays open."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def ask(self) -> str:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._sock, b"who?\n")
        async with asyncio.timeout(5):
            return (await loop.sock_recv(self._sock, 200)).decode()


@contextmanager
def opened(rig: ServiceRig, where: str) -> Iterator[socket.socket]:
    with rig.open(where, socket.SOCK_STREAM, "0.0.0.0") as sock:
        yield sock


async def removed(sync: ServiceSync) -> None:
    """The rules of an old mode go after the new ones are in use."""
    async with asyncio.timeout(10):
        while not sync.others_removed:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)


async def test_switching_drops_no_connection_and_leaves_nothing(site: Site) -> None:
    loop = asyncio.get_running_loop()
    rig = site.rig
    async with site.proxy(ProxyMode.NFTABLES) as sync:
        with opened(rig, "p4") as inside, opened(rig, "world") as outside:
            await loop.sock_connect(inside, (CLUSTER_IP, 80))
            await loop.sock_connect(outside, (NODE, 30080))
            talks = [Talk(inside), Talk(outside)]
            first = [await talk.ask() for talk in talks]
            stop, failed = asyncio.Event(), []

            async def knock() -> int:
                """New connections, all the time."""
                count = 0
                while not stop.is_set():
                    for where, address, port in (("p4", CLUSTER_IP, 80), ("world", NODE, 30080)):
                        try:
                            await rig.ask(where, address, port)
                        except (TimeoutError, ConnectionRefusedError) as error:
                            failed.append((where, error))
                        count += 1
                return count

            knocking = asyncio.create_task(knock())
            for mode in (ProxyMode.IPTABLES, ProxyMode.NFTABLES, ProxyMode.IPTABLES):
                await sync.switch(site.modes.make(mode))
                assert [await talk.ask() for talk in talks] == first
            stop.set()
            assert await knocking > 20
            assert not failed
            await removed(sync)
            assert not await site.has_tables()
            assert site.left() == {"legacy"}

            await site.endpoints("p4")
            async with asyncio.timeout(5):
                while await rig.who("p2", CLUSTER_IP, 80) != {"p4"}:
                    pass
            assert [await talk.ask() for talk in talks] == first, "an endpoint that leaves keeps the connections it has"
    assert await site.modes.clean_up() == ("iptables (legacy)",)
    assert site.left() == set()
    assert await site.modes.clean_up() == ()


async def test_what_an_earlier_life_left_in_another_mode_goes(site: Site) -> None:
    async with site.proxy(ProxyMode.IPTABLES) as sync:
        await removed(sync)
        assert not await site.has_tables()
    other = ProxyModes(site.rig.kernel, site.rig.fds["node"], ModeOptions(flavour=Flavour.NFT))
    site.modes = other
    async with site.proxy(ProxyMode.IPTABLES) as sync:
        await removed(sync)
        assert site.left() == {"nft"}
        assert await site.rig.who("p4", CLUSTER_IP, 80) <= {"p2", "p3"}
    async with site.proxy(ProxyMode.NFTABLES) as sync:
        await removed(sync)
        assert site.left() == set()
        assert await site.has_tables()
        assert site.health.repairs == 0


NFT_IPTABLES = ModeOptions(flavour=Flavour.NFT)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((ProxyMode.NFTABLES, ModeOptions()), (ProxyMode.IPTABLES, ModeOptions(flavour=Flavour.LEGACY))),
        ((ProxyMode.IPTABLES, ModeOptions(flavour=Flavour.LEGACY)), (ProxyMode.NFTABLES, ModeOptions())),
        ((ProxyMode.IPTABLES, NFT_IPTABLES), (ProxyMode.IPTABLES, ModeOptions(flavour=Flavour.LEGACY))),
    ],
    ids=lambda life: f"{life[0]} {life[1].flavour or ''}".strip(),
)
async def test_udp_clients_of_a_node_port_that_went_meanwhile_are_forgotten_in_another_mode_too(
    site: Site, before: tuple[ProxyMode, ModeOptions], after: tuple[ProxyMode, ModeOptions]
) -> None:
    """What the mode of then has in the kernel tells which node ports there were; the Service is gone from the API."""
    rig, fd = site.rig, site.rig.fds["node"]
    spec: dict[str, Any] = {"type": "NodePort", "ports": [{"port": 53, "nodePort": 30053, "protocol": "UDP"}]}
    await site.cluster.client.create(
        SERVICES, {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "dns", "namespace": "default"}, "spec": spec}
    )
    await site.endpoints("p2", service="dns", protocol="UDP")
    await rig.serve("node", Family.IPV4, 30054, NODE)

    async def ports() -> set[int]:
        return {flow.original.dport for flow in await read_flows(fd, lambda flow: flow.original.protocol == 17)}

    mode, site.modes = before[0], ProxyModes(rig.kernel, fd, before[1])
    async with site.proxy(mode) as sync:
        await removed(sync)
        assert await rig.who("world", NODE, 30053, udp=True) == {"p2"}
        assert await rig.who("world", NODE, 30054, udp=True) == {"node"}
        assert await ports() == {30053, 30054}
    await site.cluster.client.delete(SERVICES, "dns", "default")
    mode, site.modes = after[0], ProxyModes(rig.kernel, fd, after[1])
    async with site.proxy(mode) as sync:
        assert await ports() == {30054}, "what no Service served is nobody's business"
        await removed(sync)


@pytest.mark.parametrize("harm", ["-t nat -F", "-t nat -F PODWIRE-INSIDE", "-F FORWARD"])
async def test_what_a_stranger_flushes_in_legacy_tables_is_put_back(site: Site, harm: str) -> None:
    async with site.proxy(ProxyMode.IPTABLES):
        stranger_iptables(site.rig.fds["node"], *harm.split())
        client = IptablesClient(site.rig.fds["node"], find_programs(Flavour.LEGACY))  # type: ignore[arg-type]  # see pytestmark
        broken = client.save(Family.IPV4)
        async with asyncio.timeout(3):
            while site.health.repairs == 0:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.02)
        assert client.save(Family.IPV4).count("PODWIRE") > broken.count("PODWIRE")
        assert await site.rig.who("world", NODE, 30080) <= {"p2", "p3"}


async def test_a_rule_that_is_replaced_by_one_of_its_size_is_found_too(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the number nor the size of the rules tells, so legacy tables are compared from time to time."""
    monkeypatch.setattr("podwire.agent.proxymodes.iptables.AUDIT_SECONDS", 0.3)
    async with site.proxy(ProxyMode.IPTABLES):
        client = IptablesClient(site.rig.fds["node"], find_programs(Flavour.LEGACY))  # type: ignore[arg-type]  # see pytestmark
        right, size = client.save(Family.IPV4), client.fingerprint()
        line = next(line for line in right.splitlines() if line.startswith("-A PODWIRE-SVC") and "10.244.1.2:8080" in line)
        wrong = line.replace("10.244.1.2:8080", "10.244.9.9:8080")
        chain = [text for text in right.splitlines() if text.startswith(f"-A {line.split()[1]} ")]
        number = str(chain.index(line) + 1)
        stranger_iptables(site.rig.fds["node"], "-t", "nat", "-R", line.split()[1], number, *wrong.split()[2:])
        assert client.fingerprint() == size
        async with asyncio.timeout(5):
            while site.health.repairs == 0:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.05)
        assert "10.244.9.9" not in client.save(Family.IPV4)


async def test_a_chain_that_is_renamed_leads_on_and_gets_its_name_back(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules lead to places in the table, not to names; number and size of the rules are the same."""
    monkeypatch.setattr("podwire.agent.proxymodes.iptables.AUDIT_SECONDS", 1.0)
    async with site.proxy(ProxyMode.IPTABLES):
        client = IptablesClient(site.rig.fds["node"], find_programs(Flavour.LEGACY))  # type: ignore[arg-type]  # see pytestmark
        size = client.fingerprint()
        stranger_iptables(site.rig.fds["node"], "-t", "nat", "-E", "PODWIRE-INSIDE", "PODWIRE-ELSE")
        assert client.fingerprint() == size
        assert await site.rig.who("world", NODE, 30080) <= {"p2", "p3"}
        async with asyncio.timeout(5):
            while site.health.repairs == 0:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.05)
        assert "PODWIRE-ELSE" not in client.save(Family.IPV4)
        assert await site.rig.who("world", NODE, 30080) <= {"p2", "p3"}
