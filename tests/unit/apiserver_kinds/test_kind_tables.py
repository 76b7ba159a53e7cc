"""What `kubectl get` prints: columns, rows, ages."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from podwire.apiserver.kinds import REGISTRY
from podwire.apiserver.tables import age, human_duration, partial_metadata_list, table

NOW = datetime(2024, 1, 2, tzinfo=UTC)
CREATED = "2024-01-01T23:59:55Z"


def row(name: str, **parts: Any) -> dict[str, Any]:
    kind = next(k for k in REGISTRY if k.resource.kind == name)
    obj = {"metadata": {"name": "web", "creationTimestamp": CREATED}, **parts}
    obj["metadata"] |= parts.get("meta", {})
    cells = kind.row(obj, NOW)
    assert len(cells) == len(kind.columns)
    return {column.name: cell for column, cell in zip(kind.columns, cells, strict=True)}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "<invalid>"),
        (0, "0s"),
        (119, "119s"),
        (120, "2m"),
        (125, "2m5s"),
        (600, "10m"),
        (10799, "179m"),
        (10800, "3h"),
        (11100, "3h5m"),
        (28800, "8h"),
        (172799, "47h"),
        (172800, "2d"),
        (180000, "2d2h"),
        (8 * 86400, "8d"),
        (2 * 365 * 86400 + 86400, "2y1d"),
        (9 * 365 * 86400, "9y"),
    ],
)
def test_ages_are_written_as_kubectl_does(seconds: int, text: str) -> None:
    assert human_duration(seconds) == text
    assert age((NOW - timedelta(seconds=seconds)).isoformat(), NOW) == text


def running(name: str = "c", **more: Any) -> dict[str, Any]:
    return {"name": name, "ready": True, "restartCount": 0, "state": {"running": {}}, **more}


TWO = {"nodeName": "n1", "containers": [{"name": "c"}, {"name": "d"}]}


@pytest.mark.parametrize(
    ("spec", "status", "ready", "word", "restarts"),
    [
        (TWO, {"phase": "Pending"}, "0/2", "Pending", "0"),
        (TWO, {"phase": "Running", "containerStatuses": [running(), running("d")]}, "2/2", "Running", "0"),
        (
            TWO,
            {
                "phase": "Running",
                "containerStatuses": [
                    running(),
                    {
                        "name": "d",
                        "ready": False,
                        "restartCount": 3,
                        "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                        "lastState": {"terminated": {"finishedAt": "2024-01-01T23:59:00Z"}},
                    },
                ],
            },
            "1/2",
            "CrashLoopBackOff",
            "3 (60s ago)",
        ),
        (
            TWO,
            {
                "phase": "Failed",
                "containerStatuses": [{"name": "c", "state": {"terminated": {"exitCode": 3, "reason": "Error"}}}],
            },
            "0/2",
            "Error",
            "0",
        ),
        (
            TWO,
            {"phase": "Failed", "containerStatuses": [{"name": "c", "state": {"terminated": {"exitCode": 137, "signal": 9}}}]},
            "0/2",
            "Signal:9",
            "0",
        ),
        (
            {"containers": [{"name": "c"}], "initContainers": [{"name": "i"}, {"name": "j"}]},
            {
                "phase": "Pending",
                "initContainerStatuses": [
                    {"name": "i", "state": {"terminated": {"exitCode": 0}}},
                    {"name": "j", "state": {"running": {}}},
                ],
            },
            "0/1",
            "Init:1/2",
            "0",
        ),
        (
            {"containers": [{"name": "c"}], "initContainers": [{"name": "i", "restartPolicy": "Always"}]},
            {"phase": "Running", "initContainerStatuses": [running("i", started=True)], "containerStatuses": [running()]},
            "2/2",
            "Running",
            "0",
        ),
    ],
)
def test_pods(spec: dict[str, Any], status: dict[str, Any], ready: str, word: str, restarts: str) -> None:
    cells = row("Pod", spec=spec, status=status)
    assert (cells["Ready"], cells["Status"], cells["Restarts"], cells["Age"]) == (ready, word, restarts, "5s")


def test_a_pod_on_its_way_out() -> None:
    status = {"phase": "Running", "containerStatuses": [running(), running("d")]}
    assert row("Pod", spec=TWO, status=status, meta={"deletionTimestamp": CREATED})["Status"] == "Terminating"


def test_a_pods_wide_columns() -> None:
    status = {"phase": "Running", "podIP": "10.244.1.2", "podIPs": [{"ip": "10.244.1.2"}, {"ip": "fd00::2"}]}
    cells = row("Pod", spec=TWO, status=status)
    assert [cells[c] for c in ("IP", "Node", "Nominated Node", "Readiness Gates")] == ["10.244.1.2", "n1", "<none>", "<none>"]


@pytest.mark.parametrize(
    ("spec", "status", "cells"),
    [
        ({"type": "ClusterIP", "clusterIP": "10.96.0.1", "ports": [{"port": 443}]}, {}, ("10.96.0.1", "<none>", "443/TCP")),
        ({"type": "ClusterIP", "clusterIP": "None"}, {}, ("None", "<none>", "<none>")),
        (
            {
                "type": "NodePort",
                "clusterIP": "10.96.0.1",
                "ports": [{"port": 80, "nodePort": 30080}, {"port": 53, "protocol": "UDP"}],
            },
            {},
            ("10.96.0.1", "<none>", "80:30080/TCP,53/UDP"),
        ),
        ({"type": "LoadBalancer", "clusterIP": "10.96.0.1"}, {}, ("10.96.0.1", "<pending>", "<none>")),
        (
            {"type": "LoadBalancer", "clusterIP": "10.96.0.1"},
            {"loadBalancer": {"ingress": [{"ip": "203.0.113.1"}, {"ip": "2001:db8::1"}]}},
            ("10.96.0.1", "203.0.113.1,2001:db8::1", "<none>"),
        ),
        ({"type": "ExternalName", "externalName": "example.com"}, {}, ("<none>", "example.com", "<none>")),
    ],
)
def test_services(spec: dict[str, Any], status: dict[str, Any], cells: tuple[str, str, str]) -> None:
    found = row("Service", spec=spec, status=status)
    assert (found["Cluster-IP"], found["External-IP"], found["Port(s)"]) == cells


def test_deployments_and_replica_sets() -> None:
    template = {"spec": {"containers": [{"name": "a", "image": "x"}, {"name": "b", "image": "y"}]}}
    spec = {"replicas": 3, "selector": {"matchLabels": {"app": "web"}}, "template": template}
    cells = row("Deployment", spec=spec, status={"readyReplicas": 2, "updatedReplicas": 3, "availableReplicas": 2})
    assert [cells[c] for c in ("Ready", "Up-to-date", "Available")] == ["2/3", 3, 2]
    assert [cells[c] for c in ("Containers", "Images", "Selector")] == ["a,b", "x,y", "app=web"]
    cells = row("ReplicaSet", spec=spec, status={"replicas": 3, "readyReplicas": 1})
    assert [cells[c] for c in ("Desired", "Current", "Ready")] == [3, 3, 1]


def test_nodes() -> None:
    status = {
        "conditions": [{"type": "Ready", "status": "True"}],
        "addresses": [{"type": "InternalIP", "address": "198.18.0.10"}],
        "nodeInfo": {"kubeletVersion": "v1.36.0", "osImage": "podwire", "kernelVersion": "6.18"},
    }
    labels = {"node-role.kubernetes.io/worker": "", "node-role.kubernetes.io/edge": ""}
    cells = row("Node", spec={"unschedulable": True}, status=status, meta={"labels": labels})
    assert [cells[c] for c in ("Status", "Roles", "Version")] == ["Ready,SchedulingDisabled", "edge,worker", "v1.36.0"]
    assert [cells[c] for c in ("Internal-IP", "External-IP", "OS-Image")] == ["198.18.0.10", "<none>", "podwire"]
    assert row("Node")["Status"] == "Unknown"


def test_slices_leases_events_and_data() -> None:
    endpoints = [{"addresses": [f"10.0.0.{n}"]} for n in range(5)]
    cells = row("EndpointSlice", addressType="IPv4", endpoints=endpoints, ports=[{"port": 80}])
    assert (cells["Ports"], cells["Endpoints"]) == ("80", "10.0.0.0,10.0.0.1,10.0.0.2 + 2 more...")
    assert row("EndpointSlice", addressType="IPv4")["Endpoints"] == "<unset>"
    assert row("Lease", spec={"holderIdentity": "n1"})["Holder"] == "n1"
    assert row("Secret", type="Opaque", data={"a": "MQ=="})["Data"] == 1
    assert row("ConfigMap", data={"a": "1"}, binaryData={"b": "MQ=="})["Data"] == 2
    event = {"involvedObject": {"kind": "Pod", "name": "p"}, "message": "hello\n", "lastTimestamp": CREATED, "count": 4}
    cells = row("Event", **event)
    assert [cells[c] for c in ("Last Seen", "Object", "Message", "Count")] == ["5s", "pod/p", "hello", 4]


def test_a_table_carries_what_the_client_asked_for() -> None:
    kind = next(k for k in REGISTRY if k.resource.kind == "ConfigMap")
    obj = {"metadata": {"name": "web", "creationTimestamp": CREATED}, "data": {"a": "1"}}
    made = table(kind, [obj], {"resourceVersion": "7", "continue": "c", "x": 1}, NOW)
    assert made["metadata"] == {"resourceVersion": "7", "continue": "c"}
    assert [c["name"] for c in made["columnDefinitions"]] == ["Name", "Data", "Age"]
    assert made["rows"] == [
        {
            "cells": ["web", 1, "5s"],
            "object": {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": obj["metadata"]},
        }
    ]
    assert table(kind, [obj], {}, NOW, include="Object")["rows"][0]["object"] == obj
    assert table(kind, [obj], {}, NOW, include="None")["rows"][0]["object"] is None
    assert partial_metadata_list([obj], {"resourceVersion": "7"})["items"][0]["metadata"] == obj["metadata"]
