"""The codec of nftables expressions: `model.nftexpr` values ⇄ NFTA_LIST_ELEM attributes (linux/netfilter/nf_tables.h).

All numbers are big-endian, register contents (cmp and bitwise data) are raw. Decoding is the inverse of encoding for every
expression that we write; any other becomes `Unknown`.
"""

from collections.abc import Callable
from functools import lru_cache

from podwire.model.nftexpr import (
    REGISTERS,
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
    Verdict,
    VerdictCode,
)  # fmt: skip
from podwire.wire.netlink import as_be, as_str, attr, attr_be32, attr_be64, attr_str, attr_u8, iter_attrs, nested, parse_attrs

_KNOWN = 1 << 11
"""Expressions that are remembered with their bytes: a table's rules are made of some hundred, again and again."""

_LIST_ELEM = 1
_EXPR_NAME, _EXPR_DATA = 1, 2
_DATA_VALUE, _DATA_VERDICT = 1, 2
_VERDICT_CODE, _VERDICT_CHAIN = 1, 2
_VERDICT_REGISTER = 0

_NFPROTO_IPV4, _NFPROTO_IPV6 = 2, 10
_NAT_DNAT = 1
_RANGE_PROTO_RANDOM_FULLY = 1 << 4
_RANGE_GIVEN = 1 << 0 | 1 << 1
"""NF_NAT_RANGE_MAP_IPS and _PROTO_SPECIFIED: what the kernel makes of an address and a port."""
_NG_RANDOM = 1
_CT_DIR_ORIGINAL = 0
_LOOKUP_INVERTED = 1
_REJECT_ICMP_UNREACH, _REJECT_TCP_RST = 0, 1
_PORT_UNREACH = {False: 3, True: 4}
"""ICMP_PORT_UNREACH and ICMPV6_PORT_UNREACH, by whether it is IPv6."""
_FIB_ADDRTYPE, _FIB_SADDR = 3, 1

Attrs = dict[int, bytes]


def _register(index: int) -> int:
    """Our index 0..15 → the kernel's number, as it dumps it: NFT_REG_1..4 at every fourth, else NFT_REG32_n."""
    if not 0 <= index < REGISTERS:
        raise ValueError(f"register {index} is not one of 0 to {REGISTERS - 1}")
    return 1 + index // 4 if index % 4 == 0 else 8 + index


def _index(data: bytes) -> int:
    number = as_be(data)
    return (number - 1) * 4 if 1 <= number <= 4 else number - 8


def _reg(type: int, index: int) -> bytes:
    return attr_be32(type, _register(index))


def encode_verdict(type: int, verdict: Verdict) -> bytes:
    """The attribute `type` holding a verdict, as in element data and in `immediate`."""
    parts = [attr_be32(_VERDICT_CODE, verdict.code.value & 0xFFFFFFFF)]
    if verdict.chain:
        parts.append(attr_str(_VERDICT_CHAIN, verdict.chain))
    return nested(type, nested(_DATA_VERDICT, *parts))


def decode_data(payload: bytes) -> bytes | Verdict:
    """Element or immediate data: the raw value, or a verdict."""
    attrs = parse_attrs(payload)
    if _DATA_VALUE in attrs:
        return attrs[_DATA_VALUE]
    verdict = parse_attrs(attrs[_DATA_VERDICT])
    code = int.from_bytes(verdict[_VERDICT_CODE], "big", signed=True)
    return Verdict(VerdictCode(code), as_str(verdict.get(_VERDICT_CHAIN, b"")))


def _value(type: int, data: bytes) -> bytes:
    return nested(type, attr(_DATA_VALUE, data))


