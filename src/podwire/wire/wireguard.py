"""WireGuard's generic netlink family, sans-IO: devices and peers from `model.kernelstate` to requests, and back.

Layout: linux/{genetlink,wireguard}.h. Keys are base64 in values and 32 bytes on the wire.
"""

import base64
import binascii
import ipaddress
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from podwire.model.addr import IPAddress, IPNetwork
from podwire.model.kernelstate import Wireguard, WireguardPeer
from podwire.wire.netlink import (
    NLM_F_DUMP,
    NLM_F_REQUEST,
    Message,
    NetlinkError,
    as_u8,
    as_u16,
    attr,
    attr_str,
    attr_u8,
    attr_u16,
    attr_u32,
    iter_attrs,
    message,
    nested,
    parse_attrs,
)

NETLINK_GENERIC = 16
KEY_BYTES = 32

_GENL_ID_CTRL, _CTRL_CMD_GETFAMILY = 16, 3
_CTRL_ATTR_FAMILY_ID, _CTRL_ATTR_FAMILY_NAME = 1, 2
_GENL = struct.Struct("=BBH")

_GET_DEVICE, _SET_DEVICE, _VERSION = 0, 1, 1
_DEVICE_IFNAME, _DEVICE_PRIVATE_KEY, _DEVICE_LISTEN_PORT, _DEVICE_PEERS = 2, 3, 6, 8
_PEER_PUBLIC_KEY, _PEER_PSK, _PEER_FLAGS, _PEER_ENDPOINT, _PEER_KEEPALIVE, _PEER_ALLOWED = 1, 2, 3, 4, 5, 9
_ALLOWED_FAMILY, _ALLOWED_ADDRESS, _ALLOWED_LENGTH = 1, 2, 3
_REMOVE, _REPLACE_ALLOWED = 1, 2
_AF_INET, _AF_INET6 = 2, 10
_SOCKADDR_IN = struct.Struct("=H2s4s8x")
_SOCKADDR_IN6 = struct.Struct("=H2sI16sI")

_REMEMBERED = 4096
"""Peers as they were read: devices are read often, and change seldom."""


@dataclass(frozen=True, slots=True)
class WireguardState:
    """A device as the kernel has it; peers without their endpoints, see `WireguardPeer`."""

    device: Wireguard
    peers: tuple[WireguardPeer, ...]


def key_bytes(text: str) -> bytes:
    """A key from its base64 form. Raises ValueError unless it has 32 bytes."""
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("a WireGuard key is not base64") from error
    if len(raw) != KEY_BYTES:
        raise ValueError(f"a WireGuard key has {len(raw)} bytes; it must have {KEY_BYTES}")
    return raw


def get_family() -> bytes:
    """Ask for the number of the family "wireguard"; ENOENT where the kernel has none."""
    header = _GENL.pack(_CTRL_CMD_GETFAMILY, 1, 0)
    return message(_GENL_ID_CTRL, NLM_F_REQUEST, 0, header, attr_str(_CTRL_ATTR_FAMILY_NAME, "wireguard"))


def read_family(msg: Message) -> int:
    """The answer to `get_family`."""
    return as_u16(parse_attrs(msg.payload, _GENL.size).get(_CTRL_ATTR_FAMILY_ID, b""))


def set_device(family: int, name: str, device: Wireguard) -> bytes:
    """Give the device its key and port; its peers stay. Raises ValueError for a malformed key."""
    key = attr(_DEVICE_PRIVATE_KEY, key_bytes(device.private_key))
    return _set(family, name, key, attr_u16(_DEVICE_LISTEN_PORT, device.port))


def set_peer(family: int, peer: WireguardPeer) -> bytes:
    """Add or change one peer; afterwards it has exactly these networks. Raises ValueError for a malformed key."""
    parts = [
        attr(_PEER_PUBLIC_KEY, key_bytes(peer.public_key)),
        attr_u32(_PEER_FLAGS, _REPLACE_ALLOWED),
        attr(_PEER_PSK, key_bytes(peer.psk) if peer.psk else bytes(KEY_BYTES)),
        attr_u16(_PEER_KEEPALIVE, peer.keepalive),
        nested(_PEER_ALLOWED, *(nested(0, *_allowed(network)) for network in peer.allowed)),
    ]
    if peer.endpoint is not None:
        parts.append(attr(_PEER_ENDPOINT, _sockaddr(*peer.endpoint)))
    return _set(family, peer.dev, nested(_DEVICE_PEERS, nested(0, *parts)))


