"""ServiceCIDRs that go, and IPAddresses that somebody touched, through the real API server and the real controllers."""

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from random import Random
from typing import Any

import msgspec
import pytest
from live_cluster import CONFIG, LiveCluster, live_cluster

from podwire.client.errors import AlreadyExists, ApiError
from podwire.controllers.base import Context
from podwire.controllers.serviceaddresses import ServiceAddresses, Subject, uncovered
from podwire.model.ids import ObjectKey
from podwire.model.meta import Json
from podwire.model.resources import EVENTS, IPADDRESSES, SERVICECIDRS, SERVICES
from podwire.model.servicecidr import FINALIZER, MANAGED_LABEL, IPAddressObject, ServiceCIDR, address_document, covered


async def add_range(cluster: LiveCluster, name: str, *cidrs: str) -> Json:
    body = {"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": name}, "spec": {"cidrs": cidrs}}
    return await cluster.client.create(SERVICECIDRS, body)


async def add_service(cluster: LiveCluster, name: str, address: str = "") -> Json:
    spec = {"ports": [{"port": 80}], **({"clusterIP": address} if address else {})}
    return await cluster.client.create(SERVICES, {"metadata": {"name": name, "namespace": "default"}, "spec": spec})


def named(items: list[Json], name: str) -> Json | None:
    return next((item for item in items if item["metadata"]["name"] == name), None)


async def condition(cluster: LiveCluster, name: str, reason: str) -> Json:
    def found(items: list[Json]) -> bool:
        cidr = named(items, name)
        return cidr is not None and cidr["status"]["conditions"][0]["reason"] == reason

    cidr = named(await cluster.until(SERVICECIDRS, found), name)
    assert cidr is not None
    return cidr


async def event(cluster: LiveCluster, reason: str) -> str:
    events = await cluster.until(EVENTS, lambda items: any(e["reason"] == reason for e in items))
    return next(str(e["message"]) for e in events if e["reason"] == reason)


async def before_it_is_back(cluster: LiveCluster, address: str, act: Callable[[], Awaitable[Json]]) -> None:
    """Delete an IPAddress and do something for which it has to be away: the controller may be quicker, now and then."""
    for _ in range(10):
        await cluster.client.delete(IPADDRESSES, address)
        with suppress(ApiError):
            await act()
            return
    raise AssertionError(f"{address} is never away")


async def test_a_range_goes_when_no_address_would_be_left_without_one() -> None:
    async with live_cluster() as cluster:
        await add_range(cluster, "more", "10.112.0.0/28")
        await add_service(cluster, "a", "10.112.0.3")
        await cluster.client.delete(SERVICECIDRS, "more")
        going = await condition(cluster, "more", "Terminating")
        assert going["status"]["conditions"][0]["status"] == "False"
        assert going["status"]["conditions"][0]["message"].startswith("There are still IPAddresses referencing the ServiceCIDR")
        await cluster.client.delete(SERVICES, "a", "default")
        await cluster.until(SERVICECIDRS, lambda items: named(items, "more") is None)


async def test_a_range_stays_for_an_address_of_which_the_controller_has_not_heard_yet() -> None:
    async with live_cluster(replace(CONFIG, disabled=frozenset({ServiceAddresses.name}))) as cluster:
        context = Context(cluster.client, CONFIG, lambda: datetime.now(UTC), Random(1))
        known = context.cluster
        watching = [asyncio.create_task(i.run()) for i in (known.ip_addresses, known.service_cidrs, known.services)]
        for informer in (known.ip_addresses, known.service_cidrs, known.services):
            await informer.synced()
        watching[0].cancel()
        await add_range(cluster, "more", "10.112.0.0/28")
        await add_service(cluster, "a", "10.112.0.3")
        await known.service_cidrs.caught_up(await cluster.client.delete(SERVICECIDRS, "more"))
        controller, subject = ServiceAddresses(context), Subject(SERVICECIDRS, ObjectKey("", "more"))
        await controller.sync(subject)
        assert (await cluster.client.get(SERVICECIDRS, "more"))["metadata"]["finalizers"] == [FINALIZER]
        await cluster.client.delete(SERVICES, "a", "default")
        await controller.sync(subject)
        assert named(await cluster.items(SERVICECIDRS), "more") is None
        controller.queue.close()
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)