def _encode_parts(expr: Expression) -> tuple[str, list[bytes]]:
    """The expression's kernel name and its attributes."""
    match expr:
        case Payload(base, offset, length, dreg):
            return "payload", [_reg(1, dreg), attr_be32(2, base.value), attr_be32(3, offset), attr_be32(4, length)]
        case Meta(key, dreg):
            return "meta", [attr_be32(2, key.value), _reg(1, dreg)]
        case SetMeta(key, sreg):
            return "meta", [attr_be32(2, key.value), _reg(3, sreg)]
        case Ct(key, dreg, original):
            return "ct", [attr_be32(2, key.value), _reg(1, dreg)] + ([attr_u8(3, _CT_DIR_ORIGINAL)] if original else [])
        case Cmp(op, sreg, data):
            return "cmp", [_reg(1, sreg), attr_be32(2, op.value), _value(3, data)]
        case Bitwise(sreg, dreg, mask, xor):
            return "bitwise", [_reg(1, sreg), _reg(2, dreg), attr_be32(3, len(mask)), _value(4, mask), _value(5, xor)]
        case Lookup():
            return "lookup", _lookup_parts(expr)
        case Numgen(dreg, modulus):
            return "numgen", [_reg(1, dreg), attr_be32(2, modulus), attr_be32(3, _NG_RANDOM)]
        case Dnat(ipv6, address, port):
            family = _NFPROTO_IPV6 if ipv6 else _NFPROTO_IPV4
            return "nat", [attr_be32(1, _NAT_DNAT), attr_be32(2, family), _reg(3, address), _reg(5, port)]
        case Masquerade(fully_random):
            return "masq", [attr_be32(1, _RANGE_PROTO_RANDOM_FULLY)] if fully_random else []
        case Immediate(verdict):
            return "immediate", [attr_be32(1, _VERDICT_REGISTER), encode_verdict(2, verdict)]
        case Constant(data, dreg):
            return "immediate", [_reg(1, dreg), _value(2, data)]
        case Dynset():
            return "dynset", _dynset_parts(expr)
        case Reject(tcp_reset, ipv6):
            if tcp_reset:
                return "reject", [attr_be32(1, _REJECT_TCP_RST), attr_u8(2, 0)]
            return "reject", [attr_be32(1, _REJECT_ICMP_UNREACH), attr_u8(2, _PORT_UNREACH[ipv6])]
        case Counter():
            return "counter", [attr_be64(1, 0), attr_be64(2, 0)]
        case FibSaddrType(dreg):
            return "fib", [_reg(1, dreg), attr_be32(2, _FIB_ADDRTYPE), attr_be32(3, _FIB_SADDR)]
        case Unknown(name):
            raise ValueError(f"expression {name!r} was read from the kernel and cannot be written")


def _lookup_parts(expr: Lookup) -> list[bytes]:
    parts = [attr_str(1, expr.set), _reg(2, expr.sreg)]
    if expr.verdict:
        parts.append(attr_be32(3, _VERDICT_REGISTER))
    elif expr.dreg is not None:
        parts.append(_reg(3, expr.dreg))
    if expr.inverted:
        parts.append(attr_be32(5, _LOOKUP_INVERTED))
    return parts


def _dynset_parts(expr: Dynset) -> list[bytes]:
    parts = [attr_str(1, expr.set), attr_be32(3, expr.op.value), _reg(4, expr.sreg_key)]
    if expr.sreg_data is not None:
        parts.append(_reg(5, expr.sreg_data))
    if expr.timeout_s:
        parts.append(attr_be64(6, expr.timeout_s * 1000))
    return parts


@lru_cache(maxsize=_KNOWN)
def encode_expression(expr: Expression, type: int = _LIST_ELEM) -> bytes:
    """One expression as the attribute `type` (a list's element unless said otherwise)."""
    name, parts = _encode_parts(expr)
    return nested(type, attr_str(_EXPR_NAME, name), nested(_EXPR_DATA, *parts))


# --- decoding -----------------------------------------------------------------------------------------------------


def _decode_payload(a: Attrs) -> Expression | None:
    return Payload(PayloadBase(as_be(a[2])), as_be(a[3]), as_be(a[4]), _index(a[1])) if 1 in a else None


def _decode_meta(a: Attrs) -> Expression | None:
    key = MetaKey(as_be(a[2]))
    return Meta(key, _index(a[1])) if 1 in a else SetMeta(key, _index(a[3]))


def _decode_ct(a: Attrs) -> Expression | None:
    if 1 not in a or as_be(a.get(3, b"\0")) != _CT_DIR_ORIGINAL:
        return None
    return Ct(CtKey(as_be(a[2])), _index(a[1]), original=3 in a)


def _decode_cmp(a: Attrs) -> Expression | None:
    data = decode_data(a[3])
    return Cmp(CmpOp(as_be(a[2])), _index(a[1]), data) if isinstance(data, bytes) else None


def _decode_bitwise(a: Attrs) -> Expression | None:
    if as_be(a.get(6, b"\0")):
        return None  # a shift
    mask, xor = decode_data(a[4]), decode_data(a[5])
    return Bitwise(_index(a[1]), _index(a[2]), mask, xor) if isinstance(mask, bytes) and isinstance(xor, bytes) else None


