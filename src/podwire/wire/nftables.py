"""The nftables codec, sans-IO: a `Batch` → netlink messages, dumps → chains, rules, sets and elements.

Layout: linux/netfilter/nf_tables.h and nfnetlink.h. A transaction is one datagram: BATCH_BEGIN, messages, BATCH_END.
"""

import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

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
    DelChain,
    DelElements,
    DelSet,
    DelTable,
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
)  # fmt: skip
from podwire.model.nftexpr import Counter, Verdict
from podwire.wire.netlink import (
    NLA_F_NESTED,
    NLA_TYPE_MASK,
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    Message,
    as_be,
    as_str,
    attr,
    attr_be32,
    attr_be64,
    attr_str,
    iter_attrs,
    message,
    nested,
    parse_attrs,
)  # fmt: skip
from podwire.wire.nftedit import Edit, HeldRule, edit_rules
from podwire.wire.nftexpr import decode_counter, decode_data, decode_expressions, encode_expression, encode_verdict

SUBSYSTEM = 10
BATCH_BEGIN, BATCH_END = 0x10, 0x11

NEWTABLE, GETTABLE, DELTABLE = 0, 1, 2
NEWCHAIN, GETCHAIN, DELCHAIN = 3, 4, 5
NEWRULE, GETRULE, DELRULE = 6, 7, 8
NEWSET, GETSET, DELSET = 9, 10, 11
NEWSETELEM, GETSETELEM, DELSETELEM = 12, 13, 14
GETGEN = 16

ELEMENTS_PER_MESSAGE = 16384
"""Bytes of elements in one message. The attribute's own limit is 65,531; smaller ones let a batch be cut more evenly."""

_LIST_ELEM = 1
_SET_INTERVAL, _SET_MAP, _SET_TIMEOUT, _SET_EVAL, _SET_CONCAT, _SET_EXPR = 0x4, 0x8, 0x10, 0x20, 0x80, 0x100
_SET_ANONYMOUS = 0x1
_DATA_TYPE_VERDICT = 0xFFFFFF00
_TYPE_BITS = 6
_ELEM_KEY, _ELEM_DATA, _ELEM_USERDATA, _ELEM_EXPR, _ELEM_KEY_END = 1, 2, 6, 7, 10
_UDATA_COMMENT = 0
_UDATA_KEY_ORDER, _UDATA_DATA_ORDER = 0, 1
_HOST_ORDER = (1).to_bytes(4, sys.byteorder)
"""libnftables' BYTEORDER_HOST_ENDIAN."""
_COMMENT_MAX = 127
_POLICY_DROP, _POLICY_ACCEPT = 0, 1
_TABLE_DORMANT = 0x1
_ATTR = struct.Struct("=HH")
_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")


class Unit(NamedTuple):
    """Messages (perhaps none) that belong into one transaction, and their command. Sequence numbers are still 0."""

    messages: tuple[bytes, ...]
    command: Command

    @property
    def size(self) -> int:
        return sum(map(len, self.messages))


def _nfgen(family: int, resource: int = 0) -> bytes:
    return struct.pack(">BBH", family, 0, resource)


def _family(family: Family) -> int:
    return 2 if family is Family.IPV4 else 10


def _message(kind: int, flags: int, table: TableRef, *attrs: bytes) -> bytes:
    return message(SUBSYSTEM << 8 | kind, NLM_F_REQUEST | flags, 0, _nfgen(_family(table.family)), *attrs)


# --- encoding -----------------------------------------------------------------------------------------------------


HeldChains = Mapping[tuple[TableRef, str], Sequence[HeldRule]]
"""(table, chain) → its rules."""


def encode_batch(batch: Batch, held: HeldChains | None = None) -> Iterator[Unit]:
    """Every command as one or more units, in order; large element lists make several, what comes afterwards none.

    `held`: what some chains hold now; they are edited, others are written anew."""
    chains = dict(held or {})
    for index, command in enumerate(batch.commands):
        if isinstance(command, AddElements | DelElements | ReplaceElements):
            yield from _element_units(command)
        elif isinstance(command, SetRules):
            place = (command.table, command.chain)
            edit = edit_rules(chains[place], command.rules) if place in chains else None
            yield Unit(_edit_messages(command, edit) if edit else _chain_messages(command), command)
            if place in chains:
                chains[place] = edit.result if edit else [HeldRule(rule, 0) for rule in command.rules]
        elif isinstance(command, DelChain):
            head = attr_str(1, command.table.name) + attr_str(3, command.name)
            yield Unit((_flush_message(command.table, command.name), _message(DELCHAIN, 0, command.table, head)), command)
        elif not isinstance(command, Prune | Sweep):
            yield Unit((_encode_object(command, index + 1),), command)


