"""The nftables codec: expressions, sets and elements come back as they went."""

import struct

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from podwire.model.addr import Family
from podwire.model.nft import (
    AddChain,
    AddElements,
    AddSet,
    AddTable,
    BaseHook,
    Batch,
    Chain,
    Command,
    Data,
    DelElements,
    Element,
    FieldType,
    Hook,
    NftSet,
    Prune,
    ReplaceElements,
    Rule,
    SetRules,
    Sweep,
    TableRef,
)
from podwire.model.nftexpr import (
    ACCEPT,
    DROP,
    RETURN,
    Bitwise,
    Cmp,
    CmpOp,
    Constant,
    Counter,
    Ct,
    CtKey,
    Dnat,
    Dynset,
    DynsetOp,
    Expression,
    FibSaddrType,
    Immediate,
    Lookup,
    Masquerade,
    Meta,
    MetaKey,
    Numgen,
    Payload,
    PayloadBase,
    Reject,
    SetMeta,
    Unknown,
    goto,
    jump,
)
from podwire.wire import nftables
from podwire.wire.netlink import attr_be32, attr_be64, attr_str, attr_u8, nested, parse_attrs, parse_messages
from podwire.wire.nftedit import HeldRule
from podwire.wire.nftexpr import decode_counter, decode_expression, encode_expression

TABLE = TableRef(Family.IPV4, "t")
KEY = (FieldType.IPV4, FieldType.PROTO, FieldType.PORT)

registers = st.integers(0, 15)
names = st.from_regex(r"[a-z][a-z0-9-]{0,20}", fullmatch=True)
values = st.binary(min_size=1, max_size=16)
verdicts = st.one_of(st.sampled_from((ACCEPT, DROP, RETURN)), names.map(goto), names.map(jump))


@st.composite
def bitwise(draw: st.DrawFn) -> Bitwise:
    mask = draw(values)
    return Bitwise(draw(registers), draw(registers), mask, draw(st.binary(min_size=len(mask), max_size=len(mask))))


@st.composite
def lookups(draw: st.DrawFn) -> Lookup:
    name, sreg = draw(names), draw(registers)
    match draw(st.integers(0, 2)):
        case 0:
            return Lookup(name, sreg, inverted=draw(st.booleans()))
        case 1:
            return Lookup(name, sreg, dreg=draw(registers))
        case _:
            return Lookup(name, sreg, verdict=True)


EXPRESSIONS: tuple[st.SearchStrategy[Expression], ...] = (
    st.builds(Payload, st.sampled_from(PayloadBase), st.integers(0, 255), st.integers(1, 16), registers),
    st.builds(Meta, st.sampled_from(MetaKey), registers),
    st.builds(SetMeta, st.sampled_from(MetaKey), registers),
    st.builds(Ct, st.sampled_from(CtKey), registers, st.booleans()),
    st.builds(Cmp, st.sampled_from(CmpOp), registers, values),
    bitwise(),
    lookups(),
    st.builds(Numgen, registers, st.integers(1, 1 << 31)),
    st.builds(Dnat, st.booleans(), registers, registers),
    st.builds(Masquerade, st.booleans()),
    st.builds(Immediate, verdicts),
    st.builds(Constant, values, registers),
    st.builds(Dynset, st.sampled_from(DynsetOp), names, registers, st.none() | registers, st.integers(0, 86400)),
    st.sampled_from((Reject(True, False), Reject(False, False), Reject(False, True))),
    st.just(Counter()),
    st.builds(FibSaddrType, registers),
)


@pytest.mark.parametrize("kind", range(len(EXPRESSIONS)), ids=lambda n: str(EXPRESSIONS[n])[:30])
@settings(max_examples=25)
@given(st.data())
def test_expression_round_trip(kind: int, data: st.DataObject) -> None:
    """Kind by kind: drawn from all at once, what few have would hardly ever be tried."""
    expression = data.draw(EXPRESSIONS[kind])
    encoded = encode_expression(expression)
    length, _ = struct.unpack_from("=HH", encoded)
    assert decode_expression(encoded[4:length]) == expression


def test_expressions_of_others_are_unknown_and_cannot_be_sent() -> None:
    payload = attr_str(1, "quota") + nested(2)
    assert decode_expression(payload) == Unknown("quota")
    shift = encode_expression(Ct(CtKey.STATUS, 0)).replace(b"ct\0\0", b"rt\0\0")
    assert isinstance(decode_expression(shift[4:]), Unknown)
    with pytest.raises(ValueError, match="cannot be written"):
        encode_expression(Unknown("quota"))


