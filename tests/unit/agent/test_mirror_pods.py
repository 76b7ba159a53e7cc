"""Containers of engines as Pods in the API: there while they are, right after whatever happened, gone with them."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any

import pytest
from live_cluster import LiveCluster, free_port

from podwire.agent.attachrecord import AttachmentRecord
from podwire.agent.config import AgentConfig
from podwire.agent.mirror import Mirror
from podwire.agent.mirrorpod import MIRROR, labels_of, name_of, namespace_of
from podwire.client.api import ApiClient
from podwire.client.informer import Informer
from podwire.model.addr import IPAddress
from podwire.model.cni import LABELS
from podwire.model.meta import Json
from podwire.model.objects import Pod
from podwire.model.resources import PODS
from podwire.store.memory import MemoryStore
from podwire.wire.cni import parse_request

IPS: tuple[IPAddress, ...] = (ipaddress.ip_address("10.244.1.7"), ipaddress.ip_address("fd00:10:244:1::7"))
CONFIG = AgentConfig(
    node_name="host-1",
    node_ips=(ipaddress.ip_address("198.18.7.1"),),
    cluster_cidrs=(),
    service_cidrs=(),
    state_dir=Path("/nowhere"),
    mirror=True,
)


def record(container: str = "c1", **fields: Any) -> AttachmentRecord:
    defaults = {"ifname": "eth0", "network": "podwire", "since": "", "boot": "b", "name": "web", "namespace": "web"}
    return AttachmentRecord(container=container, **(defaults | fields))


class Node:
    """The mirror of one agent's life."""

    def __init__(self, client: ApiClient, attached: list[AttachmentRecord]) -> None:
        self.informer = Informer(client, PODS, Pod, field_selector="spec.nodeName=host-1", rng=Random(1))
        self.mirror = Mirror(CONFIG, client, self.informer, lambda: datetime.now(UTC), Random(1))
        for one in attached:
            self.mirror.attached(one, IPS)
        self._tasks = [asyncio.create_task(self.informer.run()), asyncio.create_task(self.mirror.run())]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@pytest.fixture
async def cluster() -> AsyncIterator[LiveCluster]:
    store, port = MemoryStore(), free_port()
    async with ApiClient(f"http://127.0.0.1:{port}") as client:
        made = LiveCluster(client, store, port)
        await made.start_server()
        yield made
        await client.close()
        await made.stop_server()
        await store.close()


def is_shown(pods: list[Json], *names: str) -> bool:
    """Exactly these, all of them with their addresses."""
    up = [p["metadata"]["name"] for p in pods if p.get("status", {}).get("podIP")]
    return sorted(up) == sorted(names) and len(pods) == len(names)


async def test_shown_while_attached(cluster: LiveCluster) -> None:
    node = Node(cluster.client, [])
    node.mirror.attached(record(annotations={LABELS: "app=web,tier=front"}, ports=((8080, 80, "TCP", ""),)), IPS)
    (pod,) = await cluster.until(PODS, lambda pods: is_shown(pods, "web-host-1"))
    assert pod["metadata"]["namespace"] == "default"
    assert pod["metadata"]["labels"] == {"app": "web", "tier": "front"}
    assert pod["spec"]["nodeName"] == "host-1"
    assert [entry["ip"] for entry in pod["status"]["podIPs"]] == list(map(str, IPS))
    assert pod["status"]["containerStatuses"][0]["containerID"] == "cni://c1"
    node.mirror.attached(record(), None)
    await cluster.until(PODS, lambda pods: not pods)
    await node.stop()


async def test_what_went_while_the_agent_was_away_goes_and_what_stayed_stays(cluster: LiveCluster) -> None:
    first = Node(cluster.client, [record("c1", name="a"), record("c2", name="b")])
    before = await cluster.until(PODS, lambda pods: is_shown(pods, "a-host-1", "b-host-1"))
    await first.stop()
    second = Node(cluster.client, [record("c2", name="b"), record("c3", name="c")])
    after = await cluster.until(PODS, lambda pods: is_shown(pods, "b-host-1", "c-host-1"))
    uids = {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in before}
    assert {p["metadata"]["name"]: p["metadata"]["uid"] for p in after}["b-host-1"] == uids["b-host-1"]
    await second.stop()


async def test_a_container_made_anew_under_its_old_name(cluster: LiveCluster) -> None:
    node = Node(cluster.client, [record("c1")])
    await cluster.until(PODS, lambda pods: is_shown(pods, "web-host-1"))
    node.mirror.attached(record("c2"), IPS)  # before the end of the first is known
    node.mirror.attached(record("c1"), None)
    await cluster.until(
        PODS, lambda pods: is_shown(pods, "web-host-1") and pods[0]["metadata"]["annotations"][MIRROR] == record("c2").uid
    )
    await node.stop()