def frame(units: Sequence[Unit], first_seq: int) -> bytes:
    """One transaction: the units between BEGIN and END. Message n of them (from 0) has sequence number first_seq + 1 + n."""
    resource = _nfgen(0, SUBSYSTEM)
    parts = [message(BATCH_BEGIN, NLM_F_REQUEST, first_seq, resource)]
    seq = first_seq
    pack = struct.Struct("=I").pack
    for unit in units:
        for raw in unit.messages:
            seq += 1
            parts += (raw[:8], pack(seq), raw[12:])
    parts.append(message(BATCH_END, NLM_F_REQUEST, seq + 1, resource))
    return b"".join(parts)


def _encode_object(command: Command, ident: int) -> bytes:
    table = command.table
    match command:
        case AddTable():
            flags = attr_be32(2, _TABLE_DORMANT if command.dormant else 0)
            return _message(NEWTABLE, NLM_F_CREATE, table, attr_str(1, table.name), flags)
        case DelTable():
            return _message(DELTABLE, 0, table, attr_str(1, table.name))
        case AddChain(_, chain):
            return _message(NEWCHAIN, NLM_F_CREATE, table, attr_str(1, table.name), *_chain_attrs(chain))
        case AddSet(_, of):
            return _message(NEWSET, NLM_F_CREATE, table, attr_str(1, table.name), *_set_attrs(of, ident))
        case DelSet(_, name):
            return _message(DELSET, 0, table, attr_str(1, table.name), attr_str(2, name))
        case _:
            raise TypeError(f"{type(command).__name__} is no single object")


def _flush_message(table: TableRef, chain: str) -> bytes:
    return _message(DELRULE, 0, table, attr_str(1, table.name), attr_str(2, chain))


def _chain_messages(command: SetRules) -> tuple[bytes, ...]:
    return (_flush_message(command.table, command.chain), *(_rule_message(command, rule) for rule in command.rules))


def _edit_messages(command: SetRules, edit: Edit) -> tuple[bytes, ...]:
    """Insertions first: see `nftedit`."""
    head = (attr_str(1, command.table.name), attr_str(2, command.chain))
    deletions = (_message(DELRULE, 0, command.table, *head, attr_be64(3, handle)) for handle in edit.deletions)
    return (*(_rule_message(command, rule, before) for rule, before in edit.insertions), *deletions)


def _rule_message(command: SetRules, rule: Rule, before: int = 0) -> bytes:
    """`before`: the handle of the next rule; 0: the rule comes last."""
    attrs = [attr_str(1, command.table.name), attr_str(2, command.chain)]
    attrs.append(nested(4, *(encode_expression(e) for e in rule.expressions)))
    if before:
        attrs.append(attr_be64(6, before))
    if rule.comment:
        attrs.append(attr(7, _comment_udata(rule.comment)))
    return _message(NEWRULE, NLM_F_CREATE | (0 if before else NLM_F_APPEND), command.table, *attrs)


def _comment_udata(comment: str) -> bytes:
    """libnftnl's user data: type, length, NUL-terminated text; nft prints it as `comment`."""
    text = comment.encode()[:_COMMENT_MAX] + b"\0"
    return bytes((_UDATA_COMMENT, len(text))) + text


def _chain_attrs(chain: Chain) -> list[bytes]:
    attrs = [attr_str(3, chain.name)]
    if chain.base is not None:
        priority = chain.base.priority & 0xFFFFFFFF
        attrs.append(nested(4, attr_be32(1, chain.base.hook.value), attr_be32(2, priority)))
        attrs.append(attr_be32(5, _POLICY_DROP if chain.base.drops else _POLICY_ACCEPT))
        attrs.append(attr_str(7, chain.base.kind))
    return attrs


