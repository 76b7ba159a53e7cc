"""Addresses, prefixes and MACs. The address family is a parameter everywhere, never an afterthought."""

import enum
import ipaddress
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network
IPInterface = IPv4Interface | IPv6Interface


class Family(enum.Enum):
    """An IP family. `.value` is Kubernetes' spelling (`Service.spec.ipFamilies`)."""

    IPV4 = "IPv4"
    IPV6 = "IPv6"

    @property
    def version(self) -> int:
        return 4 if self is Family.IPV4 else 6

    @property
    def bits(self) -> int:
        return 32 if self is Family.IPV4 else 128

    @property
    def any(self) -> IPNetwork:
        """0.0.0.0/0 or ::/0."""
        return ipaddress.ip_network("0.0.0.0/0" if self is Family.IPV4 else "::/0")


def family_of(value: IPAddress | IPNetwork | IPInterface) -> Family:
    return Family.IPV4 if value.version == 4 else Family.IPV6


def packed_family(packed: bytes) -> Family:
    """Of an address in 4 or 16 bytes."""
    return Family.IPV4 if len(packed) == 4 else Family.IPV6


def parse_families(text: str) -> tuple[Family, ...]:
    """`ipv4`, `ipv6` or `dual` (IPv4 first) → families. Raises ValueError for anything else."""
    choices = {"ipv4": (Family.IPV4,), "ipv6": (Family.IPV6,), "dual": (Family.IPV4, Family.IPV6)}
    if text not in choices:
        raise ValueError(f"IP family {text!r}: must be ipv4, ipv6 or dual")
    return choices[text]


def mac_for(address: IPAddress) -> str:
    """A locally administered MAC that follows from `address`: a re-made device keeps its neighbours true.

    IPv4: 0a:58 + the four bytes (what the CNI bridge plugin used to do). IPv6: 0a:59 + the last four.
    """
    prefix = b"\x0a\x58" if address.version == 4 else b"\x0a\x59"
    return (prefix + address.packed[-4:]).hex(":")
