"""Service addresses and node ports through the API: no duplicates, whatever runs in parallel or restarts."""

import asyncio
import json
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from apirig import Api, Serve

from podwire.apiserver.config import ServerConfig
from podwire.model.servicecidr import address_document
from podwire.store.memory import MemoryStore
from podwire.store.port import Delete, Put
from podwire.store.sqlite import SqliteStore

SERVICES = "/api/v1/namespaces/default/services"
MERGE = {"Content_Type": "application/merge-patch+json"}


def service(name: str, **spec: Any) -> Any:
    return {"metadata": {"name": name}, "spec": {"ports": [{"port": 80}], **spec}}


async def allocation_keys(api: Api) -> set[str]:
    kept = [*(await api.store.list("/registry/ranges/")).items, *(await api.store.list("/registry/ipaddresses/")).items]
    return {item.key.removeprefix("/registry/") for item in kept}


async def test_the_api_server_has_the_first_address(serve: Serve) -> None:
    config = ServerConfig(service_cidrs=(ip_network("10.96.0.0/12"),), advertise=(ip_address("198.18.0.1"),))
    api = await serve(config=config)
    own = await api.ok("GET", SERVICES + "/kubernetes")
    assert own["spec"]["clusterIP"] == "10.96.0.1"
    assert own["spec"]["ports"] == [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": 6443}]
    slices = await api.ok("GET", "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/kubernetes")
    assert slices["metadata"]["labels"]["kubernetes.io/service-name"] == "kubernetes"
    assert (slices["endpoints"][0]["addresses"], slices["ports"][0]["port"]) == (["198.18.0.1"], 6443)
    namespaces = {item["metadata"]["name"] for item in (await api.ok("GET", "/api/v1/namespaces"))["items"]}
    assert namespaces == {"default", "kube-system", "kube-public", "kube-node-lease"}


async def test_in_parallel_nobody_gets_anothers(serve: Serve) -> None:
    config = ServerConfig(service_cidrs=(ip_network("10.96.0.0/26"),), node_ports=range(30000, 30060))
    api = await serve(config=config)
    made = await asyncio.gather(*(api.ok("POST", SERVICES, service(f"s{n}", type="NodePort")) for n in range(60)))
    assert len({s["spec"]["clusterIP"] for s in made}) == 60
    assert len({s["spec"]["ports"][0]["nodePort"] for s in made}) == 60


async def test_two_servers_on_one_store_do_not_share_either(serve: Serve) -> None:
    store = MemoryStore()
    config = ServerConfig(service_cidrs=(ip_network("10.96.0.0/26"),))
    one, two = await serve(store, config), await serve(store, config)
    made = await asyncio.gather(
        *(api.ok("POST", SERVICES, service(f"{name}{n}")) for n in range(20) for name, api in (("a", one), ("b", two)))
    )
    assert len({s["spec"]["clusterIP"] for s in made}) == 40


async def test_what_one_server_gave_back_the_other_hands_out(serve: Serve) -> None:
    store = MemoryStore()
    config = ServerConfig(service_cidrs=(ip_network("10.96.0.0/29"),), node_ports=range(30000, 30005))
    one, two = await serve(store, config), await serve(store, config)
    for _ in range(4):
        made = await asyncio.gather(*(one.ok("POST", SERVICES, service(f"s{n}", type="NodePort")) for n in range(5)))
        await two.fails(500, "POST", SERVICES, service("one-too-many"))
        await asyncio.gather(*(one.ok("DELETE", f"{SERVICES}/s{n}") for n in range(5)))
        wished = made[0]["spec"]["clusterIP"]
        again = await two.ok("POST", SERVICES, service("wish", clusterIP=wished, type="NodePort"))
        assert again["spec"]["clusterIP"] == wished
        await two.ok("DELETE", f"{SERVICES}/wish")


async def test_a_full_range_is_an_error_that_says_so(serve: Serve) -> None:
    api = await serve(config=ServerConfig(service_cidrs=(ip_network("10.96.0.0/30"),)))
    await api.ok("POST", SERVICES, service("a"))
    status = await api.fails(500, "POST", SERVICES, service("b"))
    assert "range is full" in status["message"]
    await api.ok("DELETE", SERVICES + "/a")
    await api.ok("POST", SERVICES, service("b"))


async def test_wishes_are_met_or_refused(api: Api) -> None:
    made = await api.ok("POST", SERVICES, service("a", clusterIP="10.96.0.77", type="NodePort"))
    assert made["spec"]["clusterIPs"] == ["10.96.0.77"]
    taken = await api.fails(422, "POST", SERVICES, service("b", clusterIP="10.96.0.77"))
    assert "provided IP is already allocated" in taken["message"]
    assert taken["details"]["causes"][0]["field"] == "spec.clusterIPs"
    outside = await api.fails(422, "POST", SERVICES, service("b", clusterIP="192.0.2.1"))
    assert "is not in the valid range" in outside["message"]
    port = made["spec"]["ports"][0]["nodePort"]
    body = service("b", type="NodePort", ports=[{"port": 80, "nodePort": port}])
    assert "provided port is already allocated" in (await api.fails(422, "POST", SERVICES, body))["message"]


async def test_what_a_service_no_longer_needs_is_free(api: Api) -> None:
    before = await allocation_keys(api)
    await api.ok("POST", SERVICES, service("a", type="NodePort"))
    assert len(await allocation_keys(api) - before) == 2
    await api.ok("PATCH", SERVICES + "/a", {"spec": {"type": "ClusterIP", "ports": [{"port": 80}]}}, **MERGE)
    assert len(await allocation_keys(api) - before) == 1
    await api.ok("DELETE", SERVICES + "/a")
    assert await allocation_keys(api) == before


async def test_a_refused_service_and_a_dry_run_hold_nothing(api: Api) -> None:
    before = await allocation_keys(api)
    await api.ok("POST", SERVICES + "?dryRun=All", service("a", clusterIP="10.96.0.50"))
    await api.ok("POST", SERVICES, service("a", clusterIP="10.96.0.50"))
    await api.fails(409, "POST", SERVICES, service("a"))
    assert len(await allocation_keys(api) - before) == 1


async def test_allocations_survive_a_restart(serve: Serve, tmp_path: Path) -> None:
    config = ServerConfig(service_cidrs=(ip_network("10.96.0.0/27"),))
    first = await serve(SqliteStore.open(tmp_path / "db"), config)
    made = [await first.ok("POST", SERVICES, service(f"s{n}")) for n in range(15)]
    await first.store.close()
    second = await serve(SqliteStore.open(tmp_path / "db"), config)
    more = await asyncio.gather(*(second.ok("POST", SERVICES, service(f"t{n}")) for n in range(14)))
    assert len({s["spec"]["clusterIP"] for s in [*made, *more]}) == 29
    assert "range is full" in (await second.fails(500, "POST", SERVICES, service("z")))["message"]


async def test_lost_and_stale_allocations_are_repaired_at_start(serve: Serve) -> None:
    store = MemoryStore()
    first = await serve(store)
    made = await first.ok("POST", SERVICES, service("a", type="NodePort"))
    address, port = made["spec"]["clusterIP"], made["spec"]["ports"][0]["nodePort"]
    leaked = address_document("10.96.0.99", "default", "gone")
    leaked["metadata"] |= {"uid": "u1", "creationTimestamp": "2026-11-24T12:00:00Z"}
    await store.commit(
        [
            Delete(f"/registry/ipaddresses/{address}"),
            Delete(f"/registry/ranges/servicenodeports/{port}"),
            Put("/registry/ranges/servicenodeports/30999", b"{}"),
            Put("/registry/ipaddresses/10.96.0.99", json.dumps(leaked).encode()),
            Put("/registry/ipaddresses/10.96.0.98", b"{}"),
        ]
    )
    kept = await allocation_keys(await serve(store))
    assert {f"ipaddresses/{address}", f"ranges/servicenodeports/{port}", "ipaddresses/10.96.0.98"} <= kept
    assert not kept & {"ipaddresses/10.96.0.99", "ranges/servicenodeports/30999"}


async def test_a_data_directory_from_before_there_were_ipaddresses(serve: Serve) -> None:
    store = MemoryStore()
    first = await serve(store)
    made = await first.ok("POST", SERVICES, service("a"))
    address = made["spec"]["clusterIP"]
    await store.commit(
        [Delete(f"/registry/ipaddresses/{address}"), Put(f"/registry/ranges/serviceips/{address}", b'{"service":"default/a"}')]
    )
    second = await serve(store)
    found = await second.ok("GET", f"/apis/networking.k8s.io/v1/ipaddresses/{address}")
    assert found["spec"]["parentRef"] == {"resource": "services", "namespace": "default", "name": "a"}
    assert not {key for key in await allocation_keys(second) if "serviceips" in key}
    await second.fails(422, "POST", SERVICES, service("b", clusterIP=address))


async def test_dual_stack(serve: Serve) -> None:
    api = await serve(config=ServerConfig(service_cidrs=(ip_network("10.96.0.0/12"), ip_network("fd00:10:96::/112"))))
    made = await api.ok("POST", SERVICES, service("a", ipFamilyPolicy="PreferDualStack"))
    assert made["spec"]["ipFamilies"] == ["IPv4", "IPv6"]
    assert [ip_address(a).version for a in made["spec"]["clusterIPs"]] == [4, 6]