def _type_id(fields: Iterable[FieldType]) -> int:
    number = 0
    for f in fields:
        number = number << _TYPE_BITS | f.type_id
    return number


def _set_flags(of: NftSet) -> int:
    flags = _SET_MAP if of.is_map else 0
    if of.interval:
        flags |= _SET_INTERVAL | (_SET_CONCAT if len(of.key) > 1 else 0)
    if of.dynamic:
        flags |= _SET_EVAL | (_SET_TIMEOUT if of.timeout_s else 0)
    return flags


def _set_attrs(of: NftSet, ident: int) -> list[bytes]:
    attrs = [attr_str(2, of.name), attr_be32(3, _set_flags(of)), attr_be32(4, _type_id(of.key)), attr_be32(5, of.key_length)]
    if of.verdicts:
        attrs += [attr_be32(6, _DATA_TYPE_VERDICT), attr_be32(7, 0)]
    elif of.data:
        attrs += [attr_be32(6, _type_id(of.data)), attr_be32(7, sum(f.padded for f in of.data))]
    desc = [attr_be32(1, of.size)] if of.size else []
    if of.interval and len(of.key) > 1:
        desc.append(nested(2, *(nested(_LIST_ELEM, attr_be32(1, f.padded)) for f in of.key)))
    if desc:
        attrs.append(nested(9, *desc))
    attrs.append(attr_be32(10, ident))
    if of.timeout_s:
        attrs.append(attr_be64(11, of.timeout_s * 1000))
    if orders := _byte_orders(of):
        attrs.append(attr(13, orders))
    if of.counters:
        attrs.append(encode_expression(Counter(), type=17))
    return attrs


def _byte_orders(of: NftSet) -> bytes:
    """What libnftables has to be told to print a host-order number that is a key or data alone (else it knows)."""
    alone = ((_UDATA_KEY_ORDER, of.key), (_UDATA_DATA_ORDER, of.data))
    return b"".join(
        bytes((kind, 4)) + _HOST_ORDER for kind, fields in alone if len(fields) == 1 and fields[0] is FieldType.PRIORITY
    )


def _element_units(command: AddElements | DelElements | ReplaceElements) -> Iterator[Unit]:
    of, table = command.set, command.table
    head = attr_str(1, table.name) + attr_str(2, of.name)
    comments = {} if isinstance(command, DelElements) else command.comments
    for part in _slices(of, command.elements, _COMMENT_MAX if comments else 0):
        messages = []
        if not isinstance(command, AddElements):
            messages.append(_elements_message(DELSETELEM, 0, table, head, _encode_keys(of, part)))
        if not isinstance(command, DelElements):
            messages.append(_elements_message(NEWSETELEM, NLM_F_CREATE, table, head, _encode_elements(of, part, comments)))
        yield Unit(tuple(messages), command)


