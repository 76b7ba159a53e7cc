"""Addresses of pods out of a node's subnet. Only arithmetic: what is taken is an argument, the record of it is the agent's."""

import ipaddress
from collections.abc import Container

from podwire.model.addr import IPAddress, IPNetwork
from podwire.model.errors import PodwireError


class AddressesExhausted(PodwireError):
    """Every address that a pod could have out of `prefix` is taken."""

    def __init__(self, prefix: IPNetwork, details: str = "") -> None:
        self.prefix, self.details = prefix, details
        known = f" ({details})" if details else ""
        super().__init__(f"no address is free in {prefix}{known}: delete pods on this node or give its nodes larger subnets")


def gateway(prefix: IPNetwork) -> IPAddress:
    """The bridge's address: the first one after the subnet's own (which is the tunnel device's, flannel's convention)."""
    return prefix.network_address + 1


def pod_range(prefix: IPNetwork) -> tuple[int, int]:
    """The first and the last address for pods, as integers: all but the subnet's own, the gateway's and IPv4's broadcast.

    Raises ValueError where the prefix is too small to hold a single pod."""
    first = int(prefix.network_address) + 2
    last = int(prefix.broadcast_address) - (1 if prefix.version == 4 else 0)
    if first > last:
        raise ValueError(f"{prefix} has no room for a pod")
    return first, last


def pick_address(prefix: IPNetwork, taken: Container[IPAddress], after: IPAddress | None = None) -> IPAddress:
    """The next free address of `prefix`, going round: the first free one behind `after`, which is the one given last.

    An address is thus given again as late as possible, when peers have forgotten who had it.
    Raises AddressesExhausted when there is none. Looks at no more addresses than are taken, plus one.
    """
    first, last = pod_range(prefix)
    start = first if after is None or not first <= int(after) <= last else int(after) + 1
    make = ipaddress.IPv4Address if prefix.version == 4 else ipaddress.IPv6Address
    for low, high in ((start, last), (first, start - 1)):
        for number in range(low, high + 1):
            candidate = make(number)
            if candidate not in taken:
                return candidate
    raise AddressesExhausted(prefix)
