from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podwire.controllers.documents import SliceDoc
from podwire.controllers.slices import (
    HEADLESS,
    LAST_CHANGE,
    MANAGER,
    MAX_ENDPOINTS,
    SERVICE_NAME,
    SliceWrites,
    endpoint_of,
    families,
    plan_slices,
    resolved_ports,
)
from podwire.model.meta import Json
from podwire.model.objects import Pod, Service


def service(**spec: Any) -> Service:
    ports = [{"name": "http", "port": 80, "targetPort": "http"}]
    document = {
        "metadata": {"name": "web", "namespace": "shop", "uid": "svc", "labels": {"team": "a"}},
        "spec": {"selector": {"app": "web"}, "ports": ports, "ipFamilies": ["IPv4"]} | spec,
    }
    return msgspec.convert(document, Service)


def pod(number: int, *, ready: bool = True, port: int = 8080, node: str = "n1", **status: Any) -> Pod:
    ips = [{"ip": f"10.0.{number >> 8}.{number & 255}"}, {"ip": f"fd00::{number:x}"}]
    condition = {"type": "Ready", "status": "True" if ready else "False"}
    meta: Json = {"name": f"web-{number:05}", "namespace": "shop", "uid": f"pod-{number}", "labels": {"app": "web"}}
    if status.pop("deleted", False):
        meta["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    document = {
        "metadata": meta,
        "spec": {"nodeName": node, "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": port}]}]}
        | status.pop("spec", {}),
        "status": {"phase": "Running", "podIPs": ips, "conditions": [condition]} | status,
    }
    return msgspec.convert(document, Pod)


def applied(existing: list[SliceDoc], writes: SliceWrites) -> list[SliceDoc]:
    """What the API server has after the writes."""
    deleted = {item.metadata.name for item in writes.delete}
    patches = {item.metadata.name: patch for item, patch in writes.update}
    result = []
    for item in existing:
        if item.metadata.name in deleted:
            continue
        document: Json = msgspec.to_builtins(item)
        patch = patches.get(item.metadata.name)
        if patch is not None:
            labels = {**document["metadata"].get("labels", {}), **patch["metadata"]["labels"]}
            document["metadata"]["labels"] = {k: v for k, v in labels.items() if v is not None}
            document |= {"endpoints": patch["endpoints"], "ports": patch["ports"]}
        result.append(msgspec.convert(document, SliceDoc))
    taken = {item.metadata.name for item in result}
    for document in writes.create:
        name = next(n for i in range(10_000) if (n := f"web-{i}") not in taken)
        taken.add(name)
        result.append(msgspec.convert({**document, "metadata": document["metadata"] | {"name": name}}, SliceDoc))
    return result


def plan(existing: list[SliceDoc], pods: list[Pod], of: Service | None = None) -> SliceWrites:
    return plan_slices(of or service(), pods, existing, {"n1": "z1"}, "now")


def addresses(slices: list[SliceDoc]) -> list[str]:
    return sorted(endpoint["addresses"][0] for item in slices for endpoint in item.endpoints)


@st.composite
def many_pods(draw: st.DrawFn) -> list[Pod]:
    """Up to 260 in a row, every so many with something else: they fill slices, which lists drawn one by one hardly do."""
    first = draw(st.integers(1, 150))
    other_port, unready, leaving, elsewhere = draw(st.tuples(*[st.sampled_from((2, 7, 1000))] * 4))
    return [
        pod(
            number,
            ready=number % unready != 0,
            port=9090 if number % other_port == 0 else 8080,
            node="n2" if number % elsewhere == 0 else "n1",
            deleted=number % leaving == 0,
        )
        for number in range(first, first + draw(st.integers(0, 260)))
    ]


@settings(deadline=None, max_examples=40)
@given(st.lists(many_pods(), min_size=1, max_size=4))
def test_whatever_was_there_before_the_slices_end_up_right_and_stay(histories: list[list[Pod]]) -> None:
    slices: list[SliceDoc] = []
    for pods in histories:
        slices = applied(slices, plan(slices, pods))
        assert addresses(slices) == sorted(p.ips[0] for p in pods)
        assert all(len(item.endpoints) <= MAX_ENDPOINTS for item in slices)
        by_ip = {p.ips[0]: p for p in pods}
        for item in slices:
            for endpoint in item.endpoints:
                of = by_ip[endpoint["addresses"][0]]
                assert endpoint == endpoint_of(service(), of, "IPv4", {"n1": "z1"})
                assert tuple(tuple(sorted(port.items())) for port in item.ports) == resolved_ports(service(), of)
        assert slices, "a Service without endpoints keeps one empty slice"
        assert not plan(slices, pods)


