"""IPVS' netlink family: requests as the kernel reads them, answers as it gives them."""

import struct
import sys

from podwire.model.ipvs import DelReal, DelVirtual, SetReal, SetVirtual, VirtualKey
from podwire.model.servicetable import backend
from podwire.wire import ipvs
from podwire.wire.netlink import HEADER, Message, attr, attr_be16, attr_str, attr_u16, attr_u32, nested, parse_attrs

V4, V6 = VirtualKey(bytes((10, 96, 0, 1)), 6, 443), VirtualKey(bytes(15) + b"\1", 17, 53)
SERVER = backend(bytes((10, 244, 1, 2)), 6443)
GENL = 4


def attributes(request: bytes) -> tuple[int, dict[int, bytes]]:
    """(command, attributes) of a request."""
    return request[HEADER.size], parse_attrs(request, HEADER.size + GENL)


def test_a_virtual_server_is_named_by_family_protocol_address_and_port() -> None:
    command, found = attributes(ipvs.encode(30, DelVirtual(V4)))
    service = parse_attrs(found[1])
    assert command == 3
    assert service == {
        1: struct.pack("=H", 2),
        2: struct.pack("=H", 6),
        3: bytes((10, 96, 0, 1)) + bytes(12),
        4: b"\x01\xbb",
    }
    _, found = attributes(ipvs.encode(30, DelVirtual(V6)))
    assert parse_attrs(found[1])[1] == struct.pack("=H", 10)


def test_persistence_is_a_flag_and_a_time() -> None:
    command, found = attributes(ipvs.encode(30, SetVirtual(V4, "lc", 600, new=True)))
    service = parse_attrs(found[1])
    assert command == 1
    assert service[6] == b"lc\0"
    assert struct.unpack("=II", service[7]) == (1, 0xFFFFFFFF)
    assert struct.unpack("=I", service[8]) == (600,)
    command, found = attributes(ipvs.encode(30, SetVirtual(V6, "rr", 0, new=False)))
    assert command == 2
    assert struct.unpack("=I", parse_attrs(found[1])[9]) == (128,), "of IPv6 it is a prefix length"


def test_a_real_server_is_reached_by_masquerading() -> None:
    command, found = attributes(ipvs.encode(30, SetReal(V4, SERVER, 0, new=False)))
    dest = parse_attrs(found[2])
    assert command == 6
    assert dest[1][:4] == bytes((10, 244, 1, 2))
    assert dest[2] == (6443).to_bytes(2, "big")
    assert dest[3] == dest[4] == bytes(4)
    assert attributes(ipvs.encode(30, DelReal(V4, SERVER)))[0] == 7


def message(*attrs: bytes) -> Message:
    return Message(30, 0, 1, 1, bytes(GENL) + b"".join(attrs))


def test_answers() -> None:
    identity = (attr_u16(1, 2), attr_u16(2, 6), attr(3, V4.address.ljust(16, b"\0")), attr_be16(4, 443))
    rest = (attr_str(6, "rr"), attr(7, struct.pack("=II", 3, 0)), attr_u32(8, 600))
    by_mark = message(nested(1, attr_u16(1, 2), attr_u32(5, 77), *rest))
    (held,) = ipvs.read_virtual([message(nested(1, *identity, *rest)), by_mark])
    assert held == ipvs.HeldVirtual(V4, "rr", 600)
    dest = nested(
        2, attr(1, bytes((10, 244, 1, 2)) + bytes(12)), attr_be16(2, 6443), attr_u32(4, 1), attr_u32(7, 3), attr_u32(8, 4),
        nested(12, attr(1, (9).to_bytes(8, sys.byteorder)))
    )  # fmt: skip
    assert ipvs.read_real(V4, [message(dest)]) == [ipvs.HeldReal(SERVER, 1, 7, 9)]
