"""Garbage collection, node lifecycle and scheduling through the real API server."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from live_cluster import CONFIG, LiveCluster, live_cluster

from podwire.client.errors import NotFound
from podwire.model.meta import Json
from podwire.model.resources import CONFIGMAPS, DEPLOYMENTS, ENDPOINTSLICES, EVENTS, LEASES, NODES, PODS, REPLICASETS, SERVICES
from podwire.model.timestamps import format_micro_time

NODE_GRACE = 1.5
"""Real seconds without a heartbeat until a node is lost. A busy machine may stop this process for a good part of it."""


def named(items: list[Json], name: str) -> Json:
    return next(item for item in items if item["metadata"]["name"] == name)


async def config_map(cluster: LiveCluster, name: str, *owners: Json, block: bool = True) -> Json:
    references = [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"],
            "blockOwnerDeletion": block,
        }
        for owner in owners
    ]
    meta = {"name": name, "namespace": "default", "ownerReferences": references}
    return await cluster.client.create(CONFIGMAPS, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta})


def names(items: list[Json]) -> set[str]:
    return {item["metadata"]["name"] for item in items} - {"kube-root-ca.crt"}


async def test_dependents_follow_their_owner_through_generations() -> None:
    async with live_cluster() as cluster:
        owner = await config_map(cluster, "owner")
        child = await config_map(cluster, "child", owner)
        await config_map(cluster, "grandchild", child)
        other = await config_map(cluster, "other")
        await config_map(cluster, "shared", owner, other)
        await cluster.client.delete(CONFIGMAPS, "owner", "default", propagation="Background")
        left = await cluster.until(CONFIGMAPS, lambda items: names(items) == {"other", "shared"}, namespace="default")
        if len(named(left, "shared")["metadata"]["ownerReferences"]) > 1:
            left = await cluster.until(
                CONFIGMAPS, lambda items: len(named(items, "shared")["metadata"]["ownerReferences"]) == 1, namespace="default"
            )
        assert named(left, "shared")["metadata"]["ownerReferences"][0]["name"] == "other"


async def test_foreground_deletion_ends_with_the_owner() -> None:
    async with live_cluster() as cluster:
        owner = await config_map(cluster, "owner")
        child = await config_map(cluster, "child", owner)
        await config_map(cluster, "grandchild", child)
        await cluster.client.delete(CONFIGMAPS, "owner", "default", propagation="Foreground")
        order: list[set[str]] = []
        await cluster.until(
            CONFIGMAPS, lambda items: not names(items), namespace="default", each=lambda items: order.append(names(items))
        )
        for present in order:
            assert "owner" in present or not present
            assert "child" in present or "grandchild" not in present


async def test_orphans_are_let_go() -> None:
    async with live_cluster() as cluster:
        owner = await config_map(cluster, "owner")
        await config_map(cluster, "child", owner)
        await cluster.client.delete(CONFIGMAPS, "owner", "default", propagation="Orphan")
        left = await cluster.until(CONFIGMAPS, lambda items: names(items) == {"child"}, namespace="default")
        assert not named(left, "child")["metadata"].get("ownerReferences")


async def test_an_object_whose_owner_never_was_goes() -> None:
    async with live_cluster() as cluster:
        await config_map(cluster, "child", {"metadata": {"name": "nobody", "uid": "11111111-2222-3333-4444-555555555555"}})
        await cluster.until(CONFIGMAPS, lambda items: not names(items), namespace="default")


async def test_deleting_a_deployment_as_orphan_keeps_its_pods_and_a_new_one_adopts_them() -> None:
    async with live_cluster(nodes=1) as cluster:
        await cluster.deploy("web", 2)
        pods = await cluster.until(PODS, lambda items: len(items) == 2)
        uids = {pod["metadata"]["uid"] for pod in pods}
        await cluster.client.delete(DEPLOYMENTS, "web", "default", propagation="Orphan")
        await cluster.until(DEPLOYMENTS, lambda items: not items)
        await cluster.until(REPLICASETS, lambda items: not items[0]["metadata"].get("ownerReferences"))
        await cluster.deploy("web", 2)
        await cluster.until(REPLICASETS, lambda items: bool(items[0]["metadata"].get("ownerReferences")))
        await cluster.until(DEPLOYMENTS, lambda items: items[0].get("status", {}).get("availableReplicas") == 2)
        assert {pod["metadata"]["uid"] for pod in await cluster.items(PODS)} == uids


def pod(name: str, **spec: Any) -> Json:
    container = {"name": "web", "image": "web:1"} | spec.pop("container", {})
    meta = {"name": name, "namespace": "default", "labels": {"app": name}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {"containers": [container], **spec}}


async def test_a_pod_that_fits_nowhere_says_why_and_is_bound_when_a_node_comes_that_fits() -> None:
    async with live_cluster(nodes=1) as cluster:
        await cluster.client.create(PODS, pod("picky", nodeSelector={"disk": "ssd"}))
        events = await cluster.until(EVENTS, lambda items: any(e["reason"] == "FailedScheduling" for e in items))
        (message,) = [e["message"] for e in events if e["reason"] == "FailedScheduling"]
        assert message == "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector."
        (waiting,) = await cluster.until(PODS, lambda items: bool(items[0].get("status", {}).get("conditions")))
        assert waiting["status"]["conditions"][0]["reason"] == "Unschedulable"
        await cluster.add_node("node2", disk="ssd")
        (bound,) = await cluster.until(PODS, lambda items: bool(items[0]["spec"].get("nodeName")))
        assert bound["spec"]["nodeName"] == "node2"


async def test_a_pod_with_its_node_preset_and_one_of_another_scheduler_are_left_alone() -> None:
    async with live_cluster(nodes=2) as cluster:
        await cluster.client.create(PODS, pod("preset", nodeName="node2"))
        await cluster.client.create(PODS, pod("theirs", schedulerName="theirs"))
        await cluster.client.create(PODS, pod("ours"))
        pods = await cluster.until(PODS, lambda items: any(i["spec"].get("nodeName") == "node1" for i in items))
        assert named(pods, "preset")["spec"]["nodeName"] == "node2"
        assert not named(pods, "theirs")["spec"].get("nodeName")


async def test_host_ports_keep_pods_apart_until_one_goes() -> None:
    async with live_cluster(nodes=1) as cluster:
        container = {"ports": [{"containerPort": 80, "hostPort": 8080}]}
        await cluster.client.create(PODS, pod("first", container=container))
        await cluster.until(PODS, lambda items: bool(items[0]["spec"].get("nodeName")))
        await cluster.client.create(PODS, pod("second", container=container))
        await cluster.until(EVENTS, lambda items: any("free ports" in e["message"] for e in items))
        await cluster.client.delete(PODS, "first", "default")
        await cluster.until(PODS, lambda items: [bool(i["spec"].get("nodeName")) for i in items] == [True])


async def renew(cluster: LiveCluster, name: str) -> None:
    spec = {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": format_micro_time(datetime.now(UTC))}
    meta = {"name": name, "namespace": "kube-node-lease"}
    document = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": meta, "spec": spec}
    try:
        await cluster.client.patch(LEASES, name, {"spec": spec}, "kube-node-lease")
    except NotFound:
        await cluster.client.create(LEASES, document)


async def test_a_silent_node_loses_its_endpoints_and_its_taints_go_when_it_returns() -> None:
    config = replace(CONFIG, node_grace=NODE_GRACE)
    async with live_cluster(config, nodes=2) as cluster:
        await cluster.client.create(
            SERVICES,
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": "web", "namespace": "default"},
                "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]},
            },
        )

        async def keep_alive() -> None:
            while True:
                await renew(cluster, "node1")
                await asyncio.sleep(0.05)

        living = asyncio.create_task(keep_alive())
        await cluster.deploy("web", 2)

        def ready_nodes(items: list[Json]) -> set[str]:
            mine = [s for s in items if s["metadata"]["labels"].get("kubernetes.io/service-name") == "web"]
            return {e["nodeName"] for s in mine for e in s["endpoints"] if e["conditions"]["ready"]}

        nodes = await cluster.until(NODES, lambda items: len(named(items, "node2")["spec"].get("taints", ())) == 2)
        taints = named(nodes, "node2")["spec"]["taints"]
        assert {(t["key"], t["effect"]) for t in taints} == {
            ("node.kubernetes.io/unreachable", "NoSchedule"),
            ("node.kubernetes.io/unreachable", "NoExecute"),
        }
        assert not named(nodes, "node1")["spec"].get("taints")
        await cluster.until(ENDPOINTSLICES, lambda items: ready_nodes(items) == {"node1"}, namespace="default")
        returning = asyncio.create_task(_return(cluster, "node2"))
        await cluster.until(NODES, lambda items: not named(items, "node2")["spec"].get("taints"))
        for task in (living, returning):
            task.cancel()
        await asyncio.gather(living, returning, return_exceptions=True)


async def _return(cluster: LiveCluster, name: str) -> None:
    await renew(cluster, name)
    await cluster.set_ready(name, "True")
    while True:
        await renew(cluster, name)
        await asyncio.sleep(0.05)


async def test_pods_of_a_lost_node_are_evicted_and_replaced_elsewhere() -> None:
    config = replace(CONFIG, node_grace=NODE_GRACE)
    toleration = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 0}
    async with live_cluster(config, nodes=2) as cluster:
        alive = asyncio.create_task(_return(cluster, "node1"))
        await cluster.deploy("web", 2, pod={"tolerations": [toleration]})
        await cluster.until(PODS, lambda items: {p["spec"].get("nodeName") for p in items} == {"node1", "node2"})
        await cluster.until(PODS, lambda items: [p["spec"].get("nodeName") for p in items] == ["node1", "node1"])
        alive.cancel()
        await asyncio.gather(alive, return_exceptions=True)


async def test_pods_of_a_deleted_node_go_at_once() -> None:
    async with live_cluster(nodes=2) as cluster:
        await cluster.deploy("web", 4, labels={"stays": "terminating"})
        await cluster.until(PODS, lambda items: len([p for p in items if p["spec"].get("nodeName")]) == 4)
        await cluster.client.delete(NODES, "node2")
        await cluster.until(PODS, lambda items: [p["spec"].get("nodeName") for p in items] == ["node1"] * 4)


async def test_nodes_that_all_fall_silent_together_are_given_time_before_they_count_as_lost() -> None:
    async with live_cluster(replace(CONFIG, node_grace=0.4), nodes=2) as cluster:
        loop = asyncio.get_running_loop()
        alive = [asyncio.create_task(_return(cluster, name)) for name in ("node1", "node2")]
        await cluster.until(LEASES, lambda items: len(items) == 2)
        for task in alive:
            task.cancel()
        await asyncio.gather(*alive, return_exceptions=True)
        stopped = loop.time()

        def lost(nodes: list[Json]) -> bool:
            return all(any(c["type"] == "Ready" and c["status"] == "Unknown" for c in n["status"]["conditions"]) for n in nodes)

        await cluster.until(NODES, lost)
        assert loop.time() - stopped >= 0.55
