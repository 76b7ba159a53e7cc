"""Labs whose nodes reach each other in another way than by VXLAN."""

import json

import pytest
from labcommand import SHOP, Lab, Podwire, until

from podwire.kernel.features import Feature, probe_features

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]


@pytest.mark.needs("TUN devices")
def test_the_udp_back_end_carries_every_path_also_after_its_agent_was_killed(podwire: Podwire) -> None:
    options = ("--nodes", "2", "--backend", "udp", "--ip-family", "ipv4", "-f", str(SHOP), "--wait")
    podwire.ok("lab", "up", "--name", "udp", *options)
    lab = Lab(podwire, "udp", podwire.ok("lab", "kubeconfig", "udp", "--path").strip())
    try:
        rows = json.loads(podwire.ok("paths", "--name", "udp", "-o", "json"))["paths"]
        assert all(row["ok"] for row in rows), [row for row in rows if not row["ok"]]
        tunnels = {hop["encapsulation"]["type"] for row in rows for hop in row["hops"] if hop["encapsulation"]}
        assert tunnels == {"udp"}
        assert {row["path"] for row in rows if any(hop["device"] == "flannel0" for hop in row["hops"])} >= {
            "pod→pod, across nodes",
            "pod→Service",
        }
        assert podwire("verify", "overlay", "--name", "udp").status == 0
        podwire.ok("lab", "fault", "kill", "--name", "udp", "node-1")
        until(lambda: lab.podwire("paths", "--name", "udp").status == 0)
    finally:
        podwire.ok("lab", "down", "udp")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--backend", "udp"), "backend udp carries IPv4 only: add --ip-family ipv4"),
        (("--backend", "alloc"), "backend alloc cannot be used in a lab: it leaves the routes"),
        (("--backend", "{nonsense"), "neither a name nor a JSON object"),
        (("--backend", "carrier-pigeon"), "carrier-pigeon"),
    ],
)
def test_what_a_lab_cannot_have_is_wrong_usage(podwire: Podwire, options: tuple[str, ...], words: str) -> None:
    done = podwire("lab", "up", "--name", "never", *options)
    assert done.status == 2
    assert words in done.err


def test_a_back_end_that_the_kernel_lacks_is_named_at_once(podwire: Podwire) -> None:
    """Where it has it, the lab is up."""
    done = podwire("lab", "up", "--name", "crypt", "--backend", "wireguard")
    if Feature.WIREGUARD in probe_features().present:
        podwire.ok("verify", "overlay", "--name", "crypt")
        podwire.ok("lab", "down", "crypt")
        return
    assert done.status == 1
    assert "run `sudo modprobe wireguard`" in done.err


def test_a_back_end_that_no_node_could_use_is_named_at_once(podwire: Podwire) -> None:
    done = podwire("lab", "up", "--name", "narrow", "--backend", '{"Type":"vxlan","MTU":1300}')
    assert done.status == 1
    assert "packets of 1230 bytes would be the largest between nodes, and IPv6 needs 1280" in done.err
    assert "nodes not ready" not in done.err