def _decode_lookup(a: Attrs) -> Expression | None:
    verdict = 3 in a and as_be(a[3]) == _VERDICT_REGISTER
    dreg = _index(a[3]) if 3 in a and not verdict else None
    inverted = bool(as_be(a.get(5, b"\0")) & _LOOKUP_INVERTED)
    return Lookup(as_str(a[1]), _index(a[2]), dreg, verdict=verdict, inverted=inverted)


def _decode_numgen(a: Attrs) -> Expression | None:
    if as_be(a[3]) != _NG_RANDOM or as_be(a.get(4, b"\0")):
        return None
    return Numgen(_index(a[1]), as_be(a[2]))


def _decode_nat(a: Attrs) -> Expression | None:
    if as_be(a[1]) != _NAT_DNAT or not {3, 5} <= a.keys() or a.get(4, a[3]) != a[3] or a.get(6, a[5]) != a[5]:
        return None
    if as_be(a.get(7, b"\0")) & ~_RANGE_GIVEN:
        return None  # random, persistent
    return Dnat(as_be(a[2]) == _NFPROTO_IPV6, _index(a[3]), _index(a[5]))


def _decode_masq(a: Attrs) -> Expression | None:
    if 2 in a:
        return None
    return Masquerade(bool(as_be(a.get(1, b"\0")) & _RANGE_PROTO_RANDOM_FULLY))


def _decode_immediate(a: Attrs) -> Expression | None:
    data = decode_data(a[2])
    return Immediate(data) if isinstance(data, Verdict) else Constant(data, _index(a[1]))


def _decode_dynset(a: Attrs) -> Expression | None:
    if as_be(a.get(9, b"\0")):
        return None  # inverted, or with a stateful expression
    data = _index(a[5]) if 5 in a else None
    return Dynset(DynsetOp(as_be(a[3])), as_str(a[1]), _index(a[4]), data, as_be(a.get(6, b"\0")) // 1000)


def _decode_reject(a: Attrs) -> Expression | None:
    kind, code = as_be(a[1]), as_be(a.get(2, b"\0"))
    if kind == _REJECT_TCP_RST:
        return Reject(tcp_reset=True, family_is_ipv6=False)
    if kind == _REJECT_ICMP_UNREACH and code in _PORT_UNREACH.values():
        return Reject(tcp_reset=False, family_is_ipv6=code == _PORT_UNREACH[True])
    return None


def _decode_counter(a: Attrs) -> Expression | None:
    return Counter()


def _decode_fib(a: Attrs) -> Expression | None:
    return FibSaddrType(_index(a[1])) if (as_be(a[2]), as_be(a[3])) == (_FIB_ADDRTYPE, _FIB_SADDR) else None


_DECODERS: dict[str, Callable[[Attrs], Expression | None]] = {
    "payload": _decode_payload, "meta": _decode_meta, "ct": _decode_ct, "cmp": _decode_cmp, "bitwise": _decode_bitwise,
    "lookup": _decode_lookup, "numgen": _decode_numgen, "nat": _decode_nat, "masq": _decode_masq,
    "immediate": _decode_immediate, "dynset": _decode_dynset, "reject": _decode_reject, "counter": _decode_counter,
    "fib": _decode_fib,
}  # fmt: skip


@lru_cache(maxsize=_KNOWN)
def decode_expression(payload: bytes) -> Expression:
    """One list element's content → the expression; what we never write becomes `Unknown`."""
    outer = parse_attrs(payload)
    name, data = as_str(outer[_EXPR_NAME]), outer.get(_EXPR_DATA, b"")
    decoder = _DECODERS.get(name)
    if decoder is None:
        return Unknown(name, data)
    try:
        return decoder(parse_attrs(data)) or Unknown(name, data)
    except (KeyError, ValueError):  # an attribute or a number that ours never have
        return Unknown(name, data)


@lru_cache(maxsize=_KNOWN)
def decode_expressions(payload: bytes) -> tuple[Expression, ...]:
    """The content of NFTA_RULE_EXPRESSIONS."""
    return tuple(decode_expression(item) for _, item in iter_attrs(payload))


def decode_counter(payload: bytes) -> tuple[int, int]:
    """The content of an NFTA_SET_ELEM_EXPR holding a counter → (packets, bytes); (0, 0) for any other expression."""
    outer = parse_attrs(payload)
    if as_str(outer[_EXPR_NAME]) != "counter":
        return 0, 0
    a = parse_attrs(outer[_EXPR_DATA])
    return as_be(a[2]), as_be(a[1])
