"""IPVS' generic netlink family, sans-IO: `model.ipvs` to requests, and back. Layout: linux/{genetlink,ip_vs}.h."""

import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from podwire.model.ipvs import DelReal, DelVirtual, IpvsOp, SetReal, SetVirtual, VirtualKey
from podwire.model.servicetable import Backend, backend, backend_address, backend_port
from podwire.wire.netlink import (
    NLM_F_DUMP,
    NLM_F_REQUEST,
    Message,
    as_be,
    as_str,
    as_u16,
    as_u32,
    attr,
    attr_be16,
    attr_str,
    attr_u16,
    attr_u32,
    message,
    nested,
    parse_attrs,
)

NETLINK_GENERIC = 16

_GENL_ID_CTRL, _CTRL_CMD_GETFAMILY = 16, 3
_CTRL_ATTR_FAMILY_ID, _CTRL_ATTR_FAMILY_NAME = 1, 2
_GENL = struct.Struct("=BBH")
_VERSION = 1

_NEW_SERVICE, _SET_SERVICE, _DEL_SERVICE, _GET_SERVICE = 1, 2, 3, 4
_NEW_DEST, _SET_DEST, _DEL_DEST, _GET_DEST = 5, 6, 7, 8
_CMD_SERVICE, _CMD_DEST = 1, 2
_SVC_AF, _SVC_PROTOCOL, _SVC_ADDR, _SVC_PORT, _SVC_FWMARK = 1, 2, 3, 4, 5
_SVC_SCHED_NAME, _SVC_FLAGS, _SVC_TIMEOUT, _SVC_NETMASK = 6, 7, 8, 9
_DEST_ADDR, _DEST_PORT, _DEST_FWD_METHOD, _DEST_WEIGHT = 1, 2, 3, 4
_DEST_U_THRESH, _DEST_L_THRESH, _DEST_ACTIVE, _DEST_INACTIVE = 5, 6, 7, 8
_DEST_STATS64, _STATS_CONNECTIONS = 12, 1
_FLAGS = struct.Struct("=II")
_PERSISTENT = 0x0001
_MASQUERADING = 0
_AF_INET, _AF_INET6 = 2, 10
_ALL_OF_IPV4 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class HeldVirtual:
    """A virtual server as the kernel has it. One that goes by packet mark is nobody's `VirtualKey`: it is not read."""

    key: VirtualKey
    scheduler: str
    persistence_s: int


@dataclass(frozen=True, slots=True)
class HeldReal:
    """A real server; `connections`: those that are open or ending; `accepted`: all there have been."""

    server: Backend
    weight: int
    connections: int
    accepted: int


def get_family() -> bytes:
    """Ask for the number of the family "IPVS"; ENOENT where the kernel has none."""
    header = _GENL.pack(_CTRL_CMD_GETFAMILY, 1, 0)
    return message(_GENL_ID_CTRL, NLM_F_REQUEST, 0, header, attr_str(_CTRL_ATTR_FAMILY_NAME, "IPVS"))


def read_family(msg: Message) -> int:
    """The answer to `get_family`."""
    return as_u16(parse_attrs(msg.payload, _GENL.size).get(_CTRL_ATTR_FAMILY_ID, b""))


def encode(family: int, op: IpvsOp) -> bytes:
    match op:
        case SetVirtual(key, scheduler, persistence_s, new):
            return _request(family, _NEW_SERVICE if new else _SET_SERVICE, _service(key, scheduler, persistence_s))
        case DelVirtual(key):
            return _request(family, _DEL_SERVICE, _identity(key))
        case SetReal(key, server, weight, new):
            return _request(family, _NEW_DEST if new else _SET_DEST, _identity(key), _destination(server, weight))
        case DelReal(key, server):
            return _request(family, _DEL_DEST, _identity(key), _destination(server, 0))


def dump_virtual(family: int) -> bytes:
    return message(family, NLM_F_REQUEST | NLM_F_DUMP, 0, _GENL.pack(_GET_SERVICE, _VERSION, 0))


