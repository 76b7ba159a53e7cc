"""`podwire wait --programmed` and `status services`: slices that went, and nodes that do not know it yet."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from podwire.agent.acknowledge import Acknowledger
from podwire.agent.rounds import OnRound, Versions
from podwire.cli.programmed import NotProgrammed, read_all, wait_programmed
from podwire.cli.removals import Removals
from podwire.client.api import ApiClient, RawList
from podwire.client.errors import Gone
from podwire.model.acknowledgement import NAMESPACE, Acknowledgement, Speaker, lease_document, lease_name, read_lease
from podwire.model.ids import ObjectKey
from podwire.model.objects import EndpointSlice, Lease
from podwire.model.proxymode import ProxyMode
from podwire.model.resources import ENDPOINTSLICES, LEASES, NODES, SERVICES, Resource
from podwire.testing.memorycluster import MemoryCluster, memory_cluster

NODE_NAMES = ("n1", "n2", "n3")
NOW = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[MemoryCluster]:
    """Two slices of a Service, and nodes that are ready."""
    async with memory_cluster(tmp_path) as made:
        for name in NODE_NAMES:
            await made.client.create(NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
            ready = {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
            await made.client.patch(NODES, name, ready, subresource="status")
        meta = {"name": "web", "namespace": "default"}
        await made.client.create(
            SERVICES, {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {"ports": [{"port": 80}]}}
        )
        for number in (1, 2):
            await piece(made, number)
        yield made


async def piece(cluster: MemoryCluster, number: int, service: str = "web") -> str:
    """Its revision."""
    labels = {"kubernetes.io/service-name": service}
    document = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": f"{service}-{number}", "namespace": "default", "labels": labels},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [f"10.244.{number}.2"]}],
        "ports": [{"port": 8080}],
    }
    return str((await cluster.client.create(ENDPOINTSLICES, document))["metadata"]["resourceVersion"])


async def says(cluster: MemoryCluster, node: str, version: str, at: datetime = NOW, boot: str = "") -> None:
    ack = Acknowledgement(node=node, services=version, slices=version, mode="nftables", at=at, boot=boot)
    document = lease_document(ack)
    if await cluster.exists(LEASES, lease_name(node), NAMESPACE):
        await cluster.client.patch(LEASES, lease_name(node), document, NAMESPACE)
    else:
        await cluster.client.create(LEASES, document)


async def revision(cluster: MemoryCluster) -> str:
    return (await cluster.client.list(ENDPOINTSLICES)).resource_version


async def row(cluster: MemoryCluster) -> dict[str, Any]:
    return next(found for found in await read_all(cluster.client, "default", lambda: NOW) if found["name"] == "web")


async def waits(cluster: MemoryCluster, seconds: float) -> str:
    return await wait_programmed(cluster.client, "default", "web", seconds, lambda: NOW)


async def test_a_node_that_does_not_know_of_a_removal_is_late(cluster: MemoryCluster) -> None:
    before = await revision(cluster)
    for name in NODE_NAMES:
        await says(cluster, name, before)
    assert "n1, n2, n3" in await waits(cluster, 5)
    await cluster.client.delete(ENDPOINTSLICES, "web-2", "default")
    gone = await revision(cluster)
    await piece(cluster, 1, service="other")  # so that the present is later than the removal
    await says(cluster, "n2", gone)
    assert (await row(cluster))["late"] == ["n1", "n3"]
    with pytest.raises(NotProgrammed, match="n1, n3"):
        await waits(cluster, 0.3)
    waiting = asyncio.create_task(waits(cluster, 10))
    for name in ("n1", "n3"):
        await says(cluster, name, gone)
    await waiting
    assert (await row(cluster))["late"] == []


async def test_a_node_that_has_been_silent_for_long_is_late(cluster: MemoryCluster) -> None:
    now = await revision(cluster)
    for name, minutes in (("n1", 4.9), ("n2", 12.5), ("n3", -60)):
        await says(cluster, name, now, NOW - timedelta(minutes=minutes))
    found = await row(cluster)
    assert (found["programmed"], found["late"]) == (["n1", "n3"], ["n2"])
    assert found["silent"] == {"n2": "has not said anything for 12 min"}
    with pytest.raises(NotProgrammed, match=r"on n2 \(which has not said anything for 12 min\)"):
        await waits(cluster, 0.3)
    waiting = asyncio.create_task(waits(cluster, 10))
    await asyncio.sleep(0.1)
    await says(cluster, "n2", now, NOW - timedelta(minutes=12))
    assert "n1, n2, n3" in await waiting, "it does say something, only its clock is slow"


async def test_a_word_of_before_a_node_was_started_anew_does_not_count(cluster: MemoryCluster) -> None:
    now = await revision(cluster)
    for name in NODE_NAMES:
        await says(cluster, name, now, boot="boot-1")
    for name, boot in (("n1", "boot-1"), ("n2", "boot-2")):  # nothing is known of n3's
        await cluster.client.patch(NODES, name, {"status": {"nodeInfo": {"bootID": boot}}}, subresource="status")
    found = await row(cluster)
    assert (found["programmed"], found["late"]) == (["n1", "n3"], ["n2"])
    assert found["silent"] == {"n2": "has not said anything since it was started anew"}
    await says(cluster, "n2", now, boot="boot-2")
    assert (await row(cluster))["late"] == []


async def test_a_removal_while_one_waits(cluster: MemoryCluster) -> None:
    before = await revision(cluster)
    for name in ("n1", "n2"):
        await says(cluster, name, before)
    waiting = asyncio.create_task(waits(cluster, 10))
    await asyncio.sleep(0.1)
    await cluster.client.delete(ENDPOINTSLICES, "web-1", "default")
    gone = await revision(cluster)
    await asyncio.sleep(0.1)
    await says(cluster, "n3", gone)
    await asyncio.sleep(0.1)
    assert not waiting.done(), "n1 and n2 said it of the time before"
    for name in ("n1", "n2"):
        await says(cluster, name, gone)
    await waiting


class Forgetful(ApiClient):
    """Its server remembers nothing before `horizon`. `asked`: the revisions that were listed."""

    def __init__(self, url: str, horizon: int) -> None:
        super().__init__(url)
        self.horizon, self.asked = horizon, list[int]()

    async def list_raw(self, resource: Resource, namespace: str | None = None, *, at: str = "", **more: Any) -> RawList:
        if at:
            self.asked.append(int(at))
            if int(at) < self.horizon:
                raise Gone(410, "Expired", "too old")
        return await super().list_raw(resource, namespace, at=at, **more)


def word(node: str, slices: int, until: int) -> Acknowledgement:
    return Acknowledgement(node=node, services=str(until), slices=str(slices), slices_until=str(until))


async def unaware(cluster: MemoryCluster, client: ApiClient, *words: Acknowledgement) -> frozenset[str]:
    listed = await cluster.client.list(ENDPOINTSLICES)
    present = [msgspec.convert(item, EndpointSlice) for item in listed.items]
    removals = Removals(client, present, listed.resource_version, namespace="default", labels="")
    await removals.learn(words)
    return removals.unaware(ObjectKey("default", "web"), words)


async def test_one_question_for_all_nodes_that_know_the_same(cluster: MemoryCluster) -> None:
    start = int(await revision(cluster))
    made = int(await piece(cluster, 3))
    await cluster.client.delete(ENDPOINTSLICES, "web-3", "default")
    gone = int(await revision(cluster))
    for number in range(30):
        await piece(cluster, number, service="other")
    last = int(await revision(cluster))
    words = (
        word("before", start, start),  # never had it
        *(word(f"n{number}", made, made) for number in range(20)),
        *(word(f"after{number}", gone, gone + number) for number in range(20)),
        word("now", last, last),
    )
    async with Forgetful(cluster.url, 0) as client:
        assert await unaware(cluster, client, *words) == {f"n{number}" for number in range(20)}
        assert client.asked == [start, made, gone + 19]
    async with Forgetful(cluster.url, gone + 19) as client:
        stale = {"before", *(f"n{number}" for number in range(20))}
        assert await unaware(cluster, client, *words) == stale, "what is not remembered counts as changed"
        current = word("before", start, last)
        assert "before" not in await unaware(cluster, client, current), "but who knows the present knows enough"


class Quiet:
    """Services that do not change; bookmarks tell of revisions."""

    mode: ProxyMode | None = ProxyMode.NFTABLES

    def __init__(self) -> None:
        self.versions = Versions("5", "6", "6")

    def subscribe(self, observer: OnRound) -> None:
        pass

    async def read_back(self) -> Versions:
        return self.versions


async def test_a_node_without_changes_acknowledges_what_bookmarks_tell(cluster: MemoryCluster) -> None:
    sync = Quiet()
    times = count()
    clock = lambda: NOW + timedelta(seconds=next(times))  # noqa: E731
    acknowledger = Acknowledger(cluster.client, Speaker("n1"), sync, clock, Random(1), idle_seconds=0.05)
    running = asyncio.create_task(acknowledger.run())
    try:
        for versions in (Versions("5", "6", "6"), Versions("5", "6", "9")):
            sync.versions = versions
            await cluster.until(lambda: acknowledger.last == sync.versions)

        async def said() -> Acknowledgement:
            found = read_lease(msgspec.convert(await cluster.client.get(LEASES, lease_name("n1"), NAMESPACE), Lease))
            assert found is not None
            return found

        ack = await said()
        assert (ack.slices, ack.until) == ("6", 9)
        async with asyncio.timeout(5):
            while (again := await said()) == ack:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert msgspec.structs.replace(again, at=ack.at) == ack, "nothing new, but it is still so"
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