def others(name: str, *attributes: bytes) -> bytes:
    return attr_str(1, name) + nested(2, *attributes)


REGISTER, OTHER = 8, 9
NAT = (attr_be32(1, 1), attr_be32(2, 2), attr_be32(3, REGISTER), attr_be32(5, OTHER))


@pytest.mark.parametrize(
    "payload",
    [
        others("ct", attr_be32(1, REGISTER), attr_be32(2, CtKey.PROTO_DST.value), attr_u8(3, 1)),  # the reply's
        others("ct", attr_be32(2, CtKey.STATUS.value), attr_be32(4, REGISTER)),  # set, not read
        others("meta", attr_be32(1, REGISTER), attr_be32(2, 250)),
        others("payload", attr_be32(2, 1), attr_be32(3, 0), attr_be32(4, 2), attr_be32(5, REGISTER)),  # written
        others("numgen", attr_be32(1, REGISTER), attr_be32(2, 3), attr_be32(3, 0)),  # one after the other
        others("numgen", attr_be32(1, REGISTER), attr_be32(2, 3), attr_be32(3, 1), attr_be32(4, 7)),
        others("nat", attr_be32(1, 0), *NAT[1:]),  # source
        others("nat", *NAT[:3]),
        others("nat", *NAT[:2], NAT[3]),
        others("nat", *NAT, attr_be32(4, OTHER)),
        others("nat", *NAT, attr_be32(6, REGISTER)),
        others("nat", *NAT, attr_be32(7, 1 << 3)),  # persistent
        others("masq", attr_be32(2, REGISTER), attr_be32(3, OTHER)),  # to some ports
        others("reject", attr_be32(1, 0), attr_u8(2, 1)),  # host unreachable
        others("reject", attr_be32(1, 2), attr_u8(2, 3)),
        others("fib", attr_be32(1, REGISTER), attr_be32(2, 3), attr_be32(3, 2)),  # the destination's
        others("fib", attr_be32(1, REGISTER), attr_be32(2, 1), attr_be32(3, 1)),
        others("bitwise", *(attr_be32(n, REGISTER) for n in (1, 2)), attr_be32(6, 1)),
        others("dynset", attr_str(1, "s"), attr_be32(3, 0), attr_be32(4, REGISTER), attr_be32(9, 1)),
        others("lookup", attr_str(1, "s")),
    ],
)
def test_what_others_say_otherwise_is_not_taken_for_ours(payload: bytes) -> None:
    assert isinstance(decode_expression(payload), Unknown)


def test_what_the_kernel_fills_in_is_ours() -> None:
    """As it dumps a translation to one address and one port."""
    whole = (*NAT, attr_be32(4, REGISTER), attr_be32(6, OTHER), attr_be32(7, 3))
    assert decode_expression(others("nat", *whole)) == Dnat(False, 0, 1)


def test_only_counters_count() -> None:
    assert decode_counter(others("counter", attr_be64(1, 900), attr_be64(2, 5))) == (5, 900)
    assert decode_counter(others("limit", attr_be64(1, 900), attr_be64(2, 5))) == (0, 0)


def test_a_register_beyond_the_last_is_refused() -> None:
    with pytest.raises(ValueError, match="register 16"):
        encode_expression(Numgen(16, 2))


# --- messages -------------------------------------------------------------------------------------------------------


def sent(*commands: Command) -> bytes:
    return nftables.frame(list(nftables.encode_batch(Batch(commands))), 100)


def test_a_transaction_is_framed_and_numbered() -> None:
    messages = list(parse_messages(sent(AddTable(TABLE), AddChain(TABLE, Chain("c")))))
    assert [m.type for m in messages] == [0x10, 0xA00, 0xA03, 0x11]
    assert [m.seq for m in messages] == [100, 101, 102, 103]
    assert messages[1].payload.hex() == "02000000" + "06000100" + "74000000" + "08000200" + "00000000"


def test_chain_and_rule_round_trip() -> None:
    chain = Chain("pre", BaseHook("nat", Hook.PREROUTING, -100))
    rule = Rule((Counter(), Immediate(goto("x"))), "why")
    _, new_chain, flush, new_rule, _ = parse_messages(sent(AddChain(TABLE, chain), SetRules(TABLE, "pre", (rule,))))
    assert nftables.decode_chain(new_chain) == ("t", chain)
    assert nftables.message_kind(flush) == nftables.DELRULE
    assert nftables.decode_rule(new_rule) == ("t", "pre", HeldRule(rule, 0))


