"""What nodes acknowledge, as users see it."""

import json

import pytest
from labcommand import Lab

pytestmark = [pytest.mark.lab, pytest.mark.timeout(90)]


def test_status_shows_every_node(lab: Lab) -> None:
    lab.podwire.ok("wait", "--name", lab.name, "--programmed", "svc/kubernetes")
    rows = json.loads(lab.podwire.ok("status", "services", "--name", lab.name, "-o", "json"))
    found = {(row["namespace"], row["name"]): row for row in rows}
    assert found["default", "kubernetes"]["programmed"] == ["node-1", "node-2", "node-3"]
    assert all(not row["late"] for row in rows)
    assert "3/3" in lab.podwire.ok("status", "services", "--name", lab.name)
    assert "3/3" in lab.podwire.ok("status", "services", "--kubeconfig", lab.kubeconfig)


def test_what_cannot_be_waited_for_is_said(lab: Lab) -> None:
    done = lab.podwire("wait", "--name", lab.name, "--programmed", "svc/nobody")
    assert done.status == 1
    assert "there is no Service default/nobody" in done.err
    for nonsense in ("deploy/web", "", "svc/"):
        assert lab.podwire("wait", "--name", lab.name, "--programmed", nonsense).status == 2


def test_a_namespace_without_services_is_told_from_none(lab: Lab) -> None:
    done = lab.podwire("status", "services", "--name", lab.name, "-n", "kube-public")
    assert (done.status, done.out, done.err) == (0, "", "no Services in namespace kube-public\n")
    done = lab.podwire("status", "services", "--name", lab.name, "-n", "nope")
    assert (done.status, done.out) == (1, "")
    assert "there is no namespace nope" in done.err
