"""A Service's pods are replaced under traffic: no client notices."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench.rolling import clients
from labcommand import Lab, until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]

PODS = 30
NAME = "rolling"


def objects() -> list[dict[str, Any]]:
    container = {
        "name": "web",
        "image": "test/web:1",
        "ports": [{"containerPort": 8080}],
        "lifecycle": {"preStop": {"sleep": {"seconds": 3}}},
    }
    labels, meta = {"app": NAME}, {"name": NAME, "namespace": NAME}
    template = {"metadata": {"labels": labels}, "spec": {"containers": [container]}}
    strategy = {"rollingUpdate": {"maxSurge": "50%", "maxUnavailable": 0}}
    spec = {"replicas": PODS, "selector": {"matchLabels": labels}, "strategy": strategy, "template": template}
    ports = [{"port": 80, "targetPort": 8080}]
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAME}},
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": meta, "spec": spec},
        {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": {"selector": labels, "ports": ports}},
    ]


@pytest.fixture
def cluster_ip(lab: Lab) -> Iterator[str]:
    lab.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects()}))
    lab.kubectl("rollout", "status", "-n", NAME, f"deployment/{NAME}", "--timeout=60s")
    lab.podwire.ok("wait", "--name", lab.name, "--programmed", f"svc/{NAME}", "-n", NAME)
    yield lab.kubectl("get", "service", "-n", NAME, NAME, "-o", "jsonpath={.spec.clusterIP}")
    lab.kubectl("delete", "namespace", NAME, "--wait=true")


def test_a_rolling_update_fails_no_connection(lab: Lab, cluster_ip: str, tmp_path: Path) -> None:
    def alive() -> list[str]:
        found = json.loads(lab.kubectl("get", "pods", "-n", NAME, "-o", "json"))["items"]
        return [pod["spec"]["containers"][0]["image"] for pod in found]

    nodes, environment = ("node-1", "node-2", "node-3"), lab.podwire.environment
    with clients(lab.name, nodes, cluster_ip, tmp_path / "stop", environment) as outcomes:
        lab.kubectl("set", "image", "-n", NAME, f"deployment/{NAME}", "web=test/web:2")
        lab.kubectl("rollout", "status", "-n", NAME, f"deployment/{NAME}", "--timeout=60s")
        until(lambda: alive() == ["test/web:2"] * PODS, 30)
    assert [outcome["failed"] for outcome in outcomes] == [{}, {}, {}]
    assert all(len(outcome["answered"]) > 20 for outcome in outcomes)