async def test_deleted_or_changed_by_somebody_it_comes_again(cluster: LiveCluster) -> None:
    node = Node(cluster.client, [record(annotations={LABELS: "app=web"})])
    (pod,) = await cluster.until(PODS, lambda pods: is_shown(pods, "web-host-1"))
    await cluster.client.delete(PODS, "web-host-1", "default")
    await cluster.until(
        PODS, lambda pods: is_shown(pods, "web-host-1") and pods[0]["metadata"]["uid"] != pod["metadata"]["uid"]
    )
    await cluster.client.patch(PODS, "web-host-1", {"metadata": {"labels": {"app": "db", "x": "y"}}}, "default")
    await cluster.until(PODS, lambda pods: [p["metadata"].get("labels") for p in pods] == [{"app": "web"}])
    await node.stop()


async def test_without_the_api_it_is_shown_later(cluster: LiveCluster) -> None:
    await cluster.stop_server()
    node = Node(cluster.client, [record()])
    await cluster.start_server()
    await cluster.until(PODS, lambda pods: is_shown(pods, "web-host-1"))
    await cluster.stop_server()
    node.mirror.attached(record("c9", name="late"), IPS)
    node.mirror.attached(record(), None)
    await cluster.start_server()
    await cluster.until(PODS, lambda pods: is_shown(pods, "late-host-1"))
    await node.stop()


async def test_the_engines_namespace_where_the_api_has_it(cluster: LiveCluster) -> None:
    node = Node(cluster.client, [record("c1", name="a", namespace="kube-public"), record("c2", name="b", namespace="none")])
    pods = await cluster.until(PODS, lambda pods: is_shown(pods, "a-host-1", "b-host-1"))
    assert {p["metadata"]["name"]: p["metadata"]["namespace"] for p in pods} == {
        "a-host-1": "kube-public",
        "b-host-1": "default",
    }
    await node.stop()


def test_names_and_namespaces() -> None:
    assert name_of(record(name="My_Web.1"), "n") == "my-web-1-n"
    assert name_of(record(name="", container="0123456789abcdef"), "n") == "0123456789ab-n"
    assert name_of(record(ifname="net1"), "n") == "web-net1-n"
    assert len(name_of(record(name="x" * 300), "node")) <= 253
    assert namespace_of(record(namespace="shop")) == "shop"
    assert namespace_of(record()) == namespace_of(record(namespace="")) == "default"


def test_labels_that_are_none_are_left_out() -> None:
    text = "app=web, bad key=x,tier=,example.com/a=b,-x=y,novalue,long=" + "x" * 64
    assert labels_of(record(annotations={LABELS: text})) == {"app": "web", "tier": "", "example.com/a": "b"}


async def test_a_kubelets_containers_are_not_shown_twice(cluster: LiveCluster) -> None:
    spec = {"nodeName": "host-1", "containers": [{"name": "c", "image": "i"}]}
    made = await cluster.client.create(PODS, {"metadata": {"name": "real", "namespace": "default"}, "spec": spec})
    node = Node(cluster.client, [record("c1", name="a", args={"K8S_POD_UID": made["metadata"]["uid"]})])
    node.mirror.attached(record("c2", name="b", args={"K8S_POD_UID": "hash"}), IPS)
    node.mirror.attached(record("c3", name="c", args={"K8S_POD_UID": "whatever a CRI client says"}), IPS)
    # A kubelet tells the API of a static pod when that runs already.
    await cluster.until(PODS, lambda pods: {"b-host-1", "c-host-1"} <= {p["metadata"]["name"] for p in pods})
    static = {"name": "static", "namespace": "default", "annotations": {MIRROR: "hash"}}
    await cluster.client.create(PODS, {"metadata": static, "spec": spec})
    await cluster.until(PODS, lambda pods: {p["metadata"]["name"] for p in pods} == {"real", "static", "c-host-1"})
    await node.stop()


def test_labels_from_what_engines_say() -> None:
    environment = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c", "CNI_NETNS": "/n", "CNI_IFNAME": "eth0", "CNI_ARGS": ""}
    config = b"""{"cniVersion": "1.0.0", "name": "podwire", "type": "podwire",
        "args": {"cni": {"labels": [{"key": "app", "value": "web"}]}},
        "runtimeConfig": {"aliases": {"podwire": ["0123456789ab", "tier=front"], "other": ["a=b"]},
                          "io.kubernetes.cri.pod-annotations": {"podwire.io/labels": "x=y", "other": "z"}}}"""
    request = parse_request(environment, config)
    assert request.annotations == {LABELS: "x=y,app=web,tier=front", "other": "z"}