def _slices(of: NftSet, elements: tuple[Element, ...], extra: int) -> Iterator[tuple[Element, ...]]:
    """Cut a list so that each part fits ELEMENTS_PER_MESSAGE. `extra`: bytes that an element may have on top."""
    # At most 48 bytes of attribute headers an element, and 32 of chain name.
    size = 48 + extra + of.key_length * (2 if of.interval else 1) + sum(f.padded for f in of.data) + (32 if of.verdicts else 0)
    count = max(1, ELEMENTS_PER_MESSAGE // size)
    if len(elements) <= count:
        yield elements
        return
    for at in range(0, len(elements), count):
        yield elements[at : at + count]


def _elements_message(kind: int, flags: int, table: TableRef, head: bytes, elements: list[bytes]) -> bytes:
    return _message(kind, flags, table, head, attr(3 | NLA_F_NESTED, b"".join(elements)))


def _encode_keys(of: NftSet, elements: tuple[Element, ...]) -> list[bytes]:
    """NFTA_LIST_ELEM attributes without data. All of a set are of one length, so that headers are made once."""
    n = of.key_length
    if of.interval:
        return [_interval_element(n, key) for key, _ in elements]
    prefix = _ATTR.pack(12 + n, _LIST_ELEM | NLA_F_NESTED) + _key_head(n)
    return [prefix + key for key, _ in elements]


def _key_head(n: int) -> bytes:
    return _ATTR.pack(8 + n, _ELEM_KEY | NLA_F_NESTED) + _ATTR.pack(4 + n, 1)


def _encode_elements(of: NftSet, elements: tuple[Element, ...], comments: Mapping[bytes, str]) -> list[bytes]:
    """NFTA_LIST_ELEM attributes with data, verdicts and comments."""
    if of.verdicts or (comments and not of.interval):
        return _various_elements(of, elements, comments)
    if not of.data:
        return _encode_keys(of, elements)
    n, m = of.key_length, sum(f.padded for f in of.data)
    prefix = _ATTR.pack(12 + n + 8 + m, _LIST_ELEM | NLA_F_NESTED) + _key_head(n)
    middle = _ATTR.pack(8 + m, _ELEM_DATA | NLA_F_NESTED) + _ATTR.pack(4 + m, 1)
    return [b"".join((prefix, key, middle, data)) for key, data in elements]  # type: ignore[arg-type]  # a map's are bytes


def _various_elements(of: NftSet, elements: tuple[Element, ...], comments: Mapping[bytes, str]) -> list[bytes]:
    """Each its own length. A verdict is encoded once, and so is a comment: a Service's frontends share it."""
    encoded: dict[Data, bytes] = {None: b""}
    remarks: dict[str, bytes] = {"": b""}
    n, head = of.key_length, _key_head(of.key_length)
    out = []
    for key, data in elements:
        target = encoded.get(data)
        if target is None:
            target = encoded[data] = _element_data(data)
        comment = comments.get(key, "")
        remark = remarks.get(comment)
        if remark is None:
            remark = remarks[comment] = attr(_ELEM_USERDATA, _comment_udata(comment))
        size = _ATTR.pack(12 + n + len(target) + len(remark), _LIST_ELEM | NLA_F_NESTED)
        out.append(b"".join((size, head, key, target, remark)))
    return out


def _element_data(data: Data) -> bytes:
    if isinstance(data, Verdict):
        return encode_verdict(_ELEM_DATA, data)
    return nested(_ELEM_DATA, attr(1, data)) if data is not None else b""


def _interval_element(n: int, key: bytes) -> bytes:
    first, last = nested(_ELEM_KEY, attr(1, key[:n])), nested(_ELEM_KEY_END, attr(1, key[n:]))
    return nested(_LIST_ELEM, first, last)


# --- requests and answers -----------------------------------------------------------------------------------------


def dump_request(kind: int, table: TableRef, seq: int, *, set_name: str = "", chain: str = "") -> bytes:
    """A dump of the table's chains (GETCHAIN), rules (GETRULE; only those of `chain`), sets (GETSET) or of one set's elements
    (GETSETELEM)."""
    attrs = []
    if kind != GETCHAIN:  # chains are always dumped for the whole family
        attrs.append(attr_str(1, table.name))
    if set_name or chain:
        attrs.append(attr_str(2, set_name or chain))
    return message(SUBSYSTEM << 8 | kind, NLM_F_REQUEST | NLM_F_DUMP, seq, _nfgen(_family(table.family)), *attrs)


def element_requests(table: TableRef, of: NftSet, keys: Sequence[bytes]) -> list[bytes]:
    """Each asks for one element of a set without intervals; the answer is a NEWSETELEM message or the error ENOENT."""
    head = attr_str(1, table.name) + attr_str(2, of.name)
    elements = _encode_keys(of, tuple((key, None) for key in keys))
    return [_elements_message(GETSETELEM, 0, table, head, [element]) for element in elements]


def table_request(table: TableRef, seq: int) -> bytes:
    """Asks for one table; the answer is a NEWTABLE message or the error ENOENT."""
    return message(SUBSYSTEM << 8 | GETTABLE, NLM_F_REQUEST, seq, _nfgen(_family(table.family)), attr_str(1, table.name))


_BODY = 4
"""Where attributes start in a message's payload: behind struct nfgenmsg."""


def decode_dormant(msg: Message) -> bool:
    """Of a NEWTABLE message: whether the table is switched off."""
    flags = parse_attrs(msg.payload, _BODY).get(2)
    return flags is not None and bool(as_be(flags) & _TABLE_DORMANT)


def decode_chain(msg: Message) -> tuple[str, Chain]:
    """A NEWCHAIN message → (table, chain)."""
    a = parse_attrs(msg.payload, _BODY)
    base = None
    if 4 in a:
        hook = parse_attrs(a[4])
        priority = int.from_bytes(hook[2], "big", signed=True)
        drops = 5 in a and as_be(a[5]) == _POLICY_DROP
        base = BaseHook(as_str(a.get(7, b"filter")), Hook(as_be(hook[1])), priority, drops)
    return as_str(a[1]), Chain(as_str(a[3]), base)


def decode_rule(msg: Message) -> tuple[str, str, HeldRule]:
    """A NEWRULE message → (table, chain, rule)."""
    a = parse_attrs(msg.payload, _BODY)
    rule = Rule(decode_expressions(a.get(4, b"")), _decode_comment(a.get(7, b"")))
    return as_str(a[1]), as_str(a[2]), HeldRule(rule, as_be(a.get(3, b"\0")))


def _decode_comment(udata: bytes) -> str:
    at = 0
    while at + 2 <= len(udata):
        kind, length = udata[at], udata[at + 1]
        if kind == _UDATA_COMMENT:
            return as_str(udata[at + 2 : at + 2 + length])
        at += 2 + length
    return ""


def decode_set(msg: Message) -> tuple[str, NftSet | None]:
    """A NEWSET message → (table, set); None for an anonymous set. One with types that ours never have is without fields."""
    a = parse_attrs(msg.payload, _BODY)
    flags = as_be(a.get(3, b"\0"))
    table = as_str(a[1])
    if flags & _SET_ANONYMOUS:
        return table, None
    key = _fields(as_be(a[4]))
    verdicts = 6 in a and as_be(a[6]) == _DATA_TYPE_VERDICT
    data = _fields(as_be(a[6])) if 6 in a and not verdicts else ()
    if key is None or data is None:
        return table, NftSet(as_str(a[2]), ())
    desc = parse_attrs(a.get(9, b""))
    return table, NftSet(
        name=as_str(a[2]), key=key, data=data, verdicts=verdicts, interval=bool(flags & _SET_INTERVAL),
        timeout_s=as_be(a.get(11, b"\0")) // 1000, counters=bool(flags & _SET_EXPR) or 17 in a,
        size=as_be(desc.get(1, b"\0")), dynamic=bool(flags & _SET_EVAL),
    )  # fmt: skip


_FIELD_BY_ID = {f.type_id: f for f in FieldType}


def _fields(number: int) -> tuple[FieldType, ...] | None:
    """A concatenated type number → its fields; None if one is not ours."""
    fields: list[FieldType] = []
    while number:
        f = _FIELD_BY_ID.get(number & ((1 << _TYPE_BITS) - 1))
        if f is None:
            return None
        fields.insert(0, f)
        number >>= _TYPE_BITS
    return tuple(fields)


def decode_elements(msg: Message) -> Iterator[tuple[bytes, Data, tuple[int, int]]]:
    """A NEWSETELEM message → (key, data, (packets, bytes)) of each element; an interval's key is `first ‖ last`."""
    for _, item in iter_attrs(parse_attrs(msg.payload, _BODY).get(3, b"")):
        yield _decode_element(item)


def _decode_element(item: bytes) -> tuple[bytes, Data, tuple[int, int]]:
    # Written out rather than by parse_attrs: tens of thousands of these are read at an agent's start.
    key, end, data, counts = b"", b"", None, (0, 0)
    at, stop = 0, len(item)
    unpack = _ATTR.unpack_from
    while at + 4 <= stop:
        length, kind = unpack(item, at)
        kind &= NLA_TYPE_MASK
        body = item[at + 4 : at + length]
        if kind == _ELEM_KEY:
            key = body[4:]
        elif kind == _ELEM_DATA:
            data = body[4:] if unpack(body)[1] & NLA_TYPE_MASK == 1 else decode_data(body)
        elif kind == _ELEM_KEY_END:
            end = body[4:]
        elif kind == _ELEM_EXPR:
            counts = decode_counter(body)
        at += (length + 3) & ~3
    return key + end, data, counts


def message_kind(msg: Message) -> int:
    """NEWCHAIN, NEWRULE, …; −1 if the message is not nftables'."""
    return msg.type & 0xFF if msg.type >> 8 == SUBSYSTEM else -1