async def test_a_range_goes_when_another_covers_its_addresses() -> None:
    async with live_cluster() as cluster:
        await add_range(cluster, "more", "10.112.0.0/28", "fd00:9::/112")
        await add_service(cluster, "a", "10.112.0.3")
        await cluster.client.delete(SERVICECIDRS, "more")
        await condition(cluster, "more", "Terminating")
        await add_range(cluster, "wider", "10.112.0.0/24")
        await cluster.until(SERVICECIDRS, lambda items: named(items, "more") is None)
        await cluster.client.delete(SERVICECIDRS, "wider")
        await condition(cluster, "wider", "Terminating")
        await add_range(cluster, "empty", "10.113.0.0/24")
        await cluster.client.delete(SERVICECIDRS, "empty")
        await cluster.until(SERVICECIDRS, lambda items: {i["metadata"]["name"] for i in items} == {"kubernetes", "wider"})
        assert (await cluster.client.get(SERVICES, "a", "default"))["spec"]["clusterIP"] == "10.112.0.3"


async def test_what_a_range_needs_is_put_back() -> None:
    async with live_cluster() as cluster:
        bare = {"metadata": {"finalizers": None}}
        await cluster.client.patch(SERVICECIDRS, "kubernetes", bare)
        unready = {"status": {"conditions": [{"type": "Ready", "status": "False", "reason": "Mine"}]}}
        await cluster.client.patch(SERVICECIDRS, "kubernetes", unready, subresource="status")

        def right(items: list[Json]) -> bool:
            ready = bool(items[0]["status"]["conditions"][0]["status"] == "True")
            return ready and items[0]["metadata"].get("finalizers") == [FINALIZER]

        await cluster.until(SERVICECIDRS, right)


async def test_a_services_address_that_was_deleted_comes_back() -> None:
    async with live_cluster() as cluster:
        address = (await add_service(cluster, "a"))["spec"]["clusterIP"]
        first = await cluster.client.get(IPADDRESSES, address)
        await cluster.client.delete(IPADDRESSES, address)
        assert await event(cluster, "ClusterIPNotAllocated") == f"Cluster IP [IPv4]: {address} is not allocated; repairing"
        back = named(await cluster.until(IPADDRESSES, lambda items: named(items, address) is not None), address)
        assert back is not None
        assert (back["spec"], back["metadata"]["labels"]) == (first["spec"], first["metadata"]["labels"])
        await cluster.client.patch(IPADDRESSES, address, {"metadata": {"labels": {MANAGED_LABEL: "me"}}})

        def labelled(items: list[Json]) -> bool:
            found = named(items, address)
            return found is not None and found["metadata"]["labels"] == first["metadata"]["labels"]

        await cluster.until(IPADDRESSES, labelled)


async def test_an_address_that_says_it_is_anothers_is_put_right() -> None:
    async with live_cluster() as cluster:
        address = (await add_service(cluster, "a"))["spec"]["clusterIP"]
        other = address_document(address, "default", "other")
        await before_it_is_back(cluster, address, lambda: cluster.client.create(IPADDRESSES, other))

        def right(items: list[Json]) -> bool:
            found = named(items, address)
            return found is not None and found["spec"]["parentRef"]["name"] == "a"

        await cluster.until(IPADDRESSES, right)


async def test_an_address_that_two_services_have_is_said() -> None:
    async with live_cluster() as cluster:
        await add_service(cluster, "a", "10.96.7.7")
        await before_it_is_back(cluster, "10.96.7.7", lambda: add_service(cluster, "b", "10.96.7.7"))
        text = "Cluster IP [IPv4]: 10.96.7.7 was assigned to multiple services; please recreate service"
        assert await event(cluster, "ClusterIPAlreadyAllocated") == text
        assert (await cluster.client.get(IPADDRESSES, "10.96.7.7"))["spec"]["parentRef"]["name"] == "b"