def test_one_endpoint_more_is_one_write() -> None:
    pods = [pod(n) for n in range(1, 251)]
    slices = applied([], plan([], pods))
    assert sorted(len(item.endpoints) for item in slices) == [50, 100, 100]
    writes = plan(slices, [*pods, pod(300)])
    assert (len(writes.create), len(writes.update), len(writes.delete)) == (0, 1, 0)
    writes = plan(slices, pods[1:])
    assert (len(writes.create), len(writes.update), len(writes.delete)) == (0, 1, 0)


@pytest.mark.parametrize(
    ("before", "after", "writes"),
    [
        (range(150), range(100), (0, 0, 1)),  # a slice that has lost all of its endpoints goes
        (range(150), range(1, 151), (0, 1, 0)),  # who is new takes the place of who left
        (range(150), range(210), (1, 0, 0)),  # too many for any slice that is there: one of their own, others untouched
        (range(150), range(200), (0, 1, 0)),
        (range(150), range(200, 350), (0, 2, 0)),  # slices are used again
        (range(150), (*range(99), *range(200, 252)), (0, 2, 0)),
    ],
    ids=lambda value: str(value)[:20],
)
def test_as_few_slices_as_possible_are_written(
    before: Iterable[int], after: Iterable[int], writes: tuple[int, int, int]
) -> None:
    slices = applied([], plan([], [pod(n) for n in before]))
    found = plan(slices, [pod(n) for n in after])
    assert found
    assert (len(found.create), len(found.update), len(found.delete)) == writes
    assert addresses(applied(slices, found)) == sorted(pod(n).ips[0] for n in after)


def test_conditions_of_endpoints() -> None:
    def conditions(of: Pod, **spec: Any) -> Json:
        endpoint = endpoint_of(service(**spec), of, "IPv4", {})
        assert endpoint is not None
        result: Json = endpoint["conditions"]
        return result

    assert conditions(pod(1)) == {"ready": True, "serving": True, "terminating": False}
    assert conditions(pod(1, ready=False)) == {"ready": False, "serving": False, "terminating": False}
    assert conditions(pod(1, deleted=True)) == {"ready": False, "serving": True, "terminating": True}
    assert conditions(pod(1, ready=False, deleted=True)) == {"ready": False, "serving": False, "terminating": True}
    assert conditions(pod(1, ready=False), publishNotReadyAddresses=True)["ready"]
    assert endpoint_of(service(), pod(1, phase="Succeeded"), "IPv4", {}) is None
    assert endpoint_of(service(), pod(1, podIPs=[]), "IPv4", {}) is None


def test_an_endpoint_shows_where_its_pod_is() -> None:
    endpoint = endpoint_of(service(), pod(7, spec={"hostname": "db-0", "subdomain": "web"}), "IPv6", {"n1": "z1"})
    assert endpoint is not None
    assert endpoint["addresses"] == ["fd00::7"]
    assert (endpoint["nodeName"], endpoint["zone"], endpoint["hostname"]) == ("n1", "z1", "db-0")
    assert endpoint["targetRef"] == {"kind": "Pod", "namespace": "shop", "name": "web-00007", "uid": "pod-7"}
    nowhere = endpoint_of(service(), pod(7, node="", spec={"subdomain": "web"}), "IPv4", {"": "z1"})
    assert nowhere is not None
    assert nowhere.keys() == {"addresses", "conditions", "targetRef"}


@pytest.mark.parametrize(
    ("wish", "hints"),
    [
        ("PreferClose", {"forZones": [{"name": "z1"}]}),
        ("PreferSameZone", {"forZones": [{"name": "z1"}]}),
        ("PreferSameNode", {"forZones": [{"name": "z1"}], "forNodes": [{"name": "n1"}]}),
        (None, None),
    ],
)
def test_traffic_distribution_becomes_hints_of_ready_endpoints(wish: str | None, hints: Json | None) -> None:
    of = service(trafficDistribution=wish)
    endpoint = endpoint_of(of, pod(1), "IPv4", {"n1": "z1"})
    assert endpoint is not None
    assert endpoint.get("hints") == hints
    unready = endpoint_of(of, pod(1, ready=False), "IPv4", {"n1": "z1"})
    assert unready is not None
    assert "hints" not in unready


