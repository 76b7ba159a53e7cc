from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podwire.controllers.documents import WorkloadPod
from podwire.controllers.placement import host_ports, place_pods, tolerates
from podwire.model.meta import Json
from podwire.model.objects import Node, Taint, Toleration


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


def pod(name: str, *, owner: str = "", labels: dict[str, str] | None = None, **spec: Any) -> WorkloadPod:
    meta: Json = {"name": name, "namespace": "shop", "labels": labels or {}}
    if owner:
        meta["ownerReferences"] = [{"apiVersion": "v1", "kind": "X", "name": owner, "uid": owner, "controller": True}]
    return msgspec.convert({"metadata": meta, "spec": spec}, WorkloadPod)


def where(pods: list[WorkloadPod], nodes: list[Node], running: list[WorkloadPod] | None = None) -> list[str]:
    return [placement.node for placement in place_pods(pods, nodes, running or [])]


def why(one: WorkloadPod, *nodes: Node, running: list[WorkloadPod] | None = None) -> str:
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
    def at(name: str, address: str) -> WorkloadPod:
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


REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"
HOST = "kubernetes.io/hostname"


def node_affinity(*expressions: Json) -> Json:
    return {"nodeAffinity": {REQUIRED: {"nodeSelectorTerms": [{"matchExpressions": list(expressions)}]}}}


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ({"key": "disk", "operator": "In", "values": ["ssd"]}, "n1"),
        ({"key": "disk", "operator": "NotIn", "values": ["ssd"]}, "n2"),
        ({"key": "disk", "operator": "Exists"}, "n1"),
        ({"key": "disk", "operator": "DoesNotExist"}, "n2"),
        ({"key": "cores", "operator": "Gt", "values": ["4"]}, "n2"),
        ({"key": "cores", "operator": "Lt", "values": ["4"]}, "n1"),
        ({"key": "nothing", "operator": "Gt", "values": ["4"]}, ""),
    ],
)
def test_node_affinity(expression: Json, expected: str) -> None:
    nodes = [node("n1", labels={"disk": "ssd", "cores": "2"}), node("n2", labels={"cores": "8"})]
    assert where([pod("p", affinity=node_affinity(expression))], nodes) == [expected]


def test_node_affinity_by_field_and_an_empty_term() -> None:
    field = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n2"]}]}
    affinity = {"nodeAffinity": {REQUIRED: {"nodeSelectorTerms": [{}, field]}}}
    assert where([pod("p", affinity=affinity)], [node("n1"), node("n2")]) == ["n2"]


def test_a_preferred_node_is_chosen_while_there_is_one() -> None:
    term = {"weight": 5, "preference": {"matchExpressions": [{"key": "disk", "operator": "Exists"}]}}
    pods = [pod(f"p{i}", owner="web", affinity={"nodeAffinity": {PREFERRED: [term]}}) for i in range(2)]
    assert where(pods, [node("n1"), node("n2", labels={"disk": "ssd"}, pods=1)]) == ["n2", "n1"]


def term(app: str, key: str = HOST) -> Json:
    return {"topologyKey": key, "labelSelector": {"matchLabels": {"app": app}}}


def test_required_anti_affinity_keeps_a_batch_apart_and_holds_both_ways() -> None:
    apart = {"podAntiAffinity": {REQUIRED: [term("a")]}}
    pods = [pod(f"p{i}", labels={"app": "a"}, affinity=apart) for i in range(3)]
    assert where(pods, [node("n1"), node("n2")]) == ["n1", "n2", ""]
    shy = pod("shy", labels={"app": "b"}, nodeName="n1", affinity=apart)
    assert where([pod("p", labels={"app": "a"})], [node("n1"), node("n2")], [shy]) == ["n2"]
    assert "didn't match pod anti-affinity rules" in why(pod("p", labels={"app": "a"}), node("n1"), running=[shy])


def test_required_affinity_goes_where_the_others_are_and_the_first_may_begin() -> None:
    together = {"podAffinity": {REQUIRED: [term("a", "zone")]}}
    nodes = [node("n1", labels={"zone": "x"}), node("n2", labels={"zone": "y"}), node("n3", labels={"zone": "y"}), node("n4")]
    pods = [pod(f"p{i}", labels={"app": "a"}, affinity=together) for i in range(3)]
    assert where(pods, nodes, [pod("old", labels={"app": "a"}, nodeName="n2")]) == ["n3", "n2", "n3"]
    assert where(pods, nodes) == ["n1", "n1", "n1"]
    assert "didn't match pod affinity rules" in why(pod("p", labels={"app": "b"}, affinity=together), *nodes)


def test_preferred_pods() -> None:
    running = [pod("cache", labels={"app": "cache"}, nodeName="n2")]
    near = {"podAffinity": {PREFERRED: [{"weight": 1, "podAffinityTerm": term("cache")}]}}
    far = {"podAntiAffinity": {PREFERRED: [{"weight": 1, "podAffinityTerm": term("cache")}]}}
    nodes = [node("n1"), node("n2"), node("n3")]
    assert where([pod("p", affinity=near)], nodes, running) == ["n2"]
    assert where([pod("p", affinity=far)], nodes, [*running, *(pod(f"o{n}", nodeName="n1") for n in range(3))]) == ["n3"]
    assert where([pod("p", affinity=far)], [node("n2")], running) == ["n2"]
