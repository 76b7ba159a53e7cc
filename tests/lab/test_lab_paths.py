"""`podwire paths` and `podwire demo`: every path works, is shown, and the exit status says so."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from labcommand import Lab, Podwire

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]

PATHS = [
    "container→container",
    "pod→pod, one node",
    "pod→pod, across nodes",
    "pod→Service",
    "outside→NodePort",
    "outside→LoadBalancer",
    "outside→hostPort",
    "outside→hostNetwork",
]


def check(report: Any) -> None:
    assert {row["path"] for row in report["paths"]} == set(PATHS)
    for row in report["paths"]:
        assert row["ok"], row
        assert row["reason"] == ""
        assert row["rtt_ms"] > 0
        assert row["hops"], row
        assert set(row) == {"path", "from", "to", "hops", "rtt_ms", "ok", "reason"}
    across = [row for row in report["paths"] if row["path"] == "pod→pod, across nodes"]
    assert all(any(hop["encapsulation"] for hop in row["hops"]) for row in across)
    balanced = [row for row in report["paths"] if row["path"] == "outside→LoadBalancer"]
    assert all("balancer" in {hop["place"] for hop in row["hops"]} for row in balanced)


@pytest.mark.parametrize("ip_family", ["dual", "ipv4", "ipv6"])
def test_demo_shows_every_path_and_leaves_nothing(podwire: Podwire, ip_family: str) -> None:
    done = podwire("demo", "--ip-family", ip_family, "-o", "json")
    assert done.status == 0, done.out + done.err
    check(json.loads(done.out))
    assert "3 nodes ready" in done.err
    assert "all pods ready" in done.err
    assert "demo" not in {lab["name"] for lab in podwire.labs()}


def test_the_demo_needs_no_network_program(podwire: Podwire, tmp_path: Path) -> None:
    """Only what the example's own containers run is on the PATH: no ip, nft, iptables, bridge, sysctl, mount."""
    for program in ("bash", "sleep"):
        (tmp_path / program).symlink_to(str(shutil.which(program)))
    bare = replace(podwire, prefix=("/usr/bin/env", f"PATH={tmp_path}"))
    done = bare("demo", "--name", "bare", "-o", "json")
    assert done.status == 0, done.out + done.err
    check(json.loads(done.out))


def test_paths_of_a_running_lab(lab: Lab) -> None:
    check(yaml.safe_load(lab.podwire.ok("paths", "--lab", lab.name, "-o", "yaml")))
    table = lab.podwire.ok("paths", "--lab", lab.name)
    assert all(path in table for path in PATHS)
    assert "in VXLAN 1: 198.18.0.1" in table


@pytest.mark.parametrize(
    ("source", "target", "rows"),
    [("cart", "gateway", 2), ("shop/cart", "shop/svc/api", 4), ("world", "svc/web-public", 4), ("node-1", "cart", 2)],
)
def test_the_way_between_any_two(lab: Lab, source: str, target: str, rows: int) -> None:
    report = json.loads(lab.podwire.ok("paths", "--lab", lab.name, "--pod", source, "--to", target, "-o", "json"))
    assert len(report["paths"]) == rows
    assert all(row["ok"] for row in report["paths"])


def test_a_path_that_does_not_work_says_why(lab: Lab) -> None:
    done = lab.podwire("paths", "--lab", lab.name, "--pod", "cart", "--to", "198.18.0.12:9", "-o", "json")
    assert done.status == 1
    (row,) = json.loads(done.out)["paths"]
    assert not row["ok"]
    assert row["reason"] == "no connection to 198.18.0.12:9: Connection refused"


def test_wrong_questions(lab: Lab) -> None:
    assert lab.podwire("paths", "--lab", lab.name, "--pod", "cart").status == 2
    done = lab.podwire("paths", "--lab", lab.name, "--pod", "cart", "--to", "nobody")
    assert done.status == 1
    assert "nobody" in done.err
