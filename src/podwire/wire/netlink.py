"""Netlink framing, sans-IO: requests to bytes, datagrams to messages and acknowledgements.

Layout: linux/netlink.h. Headers and most values are in host byte order; nfnetlink's values are big-endian.
"""

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from podwire.model.errors import PodwireError

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12

NLMSG_NOOP = 1
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLMSG_OVERRUN = 4

NLM_F_REQUEST = 0x01
NLM_F_MULTI = 0x02
NLM_F_ACK = 0x04
NLM_F_ECHO = 0x08
NLM_F_DUMP_INTR = 0x10
NLM_F_ROOT = 0x100
NLM_F_MATCH = 0x200
NLM_F_DUMP = NLM_F_ROOT | NLM_F_MATCH
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800
NLM_F_CAPPED = 0x100
NLM_F_ACK_TLVS = 0x200

NLA_F_NESTED = 0x8000
NLA_F_NET_BYTEORDER = 0x4000
NLA_TYPE_MASK = 0x3FFF

SOL_NETLINK = 270
NETLINK_ADD_MEMBERSHIP = 1
NETLINK_NO_ENOBUFS = 5
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11
NETLINK_GET_STRICT_CHK = 12

_NLMSGERR_ATTR_MSG = 1
_NLMSGERR_ATTR_OFFS = 2

HEADER = struct.Struct("=IHHII")
_ATTR = struct.Struct("=HH")
_I32 = struct.Struct("=i")
_U8, _U16, _U32, _U64 = (struct.Struct(f"={code}") for code in "BHIQ")
_BE16, _BE32, _BE64 = (struct.Struct(f">{code}") for code in "HIQ")
_PADDING = (b"", b"\0\0\0", b"\0\0", b"\0")


class NetlinkError(PodwireError):
    """Bytes that are not netlink: cut off, or a length that leads outside."""


class Message(NamedTuple):
    """One netlink message. `payload` is what follows the 16-byte header, without padding."""

    type: int
    flags: int
    seq: int
    pid: int
    payload: bytes


class Ack(NamedTuple):
    """The kernel's answer to request `seq`. `errno` 0 is success; `message` is the extended ack's text, `offset` where
    in the request (from its header) the offending attribute is, −1 if not said."""

    seq: int
    errno: int
    message: str = ""
    offset: int = -1


def align(length: int) -> int:
    return (length + 3) & ~3


def message(type: int, flags: int, seq: int, *parts: bytes, pid: int = 0) -> bytes:
    """One message, padded to four bytes. `parts` are the family header and the attributes."""
    payload = b"".join(parts)
    length = HEADER.size + len(payload)
    return HEADER.pack(length, type, flags, seq, pid) + payload + _PADDING[length & 3]


def with_seq(raw: bytes, seq: int, extra_flags: int = 0) -> bytes:
    """The same message under another sequence number, with flags added."""
    length, type_, flags, _, pid = HEADER.unpack_from(raw)
    return HEADER.pack(length, type_, flags | extra_flags, seq, pid) + raw[HEADER.size :]


def attr(type: int, data: bytes = b"") -> bytes:
    """One attribute, padded. Raises NetlinkError if `data` does not fit its 16-bit length."""
    length = 4 + len(data)
    if length > 0xFFFF:
        raise NetlinkError(f"attribute {type & NLA_TYPE_MASK} has {len(data)} bytes: more than 65531 do not fit")
    return _ATTR.pack(length, type) + data + _PADDING[length & 3]


def nested(type: int, *attrs: bytes) -> bytes:
    """An attribute that holds attributes (NLA_F_NESTED set)."""
    return attr(type | NLA_F_NESTED, b"".join(attrs))


def attr_u8(type: int, value: int) -> bytes:
    return attr(type, _U8.pack(value))


def attr_u16(type: int, value: int) -> bytes:
    return attr(type, _U16.pack(value))


def attr_u32(type: int, value: int) -> bytes:
    return attr(type, _U32.pack(value))


def attr_u64(type: int, value: int) -> bytes:
    return attr(type, _U64.pack(value))


def attr_be16(type: int, value: int) -> bytes:
    return attr(type, _BE16.pack(value))


def attr_be32(type: int, value: int) -> bytes:
    return attr(type, _BE32.pack(value))


def attr_be64(type: int, value: int) -> bytes:
    return attr(type, _BE64.pack(value))


def attr_str(type: int, text: str) -> bytes:
    """A NUL-terminated string."""
    return attr(type, text.encode() + b"\0")


def as_u8(data: bytes) -> int:
    return _number(_U8, data)


def as_u16(data: bytes) -> int:
    return _number(_U16, data)


def as_u32(data: bytes) -> int:
    return _number(_U32, data)


def _number(layout: struct.Struct, data: bytes) -> int:
    if len(data) < layout.size:
        raise NetlinkError(f"a number of {layout.size} bytes has {len(data)}")
    value: int = layout.unpack_from(data)[0]
    return value


def as_be(data: bytes) -> int:
    """A big-endian number of any width (nfnetlink)."""
    return int.from_bytes(data, "big")