def del_peer(family: int, peer: WireguardPeer) -> bytes:
    """Remove one peer; one that is not there is no error."""
    parts = nested(0, attr(_PEER_PUBLIC_KEY, key_bytes(peer.public_key)), attr_u32(_PEER_FLAGS, _REMOVE))
    return _set(family, peer.dev, nested(_DEVICE_PEERS, parts))


def dump_device(family: int, name: str) -> bytes:
    header = _GENL.pack(_GET_DEVICE, _VERSION, 0)
    return message(family, NLM_F_REQUEST | NLM_F_DUMP, 0, header, attr_str(_DEVICE_IFNAME, name))


def read_device(name: str, messages: Iterable[Message]) -> WireguardState:
    """The answer to `dump_device`. A peer with many networks goes on in the next message."""
    port, key = 0, b""
    allowed: dict[bytes, bytes] = {}
    settings: dict[bytes, tuple[int, bytes]] = {}
    for msg in messages:
        attrs = parse_attrs(msg.payload, _GENL.size)
        key = attrs.get(_DEVICE_PRIVATE_KEY, key)
        if _DEVICE_LISTEN_PORT in attrs:
            port = as_u16(attrs[_DEVICE_LISTEN_PORT])
        for _, raw in iter_attrs(attrs.get(_DEVICE_PEERS, b"")):
            peer = parse_attrs(raw)
            public = peer.get(_PEER_PUBLIC_KEY, b"")
            if _PEER_KEEPALIVE in peer:
                settings[public] = as_u16(peer[_PEER_KEEPALIVE]), peer.get(_PEER_PSK, b"")
            allowed[public] = allowed.get(public, b"") + peer.get(_PEER_ALLOWED, b"")
    peers = tuple(_peer(name, public, raw, *settings.get(public, (0, b""))) for public, raw in allowed.items())
    return WireguardState(Wireguard(port, _text(key)), peers)


@lru_cache(maxsize=_REMEMBERED)
def _peer(name: str, public: bytes, allowed: bytes, keepalive: int, psk: bytes) -> WireguardPeer:
    networks = tuple(sorted(_networks(allowed), key=network_order))
    return WireguardPeer(name, _text(public), networks, keepalive=keepalive, psk=_text(psk))


def network_order(network: IPNetwork) -> tuple[int, int, int]:
    return network.version, int(network.network_address), network.prefixlen


def _text(key: bytes) -> str:
    """base64; empty for a key that is not set, which WireGuard shows as zeros."""
    return base64.b64encode(key).decode() if any(key) else ""


def _set(family: int, name: str, *attrs: bytes) -> bytes:
    return message(family, NLM_F_REQUEST, 0, _GENL.pack(_SET_DEVICE, _VERSION, 0), attr_str(_DEVICE_IFNAME, name), *attrs)


def _allowed(network: IPNetwork) -> tuple[bytes, ...]:
    return (
        attr_u16(_ALLOWED_FAMILY, _AF_INET if network.version == 4 else _AF_INET6),
        attr(_ALLOWED_ADDRESS, network.network_address.packed),
        attr_u8(_ALLOWED_LENGTH, network.prefixlen),
    )


def _networks(raw: bytes) -> Iterable[IPNetwork]:
    for _, entry in iter_attrs(raw):
        attrs = parse_attrs(entry)
        try:
            yield ipaddress.ip_network((attrs.get(_ALLOWED_ADDRESS, b""), as_u8(attrs.get(_ALLOWED_LENGTH, b"\0"))))
        except ValueError as error:
            raise NetlinkError(f"WireGuard gave an allowed network that is none: {error}") from error


def _sockaddr(address: IPAddress, port: int) -> bytes:
    in_network_order = port.to_bytes(2, "big")
    if address.version == 4:
        return _SOCKADDR_IN.pack(_AF_INET, in_network_order, address.packed)
    return _SOCKADDR_IN6.pack(_AF_INET6, in_network_order, 0, address.packed, 0)
