"""Pieces of rules: the matches that several plans need, per family. Each returns expressions over the registers it is given."""

import ipaddress
import sys
from dataclasses import dataclass

from podwire.model.addr import Family, IPNetwork
from podwire.model.nft import FieldType, ip_field
from podwire.model.nftexpr import (
    IFNAMSIZ,
    IPS_DST_NAT,
    RTN_LOCAL,
    Bitwise,
    Cmp,
    CmpOp,
    Ct,
    CtKey,
    Expression,
    FibSaddrType,
    Meta,
    MetaKey,
    Payload,
    PayloadBase,
)

Expressions = tuple[Expression, ...]

_SADDR = {Family.IPV4: 12, Family.IPV6: 8}
_DADDR = {Family.IPV4: 16, Family.IPV6: 24}
_DPORT = 2
"""Where the destination port is in TCP's, UDP's and SCTP's headers alike."""


def host_u32(value: int) -> bytes:
    """A register as the kernel leaves it for numbers in host order."""
    return value.to_bytes(4, sys.byteorder)


@dataclass(frozen=True, slots=True)
class Fields:
    """Loads of the fields that our keys are made of. `addr` is how many registers an address takes."""

    family: Family

    @property
    def addr(self) -> int:
        return ip_field(self.family).padded // 4

    @property
    def frontend_key(self) -> tuple[FieldType, ...]:
        """address . protocol . port"""
        return (ip_field(self.family), FieldType.PROTO, FieldType.PORT)

    @property
    def frontend_registers(self) -> int:
        return self.addr + 2

    def saddr(self, reg: int) -> Expression:
        return Payload(PayloadBase.NETWORK, _SADDR[self.family], self.family.bits // 8, reg)

    def daddr(self, reg: int) -> Expression:
        return Payload(PayloadBase.NETWORK, _DADDR[self.family], self.family.bits // 8, reg)

    def dport(self, reg: int) -> Expression:
        return Payload(PayloadBase.TRANSPORT, _DPORT, 2, reg)

    def original_daddr(self, reg: int) -> Expression:
        return Ct(CtKey.DST_IP if self.family is Family.IPV4 else CtKey.DST_IP6, reg, original=True)

    def frontend(self, reg: int = 0) -> Expressions:
        """ip daddr . meta l4proto . th dport: what the packet is addressed to."""
        return (self.daddr(reg), Meta(MetaKey.L4PROTO, reg + self.addr), self.dport(reg + self.addr + 1))

    def original_frontend(self, reg: int = 0) -> Expressions:
        """The same as the client sent it, for a packet whose destination has been rewritten."""
        port = Ct(CtKey.PROTO_DST, reg + self.addr + 1, original=True)
        return (self.original_daddr(reg), Meta(MetaKey.L4PROTO, reg + self.addr), port)

    def backend(self, reg: int = 0) -> Expressions:
        """ip daddr . th dport of a packet whose destination has been rewritten."""
        return (self.daddr(reg), self.dport(reg + self.addr))

    def from_network(self, network: IPNetwork) -> Expressions:
        return _in_network(self.saddr(0), network)

    def to_network(self, network: IPNetwork) -> Expressions:
        return _in_network(self.daddr(0), network)


def _in_network(load: Expression, network: IPNetwork) -> Expressions:
    if network.prefixlen == 0:
        return ()
    value = network.network_address.packed
    if network.prefixlen == network.max_prefixlen:
        return (load, Cmp(CmpOp.EQ, 0, value))
    return (load, Bitwise(0, 0, network.netmask.packed, bytes(len(value))), Cmp(CmpOp.EQ, 0, value))


def destination_rewritten() -> Expressions:
    """ct status dnat"""
    bits = Bitwise(0, 0, host_u32(IPS_DST_NAT), bytes(4))
    return (Ct(CtKey.STATUS, 0), bits, Cmp(CmpOp.NEQ, 0, bytes(4)))


def from_this_machine() -> Expressions:
    """fib saddr type local"""
    return (FibSaddrType(0), Cmp(CmpOp.EQ, 0, host_u32(RTN_LOCAL)))


def from_interface(pattern: str) -> Expressions:
    """iifname; `pattern` is a name, or the beginning of names and "*"."""
    name = pattern.encode()
    value = name[:-1] if name.endswith(b"*") else name.ljust(IFNAMSIZ, b"\0")
    return (Meta(MetaKey.IIFNAME, 0), Cmp(CmpOp.EQ, 0, value))


def has_mark(bit: int) -> Expressions:
    return (Meta(MetaKey.MARK, 0), Bitwise(0, 0, host_u32(bit), bytes(4)), Cmp(CmpOp.EQ, 0, host_u32(bit)))


def is_protocol(number: int) -> Expressions:
    return (Meta(MetaKey.L4PROTO, 0), Cmp(CmpOp.EQ, 0, bytes((number,))))


def networks_of(family: Family, networks: tuple[IPNetwork, ...]) -> tuple[IPNetwork, ...]:
    return tuple(n for n in networks if n.version == family.version)


def multicast(family: Family) -> IPNetwork:
    return ipaddress.ip_network("224.0.0.0/4" if family is Family.IPV4 else "ff00::/8")
