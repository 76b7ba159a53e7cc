"""Netlink framing: bytes as the kernel writes them, round trips, and input that is broken."""

import contextlib
import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from podwire.wire import netlink
from podwire.wire.netlink import Ack, Batch, Dump, Message, NetlinkError

payloads = st.binary(max_size=64)


@given(st.lists(st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.integers(0, 2**32 - 1), payloads), max_size=8))
def test_messages_round_trip(parts: list[tuple[int, int, int, bytes]]) -> None:
    raw = b"".join(netlink.message(type_, flags, seq, data) for type_, flags, seq, data in parts)
    assert len(raw) % 4 == 0
    assert list(netlink.parse_messages(raw)) == [Message(type_, flags, seq, 0, data) for type_, flags, seq, data in parts]


@given(st.lists(st.tuples(st.integers(0, netlink.NLA_TYPE_MASK), payloads), max_size=8))
def test_attributes_round_trip(attrs: list[tuple[int, bytes]]) -> None:
    raw = b"".join(netlink.attr(type_, data) for type_, data in attrs)
    assert list(netlink.iter_attrs(raw)) == attrs
    assert netlink.parse_attrs(netlink.parse_attrs(netlink.nested(9, raw))[9]) == dict(attrs)


@given(st.binary(max_size=200))
def test_any_bytes_parse_or_raise(raw: bytes) -> None:
    for parse in (netlink.parse_messages, netlink.iter_attrs):
        with contextlib.suppress(NetlinkError):
            list(parse(raw))


def test_numbers_and_strings() -> None:
    attrs = netlink.parse_attrs(
        netlink.attr_u8(1, 200)
        + netlink.attr_u16(2, 4660)
        + netlink.attr_u32(3, 1 << 31)
        + netlink.attr_u64(4, 1 << 63)
        + netlink.attr_be16(5, 8472)
        + netlink.attr_be32(6, 7)
        + netlink.attr_be64(7, 9)
        + netlink.attr_str(8, "veth1")
    )
    assert (netlink.as_u8(attrs[1]), netlink.as_u16(attrs[2]), netlink.as_u32(attrs[3])) == (200, 4660, 1 << 31)
    assert [netlink.as_be(attrs[n]) for n in (5, 6, 7)] == [8472, 7, 9]
    assert attrs[8] == b"veth1\0"
    assert netlink.as_str(attrs[8]) == "veth1"


def test_an_attribute_too_large_is_refused() -> None:
    with pytest.raises(NetlinkError):
        netlink.attr(1, bytes(0xFFFF))


def ack(seq: int, code: int, text: str = "", *, capped: bool = True) -> bytes:
    """NLMSG_ERROR as the kernel writes it: errno, the request's header (or all of it), the extended ack."""
    request = netlink.message(16, 0, seq, b"1234")
    flags = netlink.NLM_F_CAPPED if capped else 0
    tlvs = b""
    if text:
        flags |= netlink.NLM_F_ACK_TLVS
        tlvs = netlink.attr_str(1, text) + netlink.attr_u32(2, 36)
    original = request[:16] if capped else request
    return netlink.message(netlink.NLMSG_ERROR, flags, seq, (-code).to_bytes(4, "little", signed=True), original, tlvs)


@pytest.mark.parametrize("capped", [True, False])
def test_acknowledgements(capped: bool) -> None:
    (good,) = netlink.parse_messages(ack(5, 0, capped=capped))
    assert netlink.parse_ack(good) == Ack(5, 0)
    (bad,) = netlink.parse_messages(ack(6, errno.ENETUNREACH, "Nexthop has invalid gateway", capped=capped))
    assert netlink.parse_ack(bad) == Ack(6, errno.ENETUNREACH, "Nexthop has invalid gateway", 36)


def test_batch_acknowledges_once_and_keeps_refusals() -> None:
    requests = tuple(netlink.message(16, netlink.NLM_F_REQUEST, 0, bytes([n])) for n in range(3))
    batch = Batch(10, requests)
    sent = list(netlink.parse_messages(batch.encode()))
    assert [m.seq for m in sent] == [10, 11, 12]
    assert [bool(m.flags & netlink.NLM_F_ACK) for m in sent] == [False, False, True]
    batch.feed(ack(3, errno.EPERM))  # of an earlier request, given up meanwhile
    done = [batch.done]
    for datagram in (ack(11, errno.EEXIST), netlink.message(16, 0, 12, b"object") + ack(12, 0)):
        batch.feed(datagram)
        done.append(batch.done)
    assert done == [False, False, True]
    assert {index: a.errno for index, a in batch.errors.items()} == {1: errno.EEXIST}
    assert batch.answers[2].payload == b"object"


def test_dump_collects_until_done() -> None:
    dump = Dump(7)
    multi = netlink.NLM_F_MULTI
    dump.feed(netlink.message(16, multi, 7, b"one") + netlink.message(16, multi, 6, b"other"))
    assert not dump.done
    done = netlink.message(netlink.NLMSG_DONE, multi | netlink.NLM_F_DUMP_INTR, 7, bytes(4))
    dump.feed(netlink.message(16, multi, 7, b"two") + done)
    assert (dump.done, dump.interrupted, dump.errno) == (True, True, 0)
    assert [m.payload for m in dump.messages] == [b"one", b"two"]


def test_dump_that_is_refused() -> None:
    dump = Dump(7)
    dump.feed(ack(7, errno.EOPNOTSUPP, "no such family"))
    assert (dump.done, dump.errno, dump.text) == (True, errno.EOPNOTSUPP, "no such family")


@given(st.lists(st.binary(min_size=1, max_size=30), max_size=20), st.integers(1, 60), st.integers(1, 5))
def test_chunks_keep_order_and_limits(requests: list[bytes], most: int, count: int) -> None:
    groups = list(netlink.chunks(requests, max_bytes=most, max_count=count))
    assert [raw for group in groups for raw in group] == requests
    assert all(len(group) <= count and (len(group) == 1 or sum(map(len, group)) <= most) for group in groups)
