from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podwire.controllers.placement import host_ports, place_pods, tolerates
from podwire.model.objects import Node, Pod, Taint, Toleration

if TYPE_CHECKING:
    from podwire.model.meta import Json


def node(name: str, *, ready: bool = True, labels: dict[str, str] | None = None, pods: int = 110, **spec: Any) -> Node:
    document = {
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name} | (labels or {})},
        "spec": spec,
        "status": {
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
            "allocatable": {"pods": str(pods)},
        },
    }
    return msgspec.convert(document, Node)


def pod(name: str, *, owner: str = "", labels: dict[str, str] | None = None, **spec: Any) -> Pod:
    meta: Json = {"name": name, "namespace": "shop", "labels": labels or {}}
    if owner:
        meta["ownerReferences"] = [{"apiVersion": "v1", "kind": "X", "name": owner, "uid": owner, "controller": True}]
    return msgspec.convert({"metadata": meta, "spec": spec}, Pod)


def where(pods: list[Pod], nodes: list[Node], running: list[Pod] | None = None) -> list[str]:
    return [placement.node for placement in place_pods(pods, nodes, running or [])]


def why(one: Pod, *nodes: Node, running: list[Pod] | None = None) -> str:
    (placement,) = place_pods([one], nodes, running or [])
    assert not placement.node
    return placement.reason


@settings(deadline=None)
@given(st.integers(1, 6), st.lists(st.sampled_from("abc"), max_size=40))
def test_each_owners_pods_are_spread_evenly(nodes: int, owners: list[str]) -> None:
    pods = [pod(f"p{i}", owner=owner) for i, owner in enumerate(owners)]
    places = where(pods, [node(f"n{i}") for i in range(nodes)])
    assert all(places)
    for owner in set(owners):
        counts = Counter(place for place, of in zip(places, owners, strict=True) if of == owner)
        spread = [counts.get(f"n{i}", 0) for i in range(nodes)]
        assert max(spread) - min(spread) <= 1


def test_pods_that_run_already_count() -> None:
    running = [pod("old", owner="web", nodeName="n1")]
    assert where([pod("new", owner="web")], [node("n1"), node("n2")], running) == ["n2"]
    assert where([pod("other", owner="db")], [node("n1"), node("n2")], running) == ["n2"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (node("n1", ready=False), "1 node(s) were not ready"),
        (node("n1", unschedulable=True), "1 node(s) were unschedulable"),
        (node("n1", taints=[{"key": "k", "value": "v", "effect": "NoSchedule"}]), "1 node(s) had untolerated taint {k: v}"),
        (node("n1", pods=0), "1 Too many pods"),
    ],
)
def test_why_a_node_does_not_fit(bad: Node, reason: str) -> None:
    assert why(pod("p"), bad) == f"0/1 nodes are available: {reason}."
    assert where([pod("p")], [bad, node("n2")]) == ["n2"]


def test_no_nodes_at_all() -> None:
    assert why(pod("p")) == "no nodes available to schedule pods"


def test_reasons_are_counted() -> None:
    text = why(pod("p", nodeSelector={"a": "b"}), node("n1"), node("n2"), node("n3", ready=False))
    assert text == "0/3 nodes are available: 1 node(s) were not ready, 2 node(s) didn't match Pod's node affinity/selector."


def test_a_preferred_taint_does_not_forbid() -> None:
    assert where([pod("p")], [node("n1", taints=[{"key": "k", "effect": "PreferNoSchedule"}])]) == ["n1"]


@pytest.mark.parametrize(
    ("toleration", "expected"),
    [
        (Toleration(key="k", value="v"), True),
        (Toleration(key="k", value="x"), False),
        (Toleration(key="k", operator="Exists"), True),
        (Toleration(operator="Exists"), True),
        (Toleration(key="k", operator="Exists", effect="NoSchedule"), True),
        (Toleration(key="k", operator="Exists", effect="NoExecute"), False),
        (Toleration(key="j", operator="Exists"), False),
    ],
)
def test_tolerations(toleration: Toleration, expected: bool) -> None:
    assert tolerates([toleration], Taint(key="k", value="v", effect="NoSchedule")) is expected


def test_host_ports_of_one_batch_do_not_meet() -> None:
    container = {"name": "c", "ports": [{"containerPort": 80, "hostPort": 8080}]}
    pods = [pod(f"p{i}", containers=[container]) for i in range(3)]
    assert where(pods, [node("n1"), node("n2")]) == ["n1", "n2", ""]
    udp = {"name": "c", "ports": [{"containerPort": 80, "hostPort": 8080, "protocol": "UDP"}]}
    assert where([pods[0], pod("udp", containers=[udp])], [node("n1")]) == ["n1", "n1"]


def test_host_ports_on_different_addresses_do_not_clash_but_all_addresses_do() -> None:
    def at(name: str, address: str) -> Pod:
        return pod(name, containers=[{"name": "c", "ports": [{"containerPort": 1, "hostPort": 1, "hostIP": address}]}])

    assert where([at("a", "10.0.0.1"), at("b", "10.0.0.2")], [node("n1")]) == ["n1", "n1"]
    assert where([at("a", "10.0.0.1"), at("b", "0.0.0.0")], [node("n1")]) == ["n1", ""]


def test_host_network_claims_its_container_ports() -> None:
    assert host_ports(pod("p", hostNetwork=True, containers=[{"name": "c", "ports": [{"containerPort": 80}]}])) == {
        ("", "TCP", 80)
    }


def test_hard_topology_spread() -> None:
    rule = {"maxSkew": 1, "topologyKey": "zone", "labelSelector": {"matchLabels": {"app": "a"}}}
    nodes = [node("n1", labels={"zone": "x"}), node("n2", labels={"zone": "x"}), node("n3", labels={"zone": "y"}, pods=1)]
    pods = [pod(f"p{i}", labels={"app": "a"}, topologySpreadConstraints=[rule]) for i in range(4)]
    # Zone y is full with one pod, so zone x may have two at most.
    assert sorted(where(pods, nodes)) == ["", "n1", "n2", "n3"]
    soft = rule | {"whenUnsatisfiable": "ScheduleAnyway"}
    pods = [pod(f"p{i}", labels={"app": "a"}, topologySpreadConstraints=[soft]) for i in range(4)]
    assert "" not in where(pods, nodes)
