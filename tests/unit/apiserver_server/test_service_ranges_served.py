"""Where ClusterIPs come from and who has which, as the API shows it: ServiceCIDRs and IPAddresses."""

import asyncio
import ipaddress
import json
import random
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import pytest
from apirig import Answer, Api, Serve

from podwire.apiserver.config import ServerConfig
from podwire.store.memory import MemoryStore
from podwire.store.port import Event

PATH = "/apis/networking.k8s.io/v1/servicecidrs"
ADDRESSES = "/apis/networking.k8s.io/v1/ipaddresses"
SERVICES = "/api/v1/namespaces/default/services"
MERGE = {"Content_Type": "application/merge-patch+json"}
FINALIZER = "networking.k8s.io/service-cidr-finalizer"


def ranges(*texts: str) -> ServerConfig:
    return ServerConfig(service_cidrs=tuple(ipaddress.ip_network(text) for text in texts))


async def served(api: Api) -> dict[str, Any]:
    items = (await api.ok("GET", PATH))["items"]
    assert [item["metadata"]["name"] for item in items] == ["kubernetes"]
    found: dict[str, Any] = items[0]
    return found


async def test_the_ranges_are_those_that_the_server_was_started_with(serve: Serve) -> None:
    store = MemoryStore()
    api = await serve(store=store, config=ranges("10.96.0.0/12", "fd00:10:96::/112"))
    first = await served(api)
    assert first["spec"]["cidrs"] == ["10.96.0.0/12", "fd00:10:96::/112"]
    assert [(c["type"], c["status"]) for c in first["status"]["conditions"]] == [("Ready", "True")]
    again = await served(await serve(store=store, config=ranges("10.96.0.0/12", "fd00:10:96::/112")))
    assert again == first, "a server that starts again leaves it as it is"
    elsewhere = await serve(store=store, config=ranges("10.112.0.0/16"))
    assert (await served(elsewhere))["spec"]["cidrs"] == ["10.112.0.0/16"]
    assert (await elsewhere.ok("GET", SERVICES + "/kubernetes"))["spec"]["clusterIP"] == "10.96.0.1", "what it has it keeps"
    assert (await cluster_ip(elsewhere, "a")).startswith("10.112.")
    await elsewhere.ok("DELETE", PATH + "/kubernetes")
    assert (await served(await serve(store=store, config=ranges("10.113.0.0/16"))))["spec"]["cidrs"] == ["10.113.0.0/16"]


async def cluster_ip(api: Api, name: str, **spec: Any) -> str:
    body = {"metadata": {"name": name}, "spec": {"ports": [{"port": 80}], **spec}}
    return str((await api.ok("POST", SERVICES, body))["spec"]["clusterIP"])


async def add(api: Api, name: str, *cidrs: str) -> dict[str, Any]:
    found: dict[str, Any] = await api.ok("POST", PATH, {"metadata": {"name": name}, "spec": {"cidrs": list(cidrs)}})
    return found


async def test_a_cluster_whose_range_is_full_gets_another(serve: Serve) -> None:
    api = await serve(config=ranges("10.96.0.0/30"))
    await cluster_ip(api, "a")
    await api.fails(500, "POST", SERVICES, {"metadata": {"name": "b"}, "spec": {"ports": [{"port": 80}]}})
    made = await add(api, "more", "10.112.0.0/28", "fd00::/112")
    assert made["metadata"]["finalizers"] == [FINALIZER]
    assert made["status"]["conditions"][0]["message"] == "Kubernetes Service CIDR is ready"
    assert (await cluster_ip(api, "b")).startswith("10.112.0.")
    assert await cluster_ip(api, "c", clusterIP="10.112.0.3") == "10.112.0.3"
    outside = {"metadata": {"name": "d"}, "spec": {"ports": [{"port": 80}], "clusterIP": "10.113.0.1"}}
    answer = await api.fails(422, "POST", SERVICES, outside)
    assert "is not in the valid range. The range of valid IPs is 10.96.0.0/30, 10.112.0.0/28" in answer["message"]