@pytest.mark.parametrize(
    "of",
    [
        NftSet("plain", KEY),
        NftSet("verdicts", KEY, verdicts=True),
        NftSet("ranges", (*KEY, FieldType.IPV4), interval=True),
        NftSet("kept", (FieldType.IPV6, FieldType.PROTO), data=(FieldType.IPV6,), timeout_s=60, size=4096, dynamic=True),
        NftSet("counted", KEY, counters=True, size=4096, dynamic=True),
        NftSet("indexed", (*KEY, FieldType.INDEX), data=(FieldType.IPV4, FieldType.PORT)),
    ],
    ids=lambda of: of.name,
)
def test_set_round_trip(of: NftSet) -> None:
    _, new_set, _ = parse_messages(sent(AddSet(TABLE, of)))
    assert nftables.decode_set(new_set) == ("t", of)


def test_a_set_of_others_has_no_fields_and_an_anonymous_one_is_none() -> None:
    of = NftSet("m", KEY, data=(FieldType.IPV4,))
    _, new_set, _ = parse_messages(sent(AddSet(TABLE, of)))
    ether = new_set.payload.replace(struct.pack(">I", 7 << 12 | 12 << 6 | 13), struct.pack(">I", 9))
    assert nftables.decode_set(new_set._replace(payload=ether)) == ("t", NftSet("m", ()))
    anonymous = new_set.payload.replace(attr_be32(3, 8), attr_be32(3, 9))
    assert nftables.decode_set(new_set._replace(payload=anonymous)) == ("t", None)


def decoded(raw: bytes, kind: int) -> dict[bytes, Data]:
    found: dict[bytes, Data] = {}
    for message in parse_messages(raw):
        if nftables.message_kind(message) == kind:
            found |= {key: data for key, data, _ in nftables.decode_elements(message)}
    return found


def test_a_comment_goes_with_an_element() -> None:
    of = NftSet("m", KEY, verdicts=True)
    one, two = bytes(12), bytes(11) + b"\1"
    command = AddElements(TABLE, of, ((one, DROP), (two, goto("x"))), {one: "shop/web"})
    raw = sent(command)
    assert decoded(raw, nftables.NEWSETELEM) == {one: DROP, two: goto("x")}
    assert raw.count(b"\0\x09shop/web\0") == 1
    assert command == AddElements(TABLE, of, command.elements), "comments are no part of the value"


def test_comments_are_kept_with_data_and_left_out_of_ranges() -> None:
    of = NftSet("m", KEY, data=(FieldType.IPV4, FieldType.PORT))
    one, two, three = (bytes(11) + bytes((n,)) for n in range(3))
    elements: tuple[Element, ...] = ((one, bytes(8)), (two, b"\1" * 8), (three, b"\2" * 8))
    raw = sent(AddElements(TABLE, of, elements, {one: "a/b", three: "a/b"}))
    assert decoded(raw, nftables.NEWSETELEM) == dict(elements)
    assert raw.count(b"\0\x04a/b\0") == 2
    ranges = NftSet("r", KEY, interval=True)
    raw = sent(AddElements(TABLE, ranges, ((one + two, None),), {one + two: "a/b"}))
    assert decoded(raw, nftables.NEWSETELEM) == {one + two: None}
    assert b"a/b" not in raw


def test_rules_that_change_again_in_a_batch_are_edited_as_far_as_handles_are_known() -> None:
    a, b, c = (Rule((Immediate(DROP),), text) for text in "abc")
    held = {(TABLE, "c"): [HeldRule(a, 7), HeldRule(b, 8)]}
    texts = (("c", (a, c)), ("c", (c,)), ("c", (a,)), ("other", (a,)))
    units = nftables.encode_batch(Batch(tuple(SetRules(TABLE, chain, rules) for chain, rules in texts)), held)
    kinds = [[nftables.message_kind(m) for raw in unit.messages for m in parse_messages(raw)] for unit in units]
    assert kinds == [
        [nftables.NEWRULE, nftables.DELRULE],  # c comes, the rule of handle 8 goes
        [nftables.DELRULE],  # that of handle 7
        [nftables.DELRULE, nftables.NEWRULE],  # c's handle is not known yet: all go
        [nftables.DELRULE, nftables.NEWRULE],
    ]