def test_target_ports() -> None:
    def ports(of: Service, at: Pod) -> list[tuple[str, int]]:
        return [(dict(port)["name"], dict(port)["port"]) for port in resolved_ports(of, at)]

    several = [
        {"name": "named", "port": 80, "targetPort": "http"},
        {"name": "number", "port": 81, "targetPort": 9000},
        {"name": "same", "port": 82},
        {"name": "unknown", "port": 83, "targetPort": "nobody"},
        {"name": "udp", "port": 84, "targetPort": "http", "protocol": "UDP"},
    ]
    assert ports(service(ports=several), pod(1)) == [("named", 8080), ("number", 9000), ("same", 82)]
    sidecar = {"name": "s", "restartPolicy": "Always", "ports": [{"name": "nobody", "containerPort": 7}]}
    assert ("unknown", 7) in ports(service(ports=several), pod(1, spec={"initContainers": [sidecar]}))
    assert ports(service(ports=[], clusterIP="None"), pod(1)) == []
    assert ports(service(ports=[{"name": "empty", "port": 85, "targetPort": ""}]), pod(1)) == [("empty", 85)]
    spoken = service(ports=[{"name": "http", "port": 80, "appProtocol": "kubernetes.io/h2c"}])
    assert [dict(port).get("appProtocol") for of in (service(), spoken) for port in resolved_ports(of, pod(1))] == [
        None,
        "kubernetes.io/h2c",
    ]


def test_dual_stack_has_slices_of_both_families_and_a_dropped_family_loses_them() -> None:
    both = service(ipFamilies=["IPv6", "IPv4"])
    slices = applied([], plan([], [pod(1)], both))
    assert sorted((s.address_type, s.endpoints[0]["addresses"][0]) for s in slices) == [
        ("IPv4", "10.0.0.1"),
        ("IPv6", "fd00::1"),
    ]
    slices = applied(slices, plan(slices, [pod(1)], service()))
    assert [s.address_type for s in slices] == ["IPv4"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"clusterIP": "10.96.0.1", "clusterIPs": ["fd00::1", "10.96.0.1"]}, ("IPv6", "IPv4")),
        ({"clusterIP": "fd00::1"}, ("IPv6",)),
        ({"clusterIP": "None"}, ("IPv4",)),
        ({}, ("IPv4",)),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_service_that_names_no_families_has_those_of_its_addresses(spec: Json, expected: tuple[str, ...]) -> None:
    assert families(service(ipFamilies=[], **spec)) == expected


def test_what_others_wrote_and_means_the_same_stays() -> None:
    (item,) = applied([], plan([], [pod(1)], service(ports=[{"port": 8080}])))
    terse = msgspec.structs.replace(
        item,
        ports=({"port": 8080},),
        metadata=msgspec.structs.replace(item.metadata, owner_references=()),
    )
    assert not plan([terse], [pod(1)], service(ports=[{"port": 8080}]))


def test_labels_that_a_service_lost_are_taken_off_its_slices_and_none_is_called_headless_that_is_not() -> None:
    (item,) = applied([], plan([], [pod(1)]))
    meta = msgspec.structs.replace(item.metadata, resource_version="7")
    of = service()
    of = msgspec.structs.replace(of, metadata=msgspec.structs.replace(of.metadata, labels={HEADLESS: ""}))
    ((_, patch),) = plan([msgspec.structs.replace(item, metadata=meta)], [pod(1)], of).update
    assert patch["metadata"] == {
        "resourceVersion": "7",
        "labels": {"team": None, SERVICE_NAME: "web", "endpointslice.kubernetes.io/managed-by": MANAGER},
        "annotations": {"endpoints.kubernetes.io/last-change-trigger-time": "now"},
    }


def test_labels_and_owner() -> None:
    (document,) = plan([], [pod(1)], service(clusterIP="None")).create
    labels = document["metadata"]["labels"]
    assert labels[SERVICE_NAME] == "web"
    assert labels[HEADLESS] == ""
    assert labels["team"] == "a"
    assert document["metadata"]["annotations"] == {LAST_CHANGE: "now"}
    assert document["metadata"]["ownerReferences"][0]["uid"] == "svc"
    assert (document["metadata"]["namespace"], document["kind"]) == ("shop", "EndpointSlice")
    assert labels["endpointslice.kubernetes.io/managed-by"] == "endpointslice-controller.k8s.io"


def test_slices_of_a_service_that_was_deleted_and_made_anew_are_replaced() -> None:
    old = applied([], plan([], [pod(1)]))
    owner = msgspec.structs.replace(old[0].metadata.owner_references[0], uid="former")
    old = [msgspec.structs.replace(old[0], metadata=msgspec.structs.replace(old[0].metadata, owner_references=(owner,)))]
    writes = plan(old, [pod(1)])
    assert (len(writes.create), writes.delete) == (1, old)


def test_a_changed_target_port_rewrites_the_slice_in_one_step() -> None:
    slices = applied([], plan([], [pod(1), pod(2)]))
    writes = plan(slices, [pod(1, port=9999), pod(2, port=9999)])
    assert (len(writes.create), len(writes.update), len(writes.delete)) == (0, 1, 0)