async def test_addresses_of_no_service_go_and_other_peoples_stay() -> None:
    async with live_cluster() as cluster:
        await add_service(cluster, "a")
        mine = {"metadata": {"name": "10.96.9.1"}, "spec": {"parentRef": {"resource": "services", "name": "x"}}}
        await cluster.client.create(IPADDRESSES, mine)
        await cluster.client.create(IPADDRESSES, address_document("10.96.9.2", "default", "gone"))
        await cluster.client.create(IPADDRESSES, address_document("10.96.9.3", "default", "a"))
        routers = address_document("10.96.9.4", "default", "a")
        routers["spec"]["parentRef"]["resource"] = "routers"
        await cluster.client.create(IPADDRESSES, routers)
        leaked = {f"10.96.9.{n}" for n in (2, 3, 4)}
        left = await cluster.until(IPADDRESSES, lambda items: not leaked & {i["metadata"]["name"] for i in items})
        assert named(left, "10.96.9.1") is not None
        messages = {e["message"] for e in await cluster.until(EVENTS, lambda items: len(items) >= 3)}
        assert messages >= {
            "IPAddress: 10.96.9.2 for Service default/gone appears to have leaked: cleaning up",
            "IPAddress: 10.96.9.3 for Service default/a has a wrong reference; cleaning up",
            "IPAddress: 10.96.9.4 appears to have been modified, not referencing a Service default/a: cleaning up",
        }


async def test_a_service_outside_of_all_ranges_is_said() -> None:
    async with live_cluster() as cluster:
        await add_range(cluster, "more", "10.112.0.0/28")
        await add_service(cluster, "a", "10.112.0.3")
        await cluster.client.delete(SERVICECIDRS, "more")
        await condition(cluster, "more", "Terminating")
        await cluster.client.patch(SERVICECIDRS, "more", {"metadata": {"finalizers": None}})
        text = "Cluster IP [IPv4]: 10.112.0.3 is not within any configured Service CIDR; please recreate service"
        assert await event(cluster, "ClusterIPOutOfRange") == text


async def test_a_burst_of_services_is_nothing_to_repair() -> None:
    async with live_cluster() as cluster:
        for turn in range(3):
            for n in range(30):
                await add_service(cluster, f"s{turn}-{n}")
            for n in range(30):
                await cluster.client.delete(SERVICES, f"s{turn}-{n}", "default")
        await cluster.client.delete(IPADDRESSES, "10.96.0.1")
        await event(cluster, "ClusterIPNotAllocated")
        events = [e for e in await cluster.items(EVENTS) if "Address" in e["reason"] or "ClusterIP" in e["reason"]]
        assert len(events) == 1
        with pytest.raises(AlreadyExists):
            await cluster.client.create(IPADDRESSES, address_document("10.96.0.1", "default", "kubernetes"))


def cidr(name: str, *cidrs: str, ready: bool = True, going: bool = False) -> ServiceCIDR:
    meta = {"name": name, **({"deletionTimestamp": "2026-11-24T12:00:00Z"} if going else {})}
    conditions = [{"type": "Ready", "status": str(ready)}]
    return msgspec.convert({"metadata": meta, "spec": {"cidrs": cidrs}, "status": {"conditions": conditions}}, ServiceCIDR)


@pytest.mark.parametrize(
    ("others", "left"),
    [
        ([], {"10.0.0.5", "fd00::5"}),
        ([cidr("b", "10.0.0.0/16")], {"fd00::5"}),
        ([cidr("b", "10.0.0.0/16", "fd00::/64")], set()),
        ([cidr("b", "10.0.0.4/30"), cidr("c", "fd00::/64", going=True)], {"fd00::5"}),
        ([cidr("b", "10.0.0.4/31")], {"10.0.0.5", "fd00::5"}),
        ([cidr("b", "10.0.0.0/16", "fd00::/64", ready=False)], {"10.0.0.5", "fd00::5"}),
    ],
)
def test_which_addresses_keep_a_range(others: list[ServiceCIDR], left: set[str]) -> None:
    going = cidr("a", "10.0.0.0/24", "fd00::/112", going=True)
    mine: Any = {"metadata": {"name": "10.0.0.6"}}
    documents = [*(address_document(a, "d", "s") for a in ("10.0.0.5", "fd00::5", "10.0.1.5")), mine]
    held = msgspec.convert(documents, list[IPAddressObject])
    assert {str(address) for address in uncovered(going, [going, *others], held)} == left


def test_which_addresses_a_range_has() -> None:
    small = [ipaddress.ip_network("10.0.0.0/30"), ipaddress.ip_network("fd00::/126")]
    inside = [text for text in ("10.0.0.0", "10.0.0.1", "10.0.0.2", "10.0.0.3", "fd00::", "fd00::1", "fd00::3", "fd00::4")
              if covered(ipaddress.ip_address(text), small)]  # fmt: skip
    assert inside == ["10.0.0.1", "10.0.0.2", "fd00::1", "fd00::3"]
    assert not covered(ipaddress.ip_address("10.0.0.9"), [ipaddress.ip_network("10.0.0.9/32")])