def test_requests_ask_for_what_they_say() -> None:
    def asked(raw: bytes) -> tuple[int, int, int, int, dict[int, bytes]]:
        (message,) = parse_messages(raw)
        return message.type, message.flags, message.seq, message.payload[0], parse_attrs(message.payload, 4)

    request, dump = 0x1, 0x301
    name, m, c = b"t\0", b"m\0", b"c\0"
    six = TableRef(Family.IPV6, "t")
    assert asked(nftables.dump_request(nftables.GETCHAIN, TABLE, 7)) == (0xA04, dump, 7, 2, {})
    assert asked(nftables.dump_request(nftables.GETRULE, six, 7)) == (0xA07, dump, 7, 10, {1: name})
    assert asked(nftables.dump_request(nftables.GETRULE, TABLE, 7, chain="c")) == (0xA07, dump, 7, 2, {1: name, 2: c})
    assert asked(nftables.dump_request(nftables.GETSETELEM, TABLE, 7, set_name="m")) == (0xA0D, dump, 7, 2, {1: name, 2: m})
    assert asked(nftables.table_request(TABLE, 9)) == (0xA01, request, 9, 2, {1: name})
    one, two = bytes(12), bytes(11) + b"\1"
    requests = nftables.element_requests(TABLE, NftSet("m", KEY), (one, two))
    assert [asked(raw)[:2] for raw in requests] == [(0xA0D, request)] * 2
    assert [asked(raw)[4][2] for raw in requests] == [m, m]
    assert [decoded(raw, nftables.GETSETELEM) for raw in requests] == [{one: None}, {two: None}]


packed_keys = st.binary(min_size=12, max_size=12)


@given(st.dictionaries(packed_keys, verdicts, max_size=40))
def test_verdict_elements_round_trip(elements: dict[bytes, Data]) -> None:
    of = NftSet("m", KEY, verdicts=True)
    assert decoded(sent(AddElements(TABLE, of, tuple(elements.items()))), nftables.NEWSETELEM) == elements


@given(st.dictionaries(packed_keys, st.binary(min_size=8, max_size=8), max_size=40))
def test_data_elements_round_trip(elements: dict[bytes, bytes]) -> None:
    of = NftSet("m", KEY, data=(FieldType.IPV4, FieldType.PORT))
    pairs: tuple[Element, ...] = tuple(elements.items())
    assert decoded(sent(AddElements(TABLE, of, pairs)), nftables.NEWSETELEM) == elements
    assert decoded(sent(DelElements(TABLE, of, pairs)), nftables.DELSETELEM) == dict.fromkeys(elements)


@given(st.sets(st.binary(min_size=24, max_size=24), max_size=40))
def test_interval_elements_round_trip(keys: set[bytes]) -> None:
    of = NftSet("m", KEY, interval=True)
    assert decoded(sent(AddElements(TABLE, of, tuple((k, None) for k in keys))), nftables.NEWSETELEM) == dict.fromkeys(keys)


def test_many_elements_are_cut_into_messages_and_a_replacement_is_never_split() -> None:
    of = NftSet("m", KEY, data=(FieldType.IPV4, FieldType.PORT))
    pairs: tuple[Element, ...] = tuple((n.to_bytes(12, "big"), bytes(8)) for n in range(5000))
    units = list(nftables.encode_batch(Batch((AddElements(TABLE, of, pairs),))))
    assert len(units) > 5
    assert all(u.size < 20000 for u in units)
    for unit in nftables.encode_batch(Batch((ReplaceElements(TABLE, of, pairs),))):
        removed, added = (
            decoded(raw, kind) for raw, kind in zip(unit.messages, (nftables.DELSETELEM, nftables.NEWSETELEM), strict=True)
        )
        assert removed.keys() == added.keys()


def test_pruning_is_no_message() -> None:
    of = NftSet("m", KEY, data=(FieldType.IPV4, FieldType.PORT), timeout_s=5, dynamic=True)
    assert not list(nftables.encode_batch(Batch((Prune(TABLE, of, 4, {}), Sweep(TABLE, of, (bytes(12),))))))


def test_batches_read_well() -> None:
    of = NftSet("services", KEY, verdicts=True)
    key = bytes((10, 96, 0, 1, 6, 0, 0, 0, 0, 80, 0, 0))
    batch = Batch((AddTable(TABLE), AddSet(TABLE, of), AddElements(TABLE, of, ((key, goto("pick-3")),))))
    assert str(batch).splitlines() == [
        "add table ip t",
        "add map ip t services",
        "add element ip t services { 10.96.0.1 . tcp . 80 : goto pick-3 }",
    ]
