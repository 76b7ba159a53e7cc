"""The node changes while its Services are programmed: its zone, whether 127.0.0.1 is served, which back end serves."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from service_cases import FACTS, pod_of

from podwire.agent.health import Health
from podwire.agent.localnet import LOCALNET, OFF, OURS
from podwire.agent.proxymodes.nft import NftRules
from podwire.agent.services import ServiceSync
from podwire.client.informer import Change, Informer
from podwire.model.addr import Family
from podwire.model.errors import Unsupported
from podwire.model.flow import DST_NAT, Flow, FlowTuple
from podwire.model.ids import HOST, ObjectKey
from podwire.model.nft import TableRef
from podwire.model.objects import EndpointSlice, Pod, Service
from podwire.model.proxymode import ProxyMode
from podwire.model.resources import ENDPOINTSLICES, NODES, SERVICES
from podwire.model.servicetable import NodeFacts
from podwire.plan.services import TABLE
from podwire.testing import FakeKernel
from podwire.testing.memorycluster import MemoryCluster, memory_cluster


@asynccontextmanager
async def proxy(cluster: MemoryCluster, kernel: FakeKernel, health: Health, **facts: Any) -> AsyncIterator[ServiceSync]:
    services = Informer(cluster.client, SERVICES, Service, rng=Random(1))
    slices = Informer(cluster.client, ENDPOINTSLICES, EndpointSlice, rng=Random(1))
    sync = ServiceSync(kernel, services, slices, health, Random(1))
    running = [asyncio.create_task(informer.run()) for informer in (services, slices)]
    try:
        await services.synced()
        await slices.synced()
        running.append(asyncio.create_task(sync.run(replace(FACTS, **facts))))
        await sync.programmed()
        yield sync
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[MemoryCluster]:
    async with memory_cluster(tmp_path) as made:
        spec: dict[str, Any] = {"type": "NodePort", "clusterIP": "10.96.0.10", "ports": [{"port": 80, "nodePort": 30080}]}
        meta = {"name": "web", "namespace": "default"}
        await made.client.create(SERVICES, {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": spec})
        piece = {
            "apiVersion": "discovery.k8s.io/v1",
            "kind": "EndpointSlice",
            "metadata": {"name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4",
            "endpoints": [
                {"addresses": [f"10.244.{n}.2"], "nodeName": f"n{n}", "hints": {"forZones": [{"name": f"z{n}"}]}}
                for n in (1, 2)
            ],
            "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        }
        await made.client.create(ENDPOINTSLICES, piece)
        yield made


async def backends(kernel: FakeKernel) -> set[str]:
    """Where the ClusterIP leads."""
    state = (await kernel.observe_nft(TABLE)).tables[TableRef(Family.IPV4, TABLE)].sets["endpoints"]
    texts = [state.set.element_text(element) for element in state.elements.items()]
    return {text.split(" : ")[1].split(" . ")[0] for text in texts if text.startswith("10.96.0.10 ")}


async def test_a_node_that_moves_to_another_zone_is_served_there(cluster: MemoryCluster) -> None:
    kernel, health = FakeKernel(), Health()
    async with proxy(cluster, kernel, health) as sync:
        assert await backends(kernel) == {"10.244.1.2"}
        sync.set_facts(replace(FACTS, zone="z2"))
        await cluster.until(lambda: sync.idle)
        assert await backends(kernel) == {"10.244.2.2"}
        commits = health.commits
        sync.set_facts(replace(FACTS, zone="z2"))
        await cluster.until(lambda: sync.idle)
        assert (health.commits, health.repairs) == (commits, 0), "the same facts are no news, and a change is no repair"


@pytest.mark.parametrize("loopback", [False, True])
async def test_127_0_0_1_is_translated_only_where_it_is_served(cluster: MemoryCluster, loopback: bool) -> None:
    kernel = FakeKernel()
    async with proxy(cluster, kernel, Health(), loopback=loopback) as sync:
        await cluster.until(lambda: sync.idle)
        assert (await kernel.observe()).sysctls.get(LOCALNET, "0") == (OURS if loopback else OFF)
        guards = [rule for rule in await rules(kernel) if "for this machine alone" in rule]
        assert bool(guards) is loopback


async def test_127_0_0_1_is_switched_off_before_its_guard_goes(cluster: MemoryCluster) -> None:
    kernel, health = FakeKernel(), Health()
    async with proxy(cluster, kernel, health, loopback=True) as sync:
        await cluster.until(lambda: sync.idle)
        order = len(kernel.applied)
        kernel.fail_next("SetSysctl", times=2)
        sync.set_facts(replace(FACTS, loopback=False))
        await cluster.until(lambda: "services" in health.degraded)
        assert [rule for rule in await rules(kernel) if "for this machine alone" in rule], "while it is on, the guard stays"
        await cluster.until(lambda: sync.idle and "services" not in health.degraded)
        done = kernel.applied[order:]
        assert [type(op).__name__ for op in done] == ["SetSysctl", "CommitNft"]
        assert (await kernel.observe()).sysctls[LOCALNET] == OFF


async def rules(kernel: FakeKernel) -> list[str]:
    table = (await kernel.observe_nft(TABLE, HOST)).tables[TableRef(Family.IPV4, TABLE)]
    return [rule.comment for rule in table.chains["prerouting"].rules]


async def test_an_agent_hears_that_its_node_moved(cluster: MemoryCluster) -> None:
    machine = cluster.machine(1)
    async with cluster.agent(machine):
        for zone, endpoint in (("z2", "10.244.2.2"), ("z1", "10.244.1.2")):
            await cluster.client.patch(NODES, "n1", {"metadata": {"labels": {"topology.kubernetes.io/zone": zone}}})

            async def followed(wanted: str = endpoint) -> bool:
                return await backends(machine.kernel) == {wanted}

            await cluster.until(followed)


async def test_what_is_heard_of_is_programmed_at_once(cluster: MemoryCluster) -> None:
    """With nobody who asks for anything."""
    kernel, health = FakeKernel(), Health()
    async with proxy(cluster, kernel, health, zone="") as sync:
        await cluster.until(lambda: sync.idle)
        assert await backends(kernel) == {"10.244.1.2", "10.244.2.2"}
        one = {"endpoints": [{"addresses": ["10.244.3.2"]}]}
        await cluster.client.patch(ENDPOINTSLICES, "web-1", one, "default")

        async def followed() -> bool:
            return await backends(kernel) == {"10.244.3.2"}

        await cluster.until(followed)
        await cluster.client.delete(SERVICES, "web", "default")

        async def gone() -> bool:
            return not await backends(kernel)

        await cluster.until(gone)


class Refused(NftRules):
    """A back end that this kernel lacks. `removed`: how often it was told to take away what there may be of it."""

    mode = ProxyMode.IPVS
    removed = 0

    async def compare(self) -> int:
        raise Unsupported("this machine lacks IPVS")

    async def remove(self) -> None:
        self.removed += 1


class Elsewhere(Refused):
    """One that serves without this kernel. `pods`: those whose host ports it was given."""

    def __init__(self, kernel: FakeKernel, facts: NodeFacts) -> None:
        super().__init__(kernel, facts)
        self.pods: list[str] = []

    def set_host_ports(self, uid: str, pod: Pod | None) -> None:
        self.pods.append(uid)
        super().set_host_ports(uid, pod)

    async def compare(self) -> int:
        return 0

    program = compare


class Whole(Elsewhere):
    """One that is compared as a whole, or not at all. `compared`: how often."""

    compared = 0

    async def holds(self, keys: Sequence[ObjectKey]) -> bool | None:
        return None

    async def compare(self) -> int:
        self.compared += 1
        return 0


def _knows_more(sync: ServiceSync, since: str) -> bool:
    return sync.idle and sync.versions.services != since


async def test_what_did_not_change_is_not_read_back_again(cluster: MemoryCluster) -> None:
    kernel = FakeKernel()
    async with proxy(cluster, kernel, Health()) as sync:
        await sync.read_back()
        made: list[Whole] = []

        def make(facts: NodeFacts) -> Whole:
            made.append(Whole(kernel, facts))
            return made[-1]

        await sync.switch(make)
        before = made[0].compared
        for changes in (0, 0, 1, 1):
            if changes:
                seen = sync.versions.services
                await cluster.client.patch(SERVICES, "web", {"metadata": {"labels": {"n": str(made[0].compared)}}}, "default")
                await cluster.until(partial(_knows_more, sync, seen))
            await sync.read_back()
            assert made[0].compared == before + changes
            before = made[0].compared


async def test_a_back_end_that_is_refused_leaves_the_one_in_use(cluster: MemoryCluster) -> None:
    kernel, health = FakeKernel(), Health()
    async with proxy(cluster, kernel, health) as sync:
        made: list[Refused] = []

        def make(facts: NodeFacts) -> Refused:
            made.append(Refused(kernel, facts))
            return made[-1]

        with pytest.raises(Unsupported, match="lacks IPVS"):
            await sync.switch(make)
        assert (sync.mode, [rules.removed for rules in made]) == (ProxyMode.NFTABLES, [1])
        sync.set_facts(replace(FACTS, zone="z2"))
        await cluster.until(lambda: sync.idle)
        assert await backends(kernel) == {"10.244.2.2"}, "it goes on"
        assert sync.others_removed


async def test_another_back_end_takes_over_and_the_former_goes_as_soon_as_it_can(
    cluster: MemoryCluster, caplog: pytest.LogCaptureFixture
) -> None:
    kernel, health = FakeKernel(), Health()
    async with proxy(cluster, kernel, health) as sync:
        edge = pod_of({"name": "edge", "ip": "10.244.1.9", "ports": [{"containerPort": 8080, "hostPort": 80}]})
        sync.set_host_ports("edge", edge)
        async with asyncio.timeout(5):
            await sync.host_ports_programmed()
        elsewhere = Elsewhere(kernel, FACTS)
        kernel.fail_next("CommitNft", times=2)
        await sync.switch(lambda facts: elsewhere)
        assert sync.mode is ProxyMode.IPVS
        assert elsewhere.table(ObjectKey("default", "web")).frontends, "it was given what there is"
        assert elsewhere.pods == ["edge"]
        assert not sync.others_removed
        await cluster.until(lambda: sync.others_removed)
        assert not (await kernel.observe_nft(TABLE)).tables
        assert "rules of another proxy mode stay for now" in caplog.text
        assert "other modes" not in health.degraded
        await sync.switch(lambda facts: NftRules(kernel, facts))
        assert (sync.mode, await backends(kernel)) == (ProxyMode.NFTABLES, {"10.244.1.2"})
        await cluster.until(lambda: sync.others_removed)
        assert elsewhere.removed == 1


async def test_the_back_end_that_is_in_use_is_not_made_anew(cluster: MemoryCluster) -> None:
    kernel, health = FakeKernel(), Health()
    async with proxy(cluster, kernel, health) as sync:
        commits = health.commits
        await sync.switch(lambda facts: NftRules(kernel, facts))
        await cluster.until(lambda: sync.idle)
        assert (sync.mode, health.commits, sync.others_removed) == (ProxyMode.NFTABLES, commits, True)
        assert await backends(kernel) == {"10.244.1.2"}


async def test_at_the_start_connections_to_another_proxys_services_stay(cluster: MemoryCluster) -> None:
    theirs = {"name": "theirs", "namespace": "default", "labels": {"service.kubernetes.io/service-proxy-name": "other"}}
    spec = {"clusterIP": "10.96.0.11", "ports": [{"port": 53, "protocol": "UDP"}]}
    await cluster.client.create(SERVICES, {"apiVersion": "v1", "kind": "Service", "metadata": theirs, "spec": spec})
    kernel = FakeKernel()
    client, endpoint, *cluster_ips = map(ipaddress.ip_address, ("10.244.1.9", "10.244.1.2", "10.96.0.11", "10.96.0.12"))
    used, unused = (
        Flow(FlowTuple(client, ip, 17, 4000, 53), FlowTuple(endpoint, client, 17, 53, 4000), status=DST_NAT)
        for ip in cluster_ips
    )
    kernel.host.flows += [used, unused]
    async with proxy(cluster, kernel, Health()) as sync:
        await cluster.until(lambda: sync.idle)
        assert kernel.host.flows == [used]


async def test_what_is_planned_anew_is_said_with_its_reason(cluster: MemoryCluster, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    async with proxy(cluster, FakeKernel(), Health()) as sync:
        sync.set_facts(replace(FACTS, service_cidrs=()))
        await cluster.until(lambda: sync.idle)
    assert "planned anew, since for node n1 this changed: service cidrs" in caplog.text


class Dictated(Informer[Service]):
    """Tells whoever subscribed last what a test wants: API servers of today refuse what cannot be read."""

    tell: Callable[[Change[Service]], None]

    def subscribe(self, callback: Callable[[Change[Service]], None]) -> Callable[[], None]:
        self.tell = callback
        return lambda: None


async def test_what_of_a_service_cannot_be_read_is_said_once(cluster: MemoryCluster, caplog: pytest.LogCaptureFixture) -> None:
    services = Dictated(cluster.client, SERVICES, Service)
    ServiceSync(FakeKernel(), services, Informer(cluster.client, ENDPOINTSLICES, EndpointSlice), Health(), Random(1))
    odd = msgspec.convert({"metadata": {"name": "odd", "namespace": "d"}, "spec": {"externalIPs": ["10.0.0"]}}, Service)
    key = ObjectKey("d", "odd")
    for change in (Change(key, None, odd), Change(key, odd, odd), Change(key, odd, None)):
        services.tell(change)
    assert [record.getMessage() for record in caplog.records] == [
        "Service d/odd: left out, since it is no address or range: externalIPs: '10.0.0'"
    ]
