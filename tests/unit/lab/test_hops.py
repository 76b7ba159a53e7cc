"""Captured frames → hops → verdict and report, on frames built here byte by byte."""

from ipaddress import ip_address

import pytest

from podwire.kernel.capture import Captured
from podwire.lab.hops import hops_from, nodes_passed, objection
from podwire.lab.paths import PathResult
from podwire.lab.probes import Path, Probe
from podwire.lab.report import all_ok, document, lines, summary
from podwire.wire.packet import ETH_IPV4, TCP, UDP, Frame, Packet, build_frame

MACS = ("02:00:00:00:00:01", "02:00:00:00:00:02")
POD, SERVICE, ENDPOINT = ip_address("10.244.0.2"), ip_address("10.96.0.20"), ip_address("10.244.1.2")
BEFORE = Packet(POD, SERVICE, TCP, sport=4000, dport=80, payload=b"nonce")
AFTER = Packet(POD, ENDPOINT, TCP, sport=4000, dport=8080, payload=b"nonce")


def frame(packet: Packet) -> Frame:
    return Frame(*MACS, ETH_IPV4, packet)


def seen(at: int, place: str, device: str, packet: Packet, *, out: bool = False) -> Captured:
    return Captured(at, place, device, out, build_frame(frame(packet)))


TUNNEL = Packet(ip_address("198.18.0.10"), ip_address("198.18.0.11"), UDP, sport=5, dport=8472, vni=1, inner=frame(AFTER))
WAY = [
    seen(1, "shop/a", "eth0", BEFORE, out=True),
    seen(2, "node-1", "veth1", BEFORE),
    seen(3, "node-1", "flannel.1", AFTER, out=True),
    seen(4, "node-1", "eth0", TUNNEL, out=True),
    seen(5, "node-2", "eth0", TUNNEL),
    seen(6, "node-2", "flannel.1", AFTER),
    seen(7, "shop/c", "eth0", AFTER),
    seen(8, "shop/c", "eth0", AFTER),  # a retransmission
]


def probe(**changes: object) -> Probe:
    fields: dict[str, object] = {
        "path": Path.SERVICE, "origin": "shop/a", "sender": "shop/a", "target": "shop/web", "address": SERVICE, "port": 80,
        "protocol": "TCP", "ends_at": frozenset({"shop/c"}), **changes,
    }  # fmt: skip
    return Probe(**fields)  # type: ignore[arg-type]  # the defaults above are of the right types


def test_hops_tell_devices_tunnel_and_rewriting() -> None:
    hops = hops_from(WAY)
    assert [hop.device for hop in hops] == ["eth0", "veth1", "flannel.1", "eth0", "eth0", "flannel.1", "eth0"]
    assert [hop.rewritten for hop in hops if hop.rewritten] == ["destination 10.96.0.20:80 → 10.244.1.2:8080"]
    assert [hop.outer.vni for hop in hops if hop.outer] == [1, 1]
    assert nodes_passed(hops) == ["node-1", "node-2"]


def test_an_echo_is_not_part_of_the_way() -> None:
    echo = Packet(ENDPOINT, POD, TCP, sport=8080, dport=4000, payload=b"nonce")
    back = [seen(9, "shop/c", "eth0", echo, out=True), seen(10, "shop/a", "eth0", echo)]
    assert hops_from([*WAY, *back]) == hops_from(WAY)


def test_frames_that_are_not_ip_are_left_out() -> None:
    assert hops_from([Captured(1, "node-1", "eth0", False, b"nonce"), Captured(2, "node-1", "eth0", False, bytes(40))]) == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({}, ""),
        ({"ends_at": frozenset({"shop/d"})}, "ended in shop/c, not in shop/d"),
        ({"keeps_source": True}, "rewritten on the way: destination"),
        ({"passes": "balancer"}, "did not pass the balancer"),
        ({"crosses_nodes": True}, ""),
    ],
)
def test_an_answer_alone_does_not_make_a_path(changes: dict[str, object], complaint: str) -> None:
    found = objection(probe(**changes), hops_from(WAY))
    assert (complaint in found) if complaint else found == ""


def test_no_packet_seen_is_no_proof() -> None:
    assert "no packet was seen" in objection(probe(), [])


def test_the_report_has_the_promised_shape() -> None:
    report = document([PathResult(probe(), tuple(hops_from(WAY)), 0.25), PathResult(probe(), reason="no answer")])
    assert [set(path) for path in report["paths"]] == [{"path", "from", "to", "hops", "rtt_ms", "ok", "reason"}] * 2
    assert report["paths"][0]["hops"][3]["encapsulation"] == {
        "type": "vxlan",
        "vni": 1,
        "outer": "198.18.0.10:5 → 198.18.0.11:8472/udp",
    }
    assert (all_ok(report), summary(report)) == (False, "1 of 2 probes took their path")


def test_the_report_for_people_groups_hops_by_place() -> None:
    text = "\n".join(lines(document([PathResult(probe(), tuple(hops_from(WAY)), 0.25)])))
    assert "✓ shop/a → shop/web   0.250 ms" in text
    assert "node-1: veth1 → flannel.1 → eth0" in text
    assert "in VXLAN 1: 198.18.0.10:5 → 198.18.0.11:8472/udp" in text


def test_no_path_at_all_is_not_success() -> None:
    assert not all_ok({"paths": []})