async def test_no_address_comes_from_a_range_that_is_about_to_go_or_not_ready(serve: Serve) -> None:
    api = await serve(config=ranges("10.96.0.0/30"))
    await cluster_ip(api, "a")
    await add(api, "more", "10.112.0.0/28")
    not_ready = {"status": {"conditions": [{"type": "Ready", "status": "False"}]}}
    await api.ok("PATCH", PATH + "/more/status", not_ready, **MERGE)
    await api.fails(500, "POST", SERVICES, {"metadata": {"name": "b"}, "spec": {"ports": [{"port": 80}]}})
    ready = {"status": {"conditions": [{"type": "Ready", "status": "True"}]}}
    await api.ok("PATCH", PATH + "/more/status", ready, **MERGE)
    assert (await cluster_ip(api, "b")).startswith("10.112.0.")
    going = await api.ok("DELETE", PATH + "/more")
    assert going["metadata"]["deletionTimestamp"]
    assert going["metadata"]["finalizers"] == [FINALIZER]
    wish = {"metadata": {"name": "c"}, "spec": {"ports": [{"port": 80}], "clusterIP": "10.112.0.3"}}
    assert "is not in the valid range" in (await api.fails(422, "POST", SERVICES, wish))["message"]
    assert (await api.ok("GET", SERVICES + "/b"))["spec"]["clusterIP"].startswith("10.112.0."), "what it has it keeps"


