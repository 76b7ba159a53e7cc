"""Each controller through the real API server."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
from live_cluster import CONFIG, live_cluster

from podwire.client.api import PatchKind
from podwire.model.meta import Json
from podwire.model.resources import (
    CONFIGMAPS,
    DEPLOYMENTS,
    ENDPOINTSLICES,
    NAMESPACES,
    NODES,
    PODS,
    REPLICASETS,
    SERVICEACCOUNTS,
    SERVICES,
)


def ready(pods: list[Json]) -> list[Json]:
    return [
        pod
        for pod in pods
        if not pod["metadata"].get("deletionTimestamp")
        and any(c["type"] == "Ready" and c["status"] == "True" for c in pod.get("status", {}).get("conditions", ()))
    ]


def just_ready(count: int) -> Callable[[list[Json]], bool]:
    return lambda pods: len(pods) == len(ready(pods)) == count


def has_replicas(count: int) -> Callable[[list[Json]], bool]:
    return lambda deployments: deployments[0]["status"].get("replicas", 0) == count


def service(name: str, **spec: Any) -> Json:
    port = {"name": "http", "port": 80, "targetPort": "http"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"selector": {"app": name}, "ports": [port]} | spec,
    }


async def test_nodes_get_pod_ranges_of_both_families() -> None:
    async with live_cluster(nodes=3) as cluster:
        nodes = await cluster.until(NODES, lambda items: all(n["spec"].get("podCIDRs") for n in items))
    ranges = sorted(tuple(node["spec"]["podCIDRs"]) for node in nodes)
    assert ranges == [(f"10.244.{i}.0/24", f"fd00:10:244:{i or ''}{':' if not i else '::'}/64") for i in range(3)]


async def test_a_deployment_comes_up_spread_over_the_nodes_and_goes_with_all_that_it_owns() -> None:
    async with live_cluster(nodes=3) as cluster:
        await cluster.deploy("web", 6)
        pods = await cluster.until(PODS, lambda items: len(ready(items)) == 6)
        per_node = [sum(pod["spec"]["nodeName"] == f"node{n}" for pod in pods) for n in (1, 2, 3)]
        assert per_node == [2, 2, 2]
        await cluster.until(DEPLOYMENTS, lambda items: items[0]["status"].get("availableReplicas") == 6)
        await cluster.client.delete(DEPLOYMENTS, "web", "default")
        await cluster.until(REPLICASETS, lambda items: not items)
        await cluster.until(PODS, lambda items: not items)


async def test_a_rolling_update_stays_within_its_limits() -> None:
    async with live_cluster(nodes=2) as cluster:
        await cluster.deploy("web", 4, strategy={"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 1}})
        await cluster.until(PODS, lambda items: len(ready(items)) == 4)
        await cluster.until(DEPLOYMENTS, lambda items: items[0]["status"].get("availableReplicas") == 4)
        container = {"name": "web", "image": "web:2", "ports": [{"name": "http", "containerPort": 8080}]}
        patch = {"spec": {"template": {"spec": {"containers": [container]}}}}
        await cluster.client.patch(DEPLOYMENTS, "web", patch, "default")
        seen: list[tuple[int, int]] = []

        def within(pods: list[Json]) -> None:
            alive = [pod for pod in pods if not pod["metadata"].get("deletionTimestamp")]
            seen.append((len(alive), len(ready(pods))))

        def done(pods: list[Json]) -> bool:
            return len(pods) == len(ready(pods)) == 4 and all(pod["spec"]["containers"][0]["image"] == "web:2" for pod in pods)

        await cluster.until(PODS, done, each=within)
        assert max(alive for alive, _ in seen) <= 5
        assert min(available for _, available in seen) >= 3
        (deployment,) = await cluster.until(
            DEPLOYMENTS,
            lambda items: any(c["reason"] == "NewReplicaSetAvailable" for c in items[0]["status"].get("conditions", ())),
        )
        assert deployment["metadata"]["annotations"]["deployment.kubernetes.io/revision"] == "2"
        assert sorted(rs["spec"]["replicas"] for rs in await cluster.items(REPLICASETS)) == [0, 4]


async def test_recreate_waits_for_the_last_old_pod() -> None:
    async with live_cluster(nodes=1) as cluster:
        await cluster.deploy("web", 3, strategy={"type": "Recreate"})
        await cluster.until(PODS, lambda items: len(ready(items)) == 3)
        patch = [{"op": "replace", "path": "/spec/template/spec/containers/0/image", "value": "web:2"}]
        await cluster.client.patch(DEPLOYMENTS, "web", patch, "default", kind=PatchKind.JSON)

        def never_both(pods: list[Json]) -> None:
            assert len({pod["spec"]["containers"][0]["image"] for pod in pods}) <= 1

        await cluster.until(
            PODS,
            lambda items: len(ready(items)) == 3 and items[0]["spec"]["containers"][0]["image"] == "web:2",
            each=never_both,
        )


async def test_scaling() -> None:
    async with live_cluster(nodes=2) as cluster:
        await cluster.deploy("web", 2)
        await cluster.until(PODS, lambda items: len(ready(items)) == 2)
        for replicas in (7, 1, 0, 3):
            await cluster.client.patch(DEPLOYMENTS, "web", {"spec": {"replicas": replicas}}, "default")
            await cluster.until(PODS, just_ready(replicas))
            await cluster.until(DEPLOYMENTS, has_replicas(replicas))


async def test_a_deleted_pod_is_replaced_and_a_relabelled_one_let_go() -> None:
    async with live_cluster(nodes=1) as cluster:
        await cluster.deploy("web", 2)
        first, second = await cluster.until(PODS, lambda items: len(ready(items)) == 2)
        await cluster.client.delete(PODS, first["metadata"]["name"], "default")
        await cluster.until(
            PODS, lambda items: len(ready(items)) == 2 and first["metadata"]["uid"] not in {p["metadata"]["uid"] for p in items}
        )
        name = second["metadata"]["name"]
        await cluster.client.patch(PODS, name, {"metadata": {"labels": {"app": "other"}}}, "default")
        pods = await cluster.until(PODS, lambda items: len(ready(items)) == 3)
        await cluster.until(
            PODS,
            lambda items: not next(p for p in items if p["metadata"]["name"] == name)["metadata"].get("ownerReferences"),
        )
        assert len(pods) == 3
        # Back under the selector it is adopted, and then there is one too many.
        await cluster.client.patch(PODS, name, {"metadata": {"labels": {"app": "web"}}}, "default")
        await cluster.until(PODS, lambda items: len(items) == len(ready(items)) == 2)


async def test_endpoint_slices_follow_the_pods() -> None:
    async with live_cluster(nodes=2) as cluster:
        dual = service("web", ipFamilyPolicy="RequireDualStack", trafficDistribution="PreferSameNode")
        await cluster.client.create(SERVICES, dual)
        await cluster.deploy("web", 3)

        def addresses(items: list[Json], family: str) -> list[str]:
            return [
                e["addresses"][0]
                for s in items
                if s["addressType"] == family and s["metadata"]["labels"].get("kubernetes.io/service-name") == "web"
                for e in s["endpoints"]
                if e["conditions"]["ready"]
            ]

        slices = await cluster.until(
            ENDPOINTSLICES, lambda items: all(len(addresses(items, f)) == 3 for f in ("IPv4", "IPv6")), namespace="default"
        )
        mine = [s for s in slices if s["metadata"]["labels"].get("kubernetes.io/service-name") == "web"]
        assert all(s["ports"] == [{"name": "http", "port": 8080, "protocol": "TCP"}] for s in mine)
        assert {e["nodeName"] for s in mine for e in s["endpoints"]} == {"node1", "node2"}
        assert all(e["hints"]["forNodes"] == [{"name": e["nodeName"]}] for s in mine for e in s["endpoints"])
        await cluster.client.patch(DEPLOYMENTS, "web", {"spec": {"replicas": 1}}, "default")
        await cluster.until(ENDPOINTSLICES, lambda items: len(addresses(items, "IPv4")) == 1, namespace="default")
        await cluster.client.delete(SERVICES, "web", "default")
        await cluster.until(
            ENDPOINTSLICES,
            lambda items: not any(s["metadata"]["labels"].get("kubernetes.io/service-name") == "web" for s in items),
        )


async def test_load_balancer_addresses() -> None:
    async with live_cluster() as cluster:
        for name in ("one", "two"):
            await cluster.client.create(SERVICES, service(name, type="LoadBalancer", ipFamilyPolicy="RequireDualStack"))
        await cluster.client.create(SERVICES, service("mine", type="LoadBalancer", loadBalancerIP="203.0.113.77"))

        def given(items: list[Json]) -> dict[str, list[str]]:
            return {
                s["metadata"]["name"]: [i["ip"] for i in s.get("status", {}).get("loadBalancer", {}).get("ingress") or ()]
                for s in items
            }

        services = await cluster.until(SERVICES, lambda items: all(given(items).get(n) for n in ("one", "two", "mine")))
        assert given(services)["one"] == ["203.0.113.1", "2001:db8:2::1"]
        assert given(services)["two"] == ["203.0.113.2", "2001:db8:2::2"]
        assert given(services)["mine"] == ["203.0.113.77"]
        await cluster.client.patch(SERVICES, "one", {"spec": {"type": "ClusterIP"}}, "default")
        await cluster.until(SERVICES, lambda items: not given(items)["one"])
        await cluster.client.create(SERVICES, service("three", type="LoadBalancer"))
        services = await cluster.until(SERVICES, lambda items: bool(given(items).get("three")))
        assert given(services)["three"] == ["203.0.113.1"]


async def test_a_namespace_is_born_with_its_contents_and_dies_with_them() -> None:
    async with live_cluster(nodes=1) as cluster:
        await cluster.client.create(NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}})
        await cluster.until(
            SERVICEACCOUNTS, lambda items: [i["metadata"]["name"] for i in items] == ["default"], namespace="shop"
        )
        await cluster.until(
            CONFIGMAPS,
            lambda items: [i["data"] for i in items] == [{"ca.crt": CONFIG.ca_certificate}],
            namespace="shop",
        )
        await cluster.client.delete(CONFIGMAPS, "kube-root-ca.crt", "shop")
        await cluster.until(CONFIGMAPS, lambda items: len(items) == 1, namespace="shop")
        await cluster.deploy("web", 2, namespace="shop")
        await cluster.until(PODS, lambda items: len(ready(items)) == 2)
        await cluster.client.delete(NAMESPACES, "shop")
        await cluster.until(NAMESPACES, lambda items: "shop" not in {i["metadata"]["name"] for i in items})
        assert await cluster.items(PODS) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # see test_controllers_random.py
async def test_a_server_that_goes_away_and_comes_back_is_caught_up_with() -> None:
    async with live_cluster(nodes=2) as cluster:
        await cluster.deploy("web", 2)
        await cluster.until(PODS, lambda items: len(ready(items)) == 2)
        await cluster.stop_server()
        await cluster.start_server()
        await cluster.client.patch(DEPLOYMENTS, "web", {"spec": {"replicas": 4}}, "default")
        await cluster.until(PODS, lambda items: len(ready(items)) == 4)
    gc.collect()
