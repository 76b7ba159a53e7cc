"""conntrack messages: a kernel's own bytes, round trips, and what a flow says of its translation."""

import ipaddress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.model.addr import Family
from podwire.model.flow import DST_NAT, SEEN_REPLY, SRC_NAT, Flow, FlowTuple
from podwire.wire import conntrack, netlink
from podwire.wire.netlink import Message, NetlinkError

ports = st.integers(0, 65535)
protocols = st.sampled_from([1, 6, 17, 58, 132])
v4 = st.ip_addresses(v=4)
v6 = st.ip_addresses(v=6)
tuples = st.builds(FlowTuple, v4, v4, protocols, ports, ports) | st.builds(FlowTuple, v6, v6, protocols, ports, ports)


def entry(flow: Flow) -> Message:
    """The message in which the kernel would report `flow`."""
    raw = netlink.message(
        1 << 8,
        0,
        0,
        bytes(4),
        conntrack.encode_tuple(conntrack.CTA_TUPLE_ORIG, flow.original),
        conntrack.encode_tuple(conntrack.CTA_TUPLE_REPLY, flow.reply),
        netlink.attr_be32(conntrack.CTA_STATUS, flow.status),
        netlink.attr_be32(conntrack.CTA_MARK, flow.mark),
        netlink.attr_be16(conntrack.CTA_ZONE, flow.zone),
        netlink.attr_be32(conntrack.CTA_ID, flow.id),
        netlink.attr_be32(conntrack.CTA_TIMEOUT, flow.timeout_s),
        _counters(conntrack.CTA_COUNTERS_ORIG, flow.original_counters),
        _counters(conntrack.CTA_COUNTERS_REPLY, flow.reply_counters),
    )
    (parsed,) = netlink.parse_messages(raw)
    return parsed


def _counters(type_: int, counts: tuple[int, int]) -> bytes:
    return netlink.nested(type_, netlink.attr_be64(1, counts[0]), netlink.attr_be64(2, counts[1]))


counts = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
words = st.integers(0, 2**32 - 1)


@given(st.builds(Flow, tuples, tuples, words, words, ports, words, words, counts, counts))
def test_flows_round_trip(flow: Flow) -> None:
    assert conntrack.read_flow(entry(flow)) == flow


@given(tuples, ports)
def test_requests_name_the_flow(original: FlowTuple, zone: int) -> None:
    flow = Flow(original, original, zone=zone, id=77)
    (parsed,) = netlink.parse_messages(conntrack.del_flow(flow))
    attrs = netlink.parse_attrs(parsed.payload, 4)
    assert parsed.type == 1 << 8 | conntrack.IPCTNL_MSG_CT_DELETE
    assert parsed.payload[0] == (2 if original.src.version == 4 else 10)
    assert netlink.as_be(attrs[conntrack.CTA_ID]) == 77
    assert (conntrack.CTA_ZONE in attrs) == bool(zone)


def test_dump_asks_for_one_family() -> None:
    for family, af in ((Family.IPV4, 2), (Family.IPV6, 10)):
        (parsed,) = netlink.parse_messages(conntrack.dump_flows(family))
        assert parsed.payload == bytes((af, 0, 0, 0))


@given(st.binary(max_size=120))
def test_broken_messages_are_named(payload: bytes) -> None:
    with pytest.raises(NetlinkError):
        conntrack.read_flow(Message(1 << 8, 0, 0, 0, payload))


def test_translation_in_words() -> None:
    pod, service, backend = (ipaddress.ip_address(t) for t in ("10.244.1.2", "10.96.0.1", "10.244.2.3"))
    flow = Flow(
        FlowTuple(pod, service, 6, 4242, 80),
        FlowTuple(backend, pod, 6, 8080, 4242),
        status=SEEN_REPLY | DST_NAT,
    )
    assert str(flow) == "10.244.1.2:4242 → 10.96.0.1:80/tcp becomes 10.244.1.2:4242 → 10.244.2.3:8080/tcp"
    assert (flow.source_translated, flow.destination_translated) == (False, True)
    assert replace(flow, status=SRC_NAT).source_translated
    plain = Flow(FlowTuple(pod, backend, 17, 1, 2), FlowTuple(backend, pod, 17, 2, 1))
    assert str(plain) == "10.244.1.2:1 → 10.244.2.3:2/udp"