class LateNews:
    """A store that tells its one server what others have changed only while `told` is set."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store
        self.told = asyncio.Event()
        self.told.set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def watch(self, prefix: str, from_revision: int) -> AsyncGenerator[Sequence[Event], None]:
        async with aclosing(self._store.watch(prefix, from_revision)) as batches:
            async for batch in batches:
                await self.told.wait()
                yield batch


async def test_a_server_that_has_not_heard_of_a_deletion_yet_gives_nothing_out_of_the_range(serve: Serve) -> None:
    store = MemoryStore()
    late = LateNews(store)
    one, two = await serve(store, ranges("10.96.0.0/30")), await serve(late, ranges("10.96.0.0/30"))
    await cluster_ip(one, "a")
    await add(one, "more", "10.112.0.0/24")
    assert (await cluster_ip(two, "b")).startswith("10.112.0.")
    late.told.clear()
    await one.ok("DELETE", PATH + "/more")
    wanted = {"metadata": {"name": "c"}, "spec": {"ports": [{"port": 80}]}}
    making = asyncio.create_task(two("POST", SERVICES, wanted))
    refused = await one("POST", SERVICES, wanted)
    await asyncio.wait((making,), timeout=0.05)
    assert not making.done(), "it has to hear first why its commit was refused"
    late.told.set()
    assert [(await making).code, refused.code] == [500, 500]
    assert len((await one.ok("GET", ADDRESSES))["items"]) == 3


async def test_an_address_has_an_object_for_as_long_as_its_service(serve: Serve) -> None:
    api = await serve(config=ranges("10.96.0.0/12", "fd00:10:96::/112"))
    await cluster_ip(api, "web", ipFamilyPolicy="PreferDualStack")
    addresses = (await api.ok("GET", SERVICES + "/web"))["spec"]["clusterIPs"]
    objects = [await api.ok("GET", f"{ADDRESSES}/{address}") for address in addresses]
    assert [o["spec"]["parentRef"] for o in objects] == [{"resource": "services", "namespace": "default", "name": "web"}] * 2
    assert [o["metadata"]["labels"] for o in objects] == [
        {"ipaddress.kubernetes.io/ip-family": family, "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io"}
        for family in ("IPv4", "IPv6")
    ]
    service = await api.ok("GET", SERVICES + "/web")
    assert {o["metadata"]["resourceVersion"] for o in objects} == {service["metadata"]["resourceVersion"]}, "one commit"
    await api.ok("PATCH", SERVICES + "/web", {"spec": {"ipFamilyPolicy": "SingleStack"}}, **MERGE)
    await api.fails(404, "GET", f"{ADDRESSES}/{addresses[1]}")
    async with api.watch(f"{ADDRESSES}?watch=true&resourceVersion={service['metadata']['resourceVersion']}") as stream:
        await api.ok("DELETE", SERVICES + "/web")
        assert await stream.take(2) == [("DELETED", addresses[1]), ("DELETED", addresses[0])]


async def test_an_address_that_somebody_reserved_is_not_given(api: Api) -> None:
    mine = {"metadata": {"name": "10.96.0.77"}, "spec": {"parentRef": {"resource": "routers", "group": "e.org", "name": "r"}}}
    await api.ok("POST", ADDRESSES, mine)
    await api.fails(409, "POST", ADDRESSES, mine)
    wish = {"metadata": {"name": "a"}, "spec": {"ports": [{"port": 80}], "clusterIP": "10.96.0.77"}}
    assert "provided IP is already allocated" in (await api.fails(422, "POST", SERVICES, wish))["message"]
    await api.ok("DELETE", ADDRESSES + "/10.96.0.77")
    assert await cluster_ip(api, "a", clusterIP="10.96.0.77") == "10.96.0.77"


async def test_a_wish_that_another_server_has_just_met_is_refused_as_taken(serve: Serve) -> None:
    store = MemoryStore()
    late = LateNews(store)
    one, two = await serve(store), await serve(late)
    late.told.clear()
    await cluster_ip(one, "a", clusterIP="10.96.0.77")
    wish = {"metadata": {"name": "b"}, "spec": {"ports": [{"port": 80}], "clusterIP": "10.96.0.77"}}
    making = asyncio.create_task(two("POST", SERVICES, wish))
    await asyncio.wait((making,), timeout=0.05)
    late.told.set()
    answer = await making
    assert (answer.code, b"provided IP is already allocated" in answer.body) == (422, True)


async def test_the_servers_own_range_is_used_first_also_when_it_is_the_youngest(serve: Serve) -> None:
    store = MemoryStore()
    await add(await serve(store, ranges("10.96.0.0/24")), "a", "10.112.0.0/24")
    elsewhere = await serve(store, ranges("10.97.0.0/24"))
    assert (await cluster_ip(elsewhere, "web")).startswith("10.97.0.")


async def everything_agrees(store: MemoryStore) -> int:
    """How many addresses Services have, once it is clear that each has its object, and one holder."""
    services = await store.list("/registry/services/specs/")
    held = {
        address: json.loads(item.value)["metadata"]["name"]
        for item in services.items
        for address in json.loads(item.value)["spec"]["clusterIPs"]
    }
    kept = (await store.list("/registry/ipaddresses/", revision=services.revision)).items
    assert {item.key.rpartition("/")[2]: json.loads(item.value)["spec"]["parentRef"]["name"] for item in kept} == held
    assert len(held) == sum(len(json.loads(item.value)["spec"]["clusterIPs"]) for item in services.items)
    return len(held)


@pytest.mark.parametrize("seed", range(3))
async def test_addresses_and_services_agree_whatever_two_servers_are_asked_at_once(serve: Serve, seed: int) -> None:
    store, dice = MemoryStore(), random.Random(seed)
    config = ranges("10.96.0.0/28", "fd00:10:96::/124")
    servers = [await serve(store, config), await serve(store, config)]
    names, cidrs = [f"s{n}" for n in range(20)], ["10.96.0.0/27", "10.97.0.0/29", "10.97.0.0/28"]

    answers: list[Answer] = []

    async def ask(method: str, path: str, body: object = None, **headers: str) -> None:
        answers.append(await dice.choice(servers)(method, path, body, **headers))

    async def act() -> None:
        name, number = dice.choice(names), dice.randrange(len(cidrs))
        policy = {"ipFamilyPolicy": dice.choice(["SingleStack", "PreferDualStack"])}
        wish = {"clusterIP": f"10.96.0.{dice.randrange(1, 32)}"} if dice.random() < 0.3 else {}
        match dice.randrange(6):
            case 0 | 1:
                spec = {"ports": [{"port": 80}], **policy, **wish}
                await ask("POST", SERVICES, {"metadata": {"name": name}, "spec": spec})
            case 2:
                await ask("PATCH", f"{SERVICES}/{name}", {"spec": policy}, **MERGE)
            case 3:
                await ask("DELETE", f"{SERVICES}/{name}")
            case 4:
                await ask("POST", PATH, {"metadata": {"name": f"r{number}"}, "spec": {"cidrs": [cidrs[number]]}})
            case 5:
                await ask("DELETE", f"{PATH}/r{number}")
                await ask("PATCH", f"{PATH}/r{number}", {"metadata": {"finalizers": None}}, **MERGE)

    most = 0
    for _ in range(12):
        await asyncio.gather(*(act() for _ in range(16)))
        most = max(most, await everything_agrees(store))
    assert most > 10
    assert {answer.code for answer in answers} <= {200, 201, 404, 409, 422, 500}
    assert all(b"range is full" in answer.body for answer in answers if answer.code == 500)


PARENT = {"resource": "services", "namespace": "default", "name": "web"}


@pytest.mark.parametrize(
    ("name", "parent", "message"),
    [
        ("ten", PARENT, "must be a valid IP address"),
        ("fd00::0", PARENT, 'must be in canonical form (\\"fd00::\\")'),
        ("10.0.0.1", None, "spec.parentRef: Required value"),
        ("10.0.0.1", {"name": "web"}, "spec.parentRef.resource: Required value"),
        ("10.0.0.1", {"resource": "services"}, "spec.parentRef.name: Required value"),
        ("10.0.0.1", {**PARENT, "group": "-"}, "spec.parentRef.group: Invalid value"),
        ("10.0.0.1", {**PARENT, "name": "a/b"}, "may not contain '/'"),
        ("10.0.0.1", {**PARENT, "namespace": ".."}, "may not be '..'"),
    ],
)
async def test_what_is_no_address(api: Api, name: str, parent: dict[str, str] | None, message: str) -> None:
    body = {"metadata": {"name": name}, "spec": {"parentRef": parent} if parent else {}}
    assert message in json.dumps(await api.fails(422, "POST", ADDRESSES, body))


async def test_an_address_does_not_change_hands(api: Api) -> None:
    own = f"{ADDRESSES}/10.96.0.1"
    answer = await api.fails(422, "PATCH", own, {"spec": {"parentRef": {"name": "other"}}}, **MERGE)
    assert "spec.parentRef: Invalid value" in answer["message"]
    assert "field is immutable" in answer["message"]


@pytest.mark.parametrize(
    ("name", "cidrs", "message"),
    [
        ("Not_A_Name", ["10.112.0.0/16"], "metadata.name: Invalid value"),
        ("kubernetes", [], "spec.cidrs: Required value"),
        ("kubernetes", ["10.0.0.0/8", "fd00::/64", "10.1.0.0/16"], "may only hold up to 2 values"),
        ("kubernetes", ["10.0.0.0/8", "10.1.0.0/16"], "may specify no more than one IP for each IP family"),
        ("kubernetes", ["10.0.0.1/8"], "spec.cidrs[0]: Invalid value"),
        ("kubernetes", ["fd00:0::/64"], "must be in canonical form"),
    ],
)
async def test_what_is_no_range(api: Api, name: str, cidrs: list[str], message: str) -> None:
    answer = await api.fails(422, "POST", PATH, {"metadata": {"name": name}, "spec": {"cidrs": cidrs}})
    assert message in answer["message"]


async def test_ranges_do_not_change(serve: Serve) -> None:
    api = await serve(config=ranges("10.96.0.0/12"))
    patch = {"spec": {"cidrs": ["10.0.0.0/8"]}}
    answer = await api.fails(422, "PATCH", f"{PATH}/kubernetes", patch, **MERGE)
    assert "field is immutable" in answer["message"]