def as_str(data: bytes) -> str:
    """A string attribute; with or without its NUL."""
    return data.split(b"\0", 1)[0].decode(errors="replace")


def parse_attrs(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """Attributes by type (flag bits cleared); of one that occurs twice the last wins. See `iter_attrs` for lists."""
    return dict(iter_attrs(data, offset))


def iter_attrs(data: bytes, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """All attributes in order, as (type with flag bits cleared, payload). Raises NetlinkError where one is cut off."""
    end = len(data)
    while end - offset >= 4:
        length, type_ = _ATTR.unpack_from(data, offset)
        if length < 4 or offset + length > end:
            raise NetlinkError(f"attribute at byte {offset} says {length} bytes of {end - offset}")
        yield type_ & NLA_TYPE_MASK, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def parse_messages(data: bytes) -> Iterator[Message]:
    """All messages of one datagram. Raises NetlinkError where one is cut off."""
    offset, end = 0, len(data)
    while end - offset >= HEADER.size:
        length, type_, flags, seq, pid = HEADER.unpack_from(data, offset)
        if length < HEADER.size or offset + length > end:
            raise NetlinkError(f"message at byte {offset} says {length} bytes of {end - offset}")
        yield Message(type_, flags, seq, pid, data[offset + HEADER.size : offset + length])
        offset += (length + 3) & ~3


def parse_ack(msg: Message) -> Ack:
    """NLMSG_ERROR or NLMSG_DONE → Ack. The errno is positive."""
    if len(msg.payload) < 4:
        return Ack(msg.seq, 0)  # an old kernel's NLMSG_DONE may be empty
    code = -_I32.unpack_from(msg.payload)[0]
    if msg.type == NLMSG_DONE:
        tlvs = 4
    else:
        # struct nlmsgerr repeats the request, whole unless capped, before the extended ack's attributes.
        original = HEADER.size
        if not msg.flags & NLM_F_CAPPED and len(msg.payload) >= 8:
            original = align(_U32.unpack_from(msg.payload, 4)[0])
        tlvs = 4 + original
    text, offset = "", -1
    if msg.flags & NLM_F_ACK_TLVS and tlvs < len(msg.payload):
        attrs = parse_attrs(msg.payload, tlvs)
        text = as_str(attrs.get(_NLMSGERR_ATTR_MSG, b""))
        if _NLMSGERR_ATTR_OFFS in attrs:
            offset = as_u32(attrs[_NLMSGERR_ATTR_OFFS])
    return Ack(msg.seq, max(code, 0), text, offset)


@dataclass(slots=True)
class Dump:
    """Collects the answer to one dump request. Feed it datagrams until `done`.

    `interrupted`: the table changed while it was read (NLM_F_DUMP_INTR), so the answer may lack entries: ask again."""

    seq: int
    messages: list[Message] = field(default_factory=list)
    done: bool = False
    interrupted: bool = False
    errno: int = 0
    text: str = ""

    def feed(self, datagram: bytes) -> None:
        for msg in parse_messages(datagram):
            if msg.seq != self.seq or self.done:
                continue
            if msg.flags & NLM_F_DUMP_INTR:
                self.interrupted = True
            if msg.type in (NLMSG_DONE, NLMSG_ERROR):
                ack = parse_ack(msg)
                self.done, self.errno, self.text = True, ack.errno, ack.message
            elif msg.type not in (NLMSG_NOOP, NLMSG_OVERRUN):
                self.messages.append(msg)


@dataclass(slots=True)
class Batch:
    """Requests that go out in one datagram and the answers to them.

    Only the last request asks for an acknowledgement; the kernel executes in order and always reports a refusal, so the
    answer to the last closes the batch and every earlier request without an error succeeded."""

    first_seq: int
    requests: tuple[bytes, ...]
    errors: dict[int, Ack] = field(default_factory=dict)
    """Index of the request → its refusal."""
    answers: dict[int, Message] = field(default_factory=dict)
    """Index of the request → the object it asked for (non-dump GET)."""
    done: bool = False

    def encode(self) -> bytes:
        last = len(self.requests) - 1
        return b"".join(
            with_seq(raw, self.first_seq + index, NLM_F_ACK if index == last else 0) for index, raw in enumerate(self.requests)
        )

    def feed(self, datagram: bytes) -> None:
        for msg in parse_messages(datagram):
            index = msg.seq - self.first_seq
            if not 0 <= index < len(self.requests):
                continue  # left over from a request that was given up
            if msg.type == NLMSG_ERROR:
                ack = parse_ack(msg)
                if ack.errno:
                    self.errors[index] = ack
                if index == len(self.requests) - 1:
                    self.done = True
            elif msg.type > NLMSG_OVERRUN:
                self.answers[index] = msg


def chunks(requests: Iterable[bytes], *, max_bytes: int, max_count: int) -> Iterator[tuple[bytes, ...]]:
    """Group requests, in order, into datagrams below both limits; one that is larger alone goes alone."""
    group: list[bytes] = []
    size = 0
    for raw in requests:
        if group and (size + len(raw) > max_bytes or len(group) >= max_count):
            yield tuple(group)
            group, size = [], 0
        group.append(raw)
        size += len(raw)
    if group:
        yield tuple(group)