def dump_real(family: int, key: VirtualKey) -> bytes:
    """The real servers of one virtual server."""
    return message(family, NLM_F_REQUEST | NLM_F_DUMP, 0, _GENL.pack(_GET_DEST, _VERSION, 0), _identity(key))


def _request(family: int, command: int, *attrs: bytes) -> bytes:
    return message(family, NLM_F_REQUEST, 0, _GENL.pack(command, _VERSION, 0), *attrs)


def _key(key: VirtualKey) -> tuple[bytes, ...]:
    return (
        attr_u16(_SVC_AF, _AF_INET if len(key.address) == 4 else _AF_INET6),
        attr_u16(_SVC_PROTOCOL, key.protocol),
        attr(_SVC_ADDR, key.address.ljust(16, b"\0")),
        attr_be16(_SVC_PORT, key.port),
    )


def _identity(key: VirtualKey) -> bytes:
    return nested(_CMD_SERVICE, *_key(key))


def _service(key: VirtualKey, scheduler: str, persistence_s: int) -> bytes:
    flags = _PERSISTENT if persistence_s else 0
    return nested(
        _CMD_SERVICE,
        *_key(key),
        attr_str(_SVC_SCHED_NAME, scheduler),
        attr(_SVC_FLAGS, _FLAGS.pack(flags, 0xFFFFFFFF)),
        attr_u32(_SVC_TIMEOUT, persistence_s),
        # Which bits of a client's address make it the same client: all.
        attr_u32(_SVC_NETMASK, _ALL_OF_IPV4 if len(key.address) == 4 else 128),
    )


def _destination(server: Backend, weight: int) -> bytes:
    return nested(
        _CMD_DEST,
        attr(_DEST_ADDR, backend_address(server).ljust(16, b"\0")),
        attr_be16(_DEST_PORT, backend_port(server)),
        attr_u32(_DEST_FWD_METHOD, _MASQUERADING),
        attr_u32(_DEST_WEIGHT, weight),
        attr_u32(_DEST_U_THRESH, 0),
        attr_u32(_DEST_L_THRESH, 0),
    )


def read_virtual(messages: Iterable[Message]) -> list[HeldVirtual]:
    """The answer to `dump_virtual`."""
    found = []
    for msg in messages:
        attrs = parse_attrs(parse_attrs(msg.payload, _GENL.size).get(_CMD_SERVICE, b""))
        if _SVC_FWMARK in attrs or _SVC_ADDR not in attrs:
            continue
        length = 4 if as_u16(attrs[_SVC_AF]) == _AF_INET else 16
        key = VirtualKey(attrs[_SVC_ADDR][:length], as_u16(attrs[_SVC_PROTOCOL]), as_be(attrs[_SVC_PORT]))
        flags, _ = _FLAGS.unpack_from(attrs[_SVC_FLAGS])
        persistence = as_u32(attrs[_SVC_TIMEOUT]) if flags & _PERSISTENT else 0
        found.append(HeldVirtual(key, as_str(attrs[_SVC_SCHED_NAME]), persistence))
    return found


def read_real(key: VirtualKey, messages: Iterable[Message]) -> list[HeldReal]:
    """The answer to `dump_real`."""
    found = []
    for msg in messages:
        attrs = parse_attrs(parse_attrs(msg.payload, _GENL.size).get(_CMD_DEST, b""))
        if _DEST_ADDR not in attrs:
            continue
        server = backend(attrs[_DEST_ADDR][: len(key.address)], as_be(attrs[_DEST_PORT]))
        connections = as_u32(attrs[_DEST_ACTIVE]) + as_u32(attrs[_DEST_INACTIVE])
        stats = parse_attrs(attrs.get(_DEST_STATS64, b""))
        accepted = int.from_bytes(stats.get(_STATS_CONNECTIONS, b""), sys.byteorder)
        found.append(HeldReal(server, as_u32(attrs[_DEST_WEIGHT]), connections, accepted))
    return found
